"""Alignment by LoQT: the pruned copy's Linears in few bits, learning by one low-rank factor at a time.

Runs on the thread that owns the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from motley_trainer.job.alignment import Alignment
from motley_trainer.job.captured import buffers_of
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.loop import Training, train
from motley_trainer.job.reporting import Reporter
from motley_trainer.methods.loqt import Loqt
from motley_trainer.spec.settings import LoqtSettings

FIELD = "loram.alignment.loqt"


@dataclass(frozen=True, slots=True)
class LoqtAlignment:
    """Train every weight but those that give the logits, the Linears' by LoQT; they are held in a `quantization`."""

    settings: LoqtSettings
    quantization: str

    name = "loqt"

    def align(self, alignment: Alignment, checkpoints: Checkpoints, reporter: Reporter) -> float:
        """Take the steps of the loop, and leave a model of plain Linears."""
        model, spec = alignment.model, alignment.spec
        output = model.get_output_embeddings()
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        paths = [path for path, linear in linears.items() if linear is not output]
        del linears  # which are let go of one by one
        resumed = checkpoints.latest()
        method = Loqt(self.settings, self.quantization, alignment.fingerprint, FIELD, trains_output=False)
        buffers = None if resumed is None else buffers_of(resumed)
        attached = method.attach(model, paths, alignment.data.num_steps(spec), buffers)
        last = train(Training(model, attached, spec, alignment.data, attached), checkpoints, resumed, reporter)
        attached.settle()
        return last.loss
