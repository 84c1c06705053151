"""A job that makes an adapter: measured on the base without it and with it, and trained on the base or on its copy.

Owns the order of the stages. Each leaves in the folder what the next needs. Runs on the thread that trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from motley_bases.loader import PlainBase

from motley_trainer.data.batches import Batch
from motley_trainer.data.training_data import TrainingData, batches_of
from motley_trainer.job.captured import buffers_of, restore
from motley_trainer.job.checkpoint import Checkpoint
from motley_trainer.job.evaluation import Evaluation
from motley_trainer.job.loop import Training, train
from motley_trainer.job.loram_copy import LoramCopy
from motley_trainer.job.workbench import BASE, Workbench
from motley_trainer.methods import method_of
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.methods.method import Attached, Context
from motley_trainer.spec.settings import LoramSettings


class AdapterJob:
    """What the stages of one job share."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._spec = bench.spec

    def make(self) -> tuple[Evaluation, str]:
        """Train the adapter, measure it and write it; return its evaluation and its digest."""
        bench = self._bench
        data, copies = self._read_data()
        before = bench.measure_before(bench.request.base, data)
        copy = self._make_copy(copies, data)
        attached, trained = self._train(data, copy)
        if self._trained_on(copy) != self._served:
            del attached  # and with it the base that it was trained on
            attached = self._carry_over(data, copy, trained)
        evaluation = bench.measure_after(bench.held.hold(*self._served), data, before)
        bench.reporter.stage("writing")
        provenance = bench.provenance(trained, evaluation)
        digest = bench.files.write_adapter(lambda aside: attached.write(aside, provenance))
        return evaluation, digest

    def _read_data(self) -> tuple[TrainingData, LoramCopy | None]:
        """Read the data, and refuse what can be refused before a weight is read."""
        bench, copies = self._bench, None
        data = bench.read_data()
        if isinstance(self._spec.settings, LoramSettings):
            copies = LoramCopy(bench.files, bench.request, self._spec.settings, bench.reporter, bench.device)
            copies.check(data)
        bench.reporter.tell("data", data.report.to_json())
        return data, copies

    def _make_copy(self, copies: LoramCopy | None, data: TrainingData) -> PrunedCopy | None:
        """Make what is trained on in the place of the base, where the method has such a thing."""
        if copies is None or not copies.is_needed:
            return None
        self._bench.held.let_go()  # what makes a copy loads what it needs
        return copies.make(data)

    @property
    def _served(self) -> tuple[Path, str]:
        """Return what is measured: the base, as a server holds it."""
        return self._bench.request.base, self._bench.request.served_quantization

    def _trained_on(self, copy: PrunedCopy | None) -> tuple[Path, str]:
        """Return what is trained on: the base or its copy, as it is held in training."""
        request = self._bench.request
        return request.base if copy is None else copy.directory, request.trained_quantization

    def _train(self, data: TrainingData, copy: PrunedCopy | None) -> tuple[Attached, Checkpoint]:
        bench = self._bench
        base = bench.held.hold(*self._trained_on(copy))
        checkpoints = bench.checkpoints_of(base)
        resumed = bench.resumed(checkpoints, made_anew=() if copy is None else (BASE,))
        bench.reporter.stage("training")
        attached = self._attach(base, data, copy, resumed)
        if resumed is None and isinstance(shares := attached.facts().get("shares"), Mapping):
            bench.reporter.stage(f"training {', '.join(f'{share:.4%} of {name}' for name, share in shares.items())}")
        return attached, train(Training(base.model, attached, self._spec, data), checkpoints, resumed, bench.reporter)

    def _attach(
        self, base: PlainBase, data: TrainingData, copy: PrunedCopy | None, resumed: Checkpoint | None
    ) -> Attached:
        def calibration(count: int) -> list[Batch]:
            samples = data.at(0, min(count, len(data.training)))
            return [batch.to(self._bench.device) for batch in batches_of(samples, self._spec.micro_batch_size)]

        bench = self._bench
        context = Context(
            base.spec,
            self._spec.seed,
            calibration,
            bench.files.adapters(),
            copy,
            bench.reporter.part,
            bench.request.spectra,
        )
        buffers = None if resumed is None else buffers_of(resumed)
        return method_of(self._spec).attach(base.model, context, buffers)

    def _carry_over(self, data: TrainingData, copy: PrunedCopy | None, trained: Checkpoint) -> Attached:
        """Attach what was trained to the base as it is served, which was another or held otherwise in training."""
        attached = self._attach(self._bench.held.hold(*self._served), data, copy, trained)
        restore(attached, trained.tensors)
        return attached
