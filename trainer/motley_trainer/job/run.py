"""One job, from its folder: `python -m motley_trainer.job DIRECTORY`, or `run` in this process.

Owns the order of the stages: measuring the base, making the copy that is trained on where a method has one, training,
measuring the result on the base, writing. Each leaves in the folder what the next needs, so a job that is started again
goes on where it was. It reads the base and that folder, writes that folder, and knows no network. Runs on the calling
thread.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from motley_bases.describe import context_length
from motley_bases.loader import PlainBase, load_tokenizer, read_parsed_config
from motley_bases.pruned import register_pruned

from motley_trainer.data.batches import Batch
from motley_trainer.data.training_data import TrainingData, batches_of, read_data
from motley_trainer.device import parse_device
from motley_trainer.errors import CheckpointError
from motley_trainer.job.base import HeldBase
from motley_trainer.job.captured import buffers_of, restore
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.evaluation import Evaluation, Measured, check_gate, judge, measure
from motley_trainer.job.files import JobFiles, JobRequest, Result
from motley_trainer.job.loop import Training, train
from motley_trainer.job.loram_copy import LoramCopy
from motley_trainer.job.reporting import Emit, Reporter
from motley_trainer.job.schedule import warmup_steps
from motley_trainer.methods import method_of
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.methods.method import Attached, Context
from motley_trainer.spec.settings import LoramSettings

TERMS = ("quantization", "dtype", "device")  # what a server or a worker may be restarted with otherwise
BASE = "base"

log = logging.getLogger(__name__)


def run(directory: Path, emit: Emit, should_stop: Callable[[], bool] = lambda: False) -> Result:
    """Do what is left to do of a job, and return what came of it.

    Semantics: `emit` gets the JSON of the wire's JobEvents; `should_stop` is asked after every step and between stages.
    Raises: TrainerError, BaseError or AdapterError for what will not do, however often it is tried; JobCancelledError
    if it was asked to stop.
    """
    files = JobFiles(directory)
    files.sweep()
    result = files.result()
    if result is not None:
        return result
    request, evaluation, digest = files.request(), files.evaluation(), files.adapter_digest()
    if evaluation is None or digest is None:
        evaluation, digest = _Job(files, request, Reporter(emit, should_stop)).make()
    verdict = judge(request.spec.gate, evaluation)
    result = Result(digest, evaluation, verdict.passed, verdict.reason, verdict.message)
    files.write_result(result)
    return result


class _Job:
    """What the stages of one job share; it holds one base at a time."""

    def __init__(self, files: JobFiles, request: JobRequest, reporter: Reporter) -> None:
        self._files = files
        self._request = request
        self._spec = request.spec
        self._reporter = reporter
        self._device = parse_device(request.device)
        self._held = HeldBase(
            name=request.base_name,
            dtype=request.dtype,
            device=self._device,
            on_load=lambda: reporter.stage("loading base"),
        )

    def make(self) -> tuple[Evaluation, str]:
        """Train the adapter, measure it and write it; return its evaluation and its digest."""
        data, copies = self._read_data()
        before = self._measure_before(data)
        copy = self._make_copy(copies, data)
        attached, trained = self._train(data, copy)
        if self._trained_on(copy) != self._served:
            del attached  # and with it the base that it was trained on
            attached = self._carry_over(data, copy, trained)
        evaluation = self._measure_after(data, before)
        self._reporter.stage("writing")
        provenance = self._provenance(trained, evaluation)
        digest = self._files.write_adapter(lambda aside: attached.write(aside, provenance))
        return evaluation, digest

    def _read_data(self) -> tuple[TrainingData, LoramCopy | None]:
        """Read the data, and refuse what can be refused before a weight is read."""
        self._reporter.stage("reading data")
        register_pruned()
        tokenizer = load_tokenizer(self._request.base)
        length = context_length(read_parsed_config(self._request.base))
        data = read_data(self._files.data, self._spec, tokenizer, length, on_line=self._reporter.read)
        check_gate(self._spec.gate, data.held_out)
        warmup_steps(self._spec.optimizer, data.num_steps(self._spec))
        copies = None
        if isinstance(self._spec.settings, LoramSettings):
            copies = LoramCopy(self._files, self._request, self._spec.settings, self._reporter, self._device)
            copies.check(data)
        self._reporter.tell("data", data.report.to_json())
        return data, copies

    def _make_copy(self, copies: LoramCopy | None, data: TrainingData) -> PrunedCopy | None:
        """Make what is trained on in the place of the base, where the method has such a thing."""
        if copies is None or not copies.is_needed:
            return None
        self._held.let_go()  # what makes a copy loads what it needs
        return copies.make(data)

    @property
    def _served(self) -> tuple[Path, str]:
        """Return what is measured: the base, as a server holds it."""
        return self._request.base, self._request.served_quantization

    def _trained_on(self, copy: PrunedCopy | None) -> tuple[Path, str]:
        """Return what is trained on: the base or its copy, as it is held in training."""
        return self._request.base if copy is None else copy.directory, self._request.trained_quantization

    def _measure_before(self, data: TrainingData) -> Measured:
        request = self._request
        binding = {"spec": self._spec.digest, "base": str(request.base), "quantization": request.served_quantization}
        before = self._files.before(binding)
        if before is None:
            base = self._held.hold(*self._served)
            self._reporter.stage("measuring before")
            before = self._measure(base, data)
            self._files.write_before(before, binding)
        return before

    def _train(self, data: TrainingData, copy: PrunedCopy | None) -> tuple[Attached, Checkpoint]:
        base = self._held.hold(*self._trained_on(copy))
        checkpoints = Checkpoints(self._files.checkpoints, self._binding(base))
        resumed = self._resumed(checkpoints, copy)
        self._reporter.stage("training")
        attached = self._attach(base, data, copy, resumed)
        if resumed is None and isinstance(shares := attached.facts().get("shares"), Mapping):
            self._reporter.stage(f"training {', '.join(f'{share:.4%} of {name}' for name, share in shares.items())}")
        return attached, train(Training(base.model, attached, self._spec, data), checkpoints, resumed, self._reporter)

    def _resumed(self, checkpoints: Checkpoints, copy: PrunedCopy | None) -> Checkpoint | None:
        """Return the checkpoint to go on from; those of other terms are dropped, which nobody's fault makes useless.

        Semantics: those of another copy of the base too, since a copy is made anew when the terms are others.
        """
        try:
            return checkpoints.latest()
        except CheckpointError as error:
            is_of_another_copy = copy is not None and error.field == BASE
            if error.field not in TERMS and not is_of_another_copy:
                raise
            why = "the copy of the base was made anew" if is_of_another_copy else error.message
            log.warning("starting over: %s", error)
            self._reporter.stage(f"starting over: {why}")
        checkpoints.drop()
        return None

    def _attach(
        self, base: PlainBase, data: TrainingData, copy: PrunedCopy | None, resumed: Checkpoint | None
    ) -> Attached:
        def calibration(count: int) -> list[Batch]:
            samples = data.at(0, min(count, len(data.training)))
            return [batch.to(self._device) for batch in batches_of(samples, self._spec.micro_batch_size)]

        context = Context(base.spec, self._spec.seed, calibration, self._files.adapters(), copy)
        buffers = None if resumed is None else buffers_of(resumed)
        return method_of(self._spec).attach(base.model, context, buffers)

    def _carry_over(self, data: TrainingData, copy: PrunedCopy | None, trained: Checkpoint) -> Attached:
        """Attach what was trained to the base as it is served, which was another or held otherwise in training."""
        attached = self._attach(self._held.hold(*self._served), data, copy, trained)
        restore(attached, trained.tensors)
        return attached

    def _measure_after(self, data: TrainingData, before: Measured) -> Evaluation:
        base = self._held.hold(*self._served)
        self._reporter.stage("measuring after")
        after = self._measure(base, data)
        evaluation = Evaluation(len(data.held_out), before.loss, after.loss, before.exact_match, after.exact_match)
        self._files.write_evaluation(evaluation)
        self._reporter.tell("evaluation", evaluation.to_json())
        return evaluation

    def _measure(self, base: PlainBase, data: TrainingData) -> Measured:
        ends = base.spec.generation.eos_token_ids
        return measure(
            base.model,
            base.tokenizer,
            data.held_out,
            ends,
            batch_size=self._spec.micro_batch_size,
            on_batch=self._reporter.stop_if_asked,
        )

    def _binding(self, base: PlainBase) -> dict[str, str]:
        """Return what a checkpoint must be of to be gone on from, and what is asked first, first."""
        return {
            "dataset": self._spec.dataset,
            "spec": self._spec.digest,
            BASE: base.spec.fingerprint,
            "quantization": base.spec.quantization,
            "dtype": base.spec.dtype,
            "device": self._request.device,
        }

    def _provenance(self, trained: Checkpoint, evaluation: Evaluation) -> dict[str, object]:
        spec = self._spec
        return {
            "job": self._request.job_id,
            "method": spec.method.value,
            "settings": json.loads(json.dumps(asdict(spec.settings), default=str)),  # a ratio as it is written
            "spec": spec.digest,
            "datasets": list(spec.datasets),
            "steps": trained.step,
            "seed": spec.seed,
            "trained_quantization": self._request.trained_quantization,
            "served_quantization": self._request.served_quantization,
            "last_loss": trained.loss,
            "evaluation": evaluation.to_json(),
            "versions": {name: version(name) for name in ("motley", "torch", "transformers")},
        }
