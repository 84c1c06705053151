"""The copy of a base that LoRAM trains on: pruned, and then aligned where that is asked for, each a stage of its own.

Each stage leaves a base directory, and no model in memory. Owns what of a job each stage is made from; how weights are
chosen and trained is not known here. Runs on the thread that trains.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from motley_bases.describe import context_length
from motley_bases.loader import load_tokenizer, read_parsed_config, stored_dtype
from motley_bases.prune_manifest import PruneManifest
from motley_bases.quantization import NONE
from motley_bases.stored_spec import read_spec as read_base_spec
from transformers import PreTrainedModel

from motley_trainer.data.training_data import TrainingData
from motley_trainer.job.alignment import (
    Alignment,
    AlignmentEngine,
    FullRank,
    alignment_spec,
    naming_alignment,
    read_alignment,
)
from motley_trainer.job.alignment_loqt import FIELD, LoqtAlignment
from motley_trainer.job.base import load_job_base
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.files import JobFiles, JobRequest
from motley_trainer.job.reporting import Reporter
from motley_trainer.job.same_cut import read_same_cut
from motley_trainer.job.stages import Stage, Stages
from motley_trainer.methods.loqt_schedule import check_interval
from motley_trainer.methods.loram import Loram
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.pruning.dense_copy import write_dense
from motley_trainer.pruning.loram import CopyOrder, make_copy
from motley_trainer.pruning.loram_checks import check_copy, needs_calibration, takes_copy
from motley_trainer.pruning.sample_windows import SampleWindows, cut_samples
from motley_trainer.pruning.sparse_gpt import linears_of
from motley_trainer.pruning.written import write_pruned
from motley_trainer.spec.settings import LoramAlignment, LoramSettings, derived_seed

NF4 = "nf4"  # how LoQT holds Linears unless a spec says otherwise
CALIBRATION_WINDOW = 128  # tokens
SAVES_NOTHING = "pruning single weights, which saves no memory: dense products hold and multiply zeros too"


class LoramCopy:
    """The stages that make a job's copy."""

    def __init__(
        self,
        files: JobFiles,
        request: JobRequest,
        settings: LoramSettings,
        reporter: Reporter,
        device: torch.device,
    ) -> None:
        self._request = request
        self._settings = settings
        self._reporter = reporter
        self._device = device
        self._engine = _engine_of(request, settings)
        self._files = files
        self._binding = {"spec": request.spec.digest, "base": str(request.base), "device": request.device}
        self._text: TrainingData | None = None
        self._cut: PruneManifest | None = None

    @property
    def is_needed(self) -> bool:
        """Tell whether anything is pruned: where nothing is, the base itself is trained on."""
        return takes_copy(self._settings)

    def check(self, data: TrainingData) -> None:
        """Refuse what can be refused before a weight is read.

        Raises: as `check_copy`, `read_same_cut` and `read_alignment` do.
        """
        config = read_parsed_config(self._request.base)
        check_copy(self._settings, config)
        alignment = self._settings.alignment
        if alignment is not None and alignment.loqt is not None:
            check_interval(alignment.loqt, alignment.steps, FIELD)
        if self._settings.same_cut_as is not None:
            self._cut = read_same_cut(self._files.adapters(), self._request.base)
        if alignment is not None:
            tokenizer = load_tokenizer(self._request.base)
            spec = self._request.spec
            self._text = read_alignment(
                self._files.data, spec, tokenizer, context_length(config), data.held_out, on_line=self._reporter.read
            )

    def make(self, data: TrainingData) -> PrunedCopy:
        """Do what is left to do of the stages, and return what is trained on.

        Raises: as `make_copy` and the alignment's engine do; SettingsError for targets that the copy does not have.
        """
        stages = Stages(self._files.stages, self._binding)
        pruned = stages.find("pruned")
        if pruned is None:
            shutil.rmtree(stages.folder("aligning"), ignore_errors=True)  # which was of another copy
            pruned = self._prune(stages, data)
            gc.collect()  # what a stage has loaded is gone before the next loads
        if self._settings.alignment is None:
            return _copy_of(pruned)
        aligned = stages.find("aligned")
        if aligned is None:
            Loram(self._settings).check_targets(read_base_spec(pruned.directory))  # before the longer stage
            aligned = self._align(stages, pruned, self._settings.alignment)
            gc.collect()
        shutil.rmtree(stages.folder("aligning"), ignore_errors=True)
        return _copy_of(aligned)

    def _prune(self, stages: Stages, data: TrainingData) -> Stage:
        asked, spec = self._settings, self._request.spec
        self._reporter.stage(SAVES_NOTHING if asked.pruning.keeps_shapes else "pruning")
        copy = make_copy(
            CopyOrder(
                base=self._request.base,
                settings=asked,
                seed=derived_seed(spec.seed, "pruning"),
                device=self._device,
                calibration=self._calibration(data) if needs_calibration(asked) else None,
                cut=self._cut,
                on_step=self._reporter.stop_if_asked,
            )
        )

        def fill(aside: Path) -> Mapping[str, object]:
            return {"fingerprint": copy.write(aside), **copy.facts}

        return stages.write("pruned", fill)

    def _calibration(self, data: TrainingData) -> SampleWindows:
        """Return the first samples in the order of the data, as text."""
        samples = data.at(0, min(self._settings.calibration_samples, len(data.training)))
        longest = min(CALIBRATION_WINDOW, context_length(read_parsed_config(self._request.base)))
        return cut_samples(samples, longest)

    def _align(self, stages: Stages, pruned: Stage, asked: LoramAlignment) -> Stage:
        assert self._text is not None  # `check` has read it
        self._reporter.stage("aligning")
        base = load_job_base(
            pruned.directory, name=self._request.base_name, dtype="float32", device=self._device, quantization=NONE
        )
        binding = {**self._binding, "copy": pruned.facts["fingerprint"], "dataset": asked.dataset}
        spec = alignment_spec(self._request.spec, asked)
        alignment = Alignment(
            base.model, spec, self._text, _set_to_zero(base.model, pruned), pruned.facts["fingerprint"]
        )
        checkpoints = Checkpoints(stages.folder("aligning"), binding)
        with naming_alignment():
            loss = self._engine.align(alignment, checkpoints, self._reporter)
        told = {
            "engine": self._engine.name,
            "pruned_fingerprint": pruned.facts["fingerprint"],
            "dataset": asked.dataset,
            "steps": asked.steps,
            "batch_size": asked.batch_size,
            "learning_rate": asked.learning_rate,
            "last_loss": loss,
            **({} if asked.loqt is None else {"settings": asdict(asked.loqt)}),
        }

        def fill(aside: Path) -> Mapping[str, object]:
            digest = _write_aligned(aside, base.model, pruned)
            return {**pruned.facts, "fingerprint": digest, "alignment": told}

        return stages.write("aligned", fill)


def _engine_of(request: JobRequest, settings: LoramSettings) -> AlignmentEngine:
    loqt = None if settings.alignment is None else settings.alignment.loqt
    return FullRank() if loqt is None else LoqtAlignment(loqt, request.spec.quantization or NF4)


def _set_to_zero(model: PreTrainedModel, pruned: Stage) -> frozenset[str]:
    """Return the names of the parameters in which single weights were set to zero."""
    if pruned.facts["is_smaller"]:
        return frozenset()
    linears = linears_of(model, range(*pruned.facts["layers"]))
    return frozenset(f"{path}.weight" for paths in linears.values() for path in paths)


def _write_aligned(aside: Path, model: PreTrainedModel, pruned: Stage) -> str:
    """Write the copy with other weights, in the dtype that it was stored in."""
    manifest, config = _copy_of(pruned).manifest(), read_parsed_config(pruned.directory)
    dtype = stored_dtype(pruned.directory, config)
    if manifest is None:
        return write_dense(aside, model, original=pruned.directory, dtype=dtype)
    return write_pruned(aside, model, original=pruned.directory, config=config, dtype=dtype, manifest=manifest)


def _copy_of(stage: Stage) -> PrunedCopy:
    facts = dict(stage.facts)
    return PrunedCopy(stage.directory, facts["fingerprint"], facts["original_fingerprint"], facts)
