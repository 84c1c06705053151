"""What every job does, whatever comes of it: read its data, hold a base, measure it, go on from a checkpoint.

Holds one base at a time. Runs on the thread that trains.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from motley_bases.describe import context_length
from motley_bases.loader import PlainBase, load_tokenizer, read_parsed_config
from motley_bases.pruned import register_pruned

from motley_trainer.data.training_data import TrainingData, read_data
from motley_trainer.device import parse_device
from motley_trainer.errors import CheckpointError
from motley_trainer.job.base import HeldBase
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.evaluation import Evaluation, Measured, check_gate, measure
from motley_trainer.job.files import JobFiles, JobRequest
from motley_trainer.job.reporting import Reporter
from motley_trainer.job.schedule import warmup_steps

TERMS = ("quantization", "dtype", "device")  # what a server or a worker may be restarted with otherwise
BASE = "base"

log = logging.getLogger(__name__)


class Workbench:
    """One job's folder, what it is asked, and the base that it has in hand."""

    def __init__(self, files: JobFiles, request: JobRequest, reporter: Reporter) -> None:
        self.files = files
        self.request = request
        self.spec = request.spec
        self.reporter = reporter
        self.device = parse_device(request.device)
        self.held = HeldBase(
            name=request.base_name,
            dtype=request.dtype,
            device=self.device,
            on_load=lambda: reporter.stage("loading base"),
        )

    def read_data(self) -> TrainingData:
        """Read the data, and refuse what can be refused before a weight is read."""
        self.reporter.stage("reading data")
        register_pruned()
        tokenizer = load_tokenizer(self.request.base)
        length = context_length(read_parsed_config(self.request.base))
        data = read_data(self.files.data, self.spec, tokenizer, length, on_line=self.reporter.read)
        check_gate(self.spec.gate, data.held_out)
        warmup_steps(self.spec.optimizer, data.num_steps(self.spec))
        return data

    def measure_before(self, directory: Path, data: TrainingData) -> Measured:
        """Measure what training begins from, as a server holds it, once in a job."""
        quantization = self.request.served_quantization
        binding = {"spec": self.spec.digest, BASE: str(self.request.base), "quantization": quantization}
        before = self.files.before(binding)
        if before is None:
            base = self.held.hold(directory, quantization)
            self.reporter.stage("measuring before")
            before = self._measure(base, data)
            self.files.write_before(before, binding)
        return before

    def measure_after(self, base: PlainBase, data: TrainingData, before: Measured) -> Evaluation:
        """Measure what came of it, and tell."""
        self.reporter.stage("measuring after")
        after = self._measure(base, data)
        evaluation = Evaluation(len(data.held_out), before.loss, after.loss, before.exact_match, after.exact_match)
        self.files.write_evaluation(evaluation)
        self.reporter.tell("evaluation", evaluation.to_json())
        return evaluation

    def checkpoints_of(self, base: PlainBase, asked: Mapping[str, str] = MappingProxyType({})) -> Checkpoints:
        """Return the checkpoints of this training, bound to what it is; what is asked first, first.

        Semantics: `asked` are parts of the spec that are worth a name of their own.
        """
        binding = {
            "dataset": self.spec.dataset,
            **asked,
            "spec": self.spec.digest,
            BASE: base.spec.fingerprint,
            "quantization": self.request.trained_quantization,
            "dtype": base.spec.dtype,
            "device": self.request.device,
        }
        return Checkpoints(self.files.checkpoints, binding)

    def resumed(self, checkpoints: Checkpoints, *, made_anew: Collection[str] = ()) -> Checkpoint | None:
        """Return the checkpoint to go on from; those of other terms are dropped, which nobody's fault makes useless.

        Semantics: those of another in `made_anew` too: a copy of the base is made anew when the terms are others.
        """
        try:
            return checkpoints.latest()
        except CheckpointError as error:
            if error.field not in (*TERMS, *made_anew):
                raise
            why = "the copy of the base was made anew" if error.field in made_anew else error.message
            log.warning("starting over: %s", error)
            self.reporter.stage(f"starting over: {why}")
        checkpoints.drop()
        return None

    def provenance(self, trained: Checkpoint, evaluation: Evaluation) -> dict[str, object]:
        """Return how what was made came to be, as its manifest tells it."""
        spec = self.spec
        return {
            "job": self.request.job_id,
            "method": spec.method.value,
            "settings": json.loads(json.dumps(asdict(spec.settings), default=str)),  # a ratio as it is written
            "spec": spec.digest,
            "datasets": list(spec.datasets),
            "steps": trained.step,
            "seed": spec.seed,
            "trained_quantization": self.request.trained_quantization,
            "served_quantization": self.request.served_quantization,
            "last_loss": trained.loss,
            "evaluation": evaluation.to_json(),
            "versions": {name: version(name) for name in ("motley", "torch", "transformers")},
        }

    def _measure(self, base: PlainBase, data: TrainingData) -> Measured:
        return measure(
            base.model,
            base.tokenizer,
            data.held_out,
            base.spec.generation.eos_token_ids,
            batch_size=self.spec.micro_batch_size,
            on_batch=self.reporter.stop_if_asked,
        )
