"""Full training beside LoQT's: the trainer's own loop with every weight, on what a LoQT job of the same spec reads.

The base that would be written is measured: its weights are rounded to the dtype that the original is stored in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jobs import DTYPE
from motley_bases.loader import read_parsed_config, stored_dtype
from motley_trainer.job.alignment import AllWeights
from motley_trainer.job.base import load_job_base
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.drawn_base import write_drawn
from motley_trainer.job.evaluation import mean_loss
from motley_trainer.job.files import JobFiles
from motley_trainer.job.loop import Training, train
from motley_trainer.job.reporting import Reporter
from motley_trainer.job.workbench import Workbench
from motley_trainer.spec.settings import LoqtSettings, LoqtStart


def train_full(job: Path) -> tuple[float, float]:
    """Do what the job of a folder asks for, every weight trained; return the held-out loss before and after."""
    request = JobFiles(job).request()
    settings = request.spec.settings
    assert isinstance(settings, LoqtSettings)
    reporter = Reporter(lambda event: None, lambda: False)
    data = Workbench(JobFiles(job), request, reporter).read_data()
    origin = request.base
    if settings.start is LoqtStart.SCRATCH:
        origin = job / "drawn"
        origin.mkdir()
        write_drawn(origin, original=request.base, seed=request.spec.seed)
    base = load_job_base(
        origin, name=request.base_name, dtype=DTYPE, device=torch.device(request.device), quantization="none"
    )
    before = mean_loss(base.model, data.held_out)
    weights = AllWeights(base.model, trains_output=True)
    train(Training(base.model, weights, request.spec, data), Checkpoints(job / "checkpoints", {}), None, reporter)
    stored = stored_dtype(origin, read_parsed_config(origin))
    with torch.no_grad():
        for parameter in weights.parameters.values():
            parameter.copy_(parameter.to(stored))
    return before, mean_loss(base.model, data.held_out)
