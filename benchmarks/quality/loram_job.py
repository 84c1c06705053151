"""Jobs whose folders stay for a while, so that a LoRAM can be measured on the copy that it was trained on.

A job measures what it writes, which is recovered, on the base. Here the copy is loaded from where the job's stages left
it, held as in training; the method puts its factors beside the copy's Linears as the job had it do, and they get the
values of the job's last checkpoint. Nothing is trained or scattered here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedded import Line
from jobs import write_job
from motley_bases.loader import PlainBase
from motley_trainer.data.samples import Sample
from motley_trainer.job.base import load_job_base
from motley_trainer.job.captured import restore
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.evaluation import Measured, mean_loss, measure
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.run import run
from motley_trainer.job.stages import STAGE_FILE
from motley_trainer.methods import method_of
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.methods.method import Context


@dataclass(frozen=True, slots=True)
class OnCopy:
    """What a copy of the base makes of texts.

    Semantics: `prose_loss` is the copy's own; `adapted` are the answers under the factors that were trained on it.
    """

    num_parameters: int
    num_trained: int
    prose_loss: float
    adapted: Measured


def run_in(job: Path, spec: Mapping[str, Any], learned: Iterable[Line], asked: Iterable[Line]) -> Result:
    """Run a job in a folder. Semantics: `spec` as for `run_job`."""
    write_job(job, spec, learned, asked)
    return run(job, lambda event: None)


def open_copy(job: Path) -> PrunedCopy:
    """Return what a job trained on: what its last stage left."""
    stages = JobFiles(job).stages
    stage = next(stages / name for name in ("aligned", "pruned") if (stages / name).is_dir())
    facts = json.loads((stage / STAGE_FILE).read_bytes())["facts"]
    return PrunedCopy(stage, facts["fingerprint"], facts["original_fingerprint"], facts)


def measure_copy(job: Path, asked: tuple[Sample, ...], prose: tuple[Sample, ...]) -> OnCopy:
    """Measure a copy, and the answers of what a job trained on it before that was recovered."""
    files, copy = JobFiles(job), open_copy(job)
    request = files.request()
    base = load_job_base(
        copy.directory,
        name=request.base_name,
        dtype=request.dtype,
        device=torch.device(request.device),
        quantization=request.trained_quantization,
    )
    prose_loss = mean_loss(base.model, prose)
    num_trained = _put_on(base, copy, files)
    adapted = measure(base.model, base.tokenizer, asked, base.spec.generation.eos_token_ids)
    return OnCopy(int(str(copy.facts["num_parameters"])), num_trained, prose_loss, adapted)


def _put_on(base: PlainBase, copy: PrunedCopy, files: JobFiles) -> int:
    """Put the factors of the last checkpoint on a copy, and return how many numbers they are."""
    spec = files.request().spec
    attached = method_of(spec).attach(base.model, Context(base.spec, spec.seed, lambda count: [], copy=copy), None)
    trained = Checkpoints(files.checkpoints, {"base": base.spec.fingerprint}).latest()  # of this copy, or refused
    assert trained is not None  # the job has ended
    restore(attached, trained.tensors)
    return sum(parameter.numel() for parameter in attached.parameters.values())
