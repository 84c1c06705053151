"""A job that makes a base: trained by LoQT from the one that is served or from scratch, and measured as it would serve.

Owns the order of the stages. Each leaves in the folder what the next needs. Runs on the thread that trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from motley_bases.loader import PlainBase, read_parsed_config
from motley_bases.pruned import is_pruned
from motley_bases.quantization import CONFIG_FIELD, NONE, stored_quantization
from torch import nn

from motley_trainer.data.training_data import TrainingData
from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.files.loqt_manifest import read_loqt_manifest
from motley_trainer.job.captured import buffers_of
from motley_trainer.job.checkpoint import Checkpoint
from motley_trainer.job.drawn_base import write_drawn
from motley_trainer.job.evaluation import Evaluation
from motley_trainer.job.loop import Training, train
from motley_trainer.job.made_base import TrainedBase, chain_of, keep_base, write_weights
from motley_trainer.job.stages import Stage, Stages
from motley_trainer.job.workbench import Workbench
from motley_trainer.methods.loqt import Loqt, merges_to_json
from motley_trainer.methods.loqt_schedule import check_interval
from motley_trainer.spec.reading import digest_of
from motley_trainer.spec.settings import LoqtSettings, LoqtStart

CPU = torch.device("cpu")


class BaseJob:
    """What the stages of one job share."""

    def __init__(self, bench: Workbench, settings: LoqtSettings) -> None:
        self._bench = bench
        self._settings = settings

    def make(self) -> tuple[Evaluation, TrainedBase]:
        """Train the base, measure it and put it where it is looked for."""
        bench = self._bench
        data = self._read_data()
        request = bench.request
        binding = {"spec": bench.spec.digest, "base": str(request.base), "dtype": request.dtype}
        stages = Stages(bench.files.stages, {**binding, "device": request.device})
        origin = self._origin(stages)
        before = bench.measure_before(origin, data)
        trained = stages.find("trained") or self._train(stages, origin, data)
        base = bench.held.hold(trained.directory, request.served_quantization)
        assert base.spec.fingerprint == trained.facts["fingerprint"]
        evaluation = bench.measure_after(base, data, before)
        bench.reporter.stage("writing")
        facts = trained.facts
        made = keep_base(
            bench.files.base,
            trained,
            chain=facts["chain"],
            merges=facts["merges"],
            provenance={
                **bench.provenance(Checkpoint(facts["steps"], facts["last_loss"], {}), evaluation),
                **facts["numbers"],
            },
        )
        shutil.rmtree(bench.files.stages, ignore_errors=True)
        return evaluation, made

    def _read_data(self) -> TrainingData:
        """Read the data, and refuse what can be refused before a weight is read."""
        bench = self._bench
        data = bench.read_data()
        check_interval(self._settings, data.num_steps(bench.spec), "loqt")
        config = read_parsed_config(bench.request.base)
        stored = stored_quantization(getattr(config, CONFIG_FIELD, None))
        if stored != NONE:
            message = (
                f"the base is stored as {stored}, and what quantizing has lost cannot be made up for: serve the "
                "checkpoint that it was made of, quantized at load"
            )
            raise SettingsError(message, reason="QUANTIZED_OTHERWISE", field="quantization")
        if self._settings.start is LoqtStart.SCRATCH and is_pruned(config):
            message = "the base is a pruned one, which keeps parts of its original: from scratch nothing of it is kept"
            raise UnsuitableBaseError(message, reason="ALREADY_PRUNED", field="loqt.start")
        if self._settings.start is LoqtStart.BASE:
            read_loqt_manifest(bench.request.base)  # what the new one's is to go on from
        bench.reporter.tell("data", data.report.to_json())
        return data

    def _origin(self, stages: Stages) -> Path:
        """Return what training begins from: the base, or one that is drawn."""
        if self._settings.start is LoqtStart.BASE:
            return self._bench.request.base
        drawn = stages.find("drawn")
        if drawn is None:
            self._bench.reporter.stage("drawing weights")
            drawn = stages.write("drawn", self._draw)
        return drawn.directory

    def _draw(self, aside: Path) -> Mapping[str, object]:
        bench = self._bench
        return {"fingerprint": write_drawn(aside, original=bench.request.base, seed=bench.spec.seed)}

    def _train(self, stages: Stages, origin: Path, data: TrainingData) -> Stage:
        bench = self._bench
        base = bench.held.hold(origin, NONE)  # whole, until the first step has quantized it
        checkpoints = bench.checkpoints_of(base, {"loqt.schedule": self._schedule})
        resumed = bench.resumed(checkpoints)
        bench.reporter.stage("training")
        chain = self._chain(base)
        method = Loqt(self._settings, bench.request.trained_quantization, chain[-1] if chain else None)
        paths = [path for path in base.spec.linears if path != base.spec.lm_head_path]
        num_steps = data.num_steps(bench.spec)
        attached = method.attach(base.model, paths, num_steps, None if resumed is None else buffers_of(resumed))
        training = Training(base.model, attached, bench.spec, data, attached)
        last = train(training, checkpoints, resumed, bench.reporter)
        told: dict[str, object] = {
            "chain": chain,
            "merges": merges_to_json(attached.merges),
            "steps": last.step,
            "last_loss": last.loss,
            "numbers": attached.facts(),
        }
        attached.settle(CPU)

        def fill(aside: Path) -> Mapping[str, object]:
            nn.Module.to(base.model, CPU)
            return {**told, "fingerprint": write_weights(aside, base.model, original=origin)}

        return stages.write("trained", fill)

    def _chain(self, base: PlainBase) -> tuple[str, ...]:
        """Return the fingerprints of what is trained here and of all before it, none from scratch."""
        if self._settings.start is LoqtStart.SCRATCH:
            return ()
        return chain_of(self._bench.request.base, base.spec.fingerprint)

    @property
    def _schedule(self) -> str:
        """Return a digest of what says when there is a merge."""
        settings = self._settings
        return digest_of([settings.schedule, settings.merge_interval, settings.growth])
