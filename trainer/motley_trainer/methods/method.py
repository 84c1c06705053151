"""What a training method is to the loop: it puts trainable parameters into a base, and writes them as an adapter.

The loop, the checkpoints and the evaluation know nothing more of a method than this. All of it runs on the thread that
owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch
from motley_trainer.methods.loram_copy import PrunedCopy


@dataclass(frozen=True, eq=False, slots=True)
class Context:
    """What a method may look at when it attaches.

    Semantics: `calibration(n)` are the first n training samples in the order of the data, or all if there are fewer, on
    the model's device. `adapters` are the directories of the adapters that the settings name, in their order. `copy` is
    what is trained on in the place of the base, where something is. `on_part` is called before each part of what takes
    long, with what that is, how many parts are done and how many there are; what it raises ends the attaching.
    `spectra` is a directory in which those of the base's weights are kept over jobs, where something keeps them.
    """

    spec: BaseSpec
    seed: int
    calibration: Callable[[int], Sequence[Batch]]
    adapters: Sequence[Path] = ()
    copy: PrunedCopy | None = None
    on_part: Callable[[str, int, int], None] = lambda what, done, total: None
    spectra: Path | None = None


class Trained(Protocol):
    """Parameters inside a model that steps are taken with.

    Semantics: `parameters` are all that is trained, by names and in an order that depend on the spec and the base
    alone; everything else of the model is frozen. The model itself stays as it is served, in evaluation mode; a module
    that owns one of the parameters is in training mode while a step is taken.
    """

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained."""

    def buffers(self) -> Mapping[str, Tensor]:
        """Return what else a resumed run must have as it is now; kept in each checkpoint."""

    def extra_loss(self, batch: Batch) -> Tensor | None:
        """Return what is added to the loss of the forward pass just made over a batch, if anything.

        Semantics: asked once after each forward pass that is trained on, and after no other.
        """

    def report(self) -> Mapping[str, object]:
        """Return what a checkpoint tells beside its step, since the last one: events' bodies by their names.

        Semantics: asked once more when a run goes on from a checkpoint, for what may not have been told of it.
        """


class Renewal(Protocol):
    """What some steps do to the parameters, beside learning: they may begin anew from a step's gradient."""

    @property
    def is_renewing(self) -> bool:
        """Tell whether the step that has begun does."""

    def begin_step(self, step: int, num_batches: int) -> Collection[nn.Parameter]:
        """Learn that so many forward and backward passes of a step come, and return whose moments begin anew.

        Semantics: the first step is 0. Moments that nobody needs any more are let go before the passes.
        """

    def end_backward(self) -> None:
        """Act on the gradients of the step, before they are clipped."""


class NoRenewal:
    """Every step learns and does nothing else."""

    is_renewing = False

    def begin_step(self, step: int, num_batches: int) -> Collection[nn.Parameter]:
        """Keep all moments."""
        return ()

    def end_backward(self) -> None:
        """Do nothing."""


class Attached(Trained, Protocol):
    """A method's parameters inside a model."""

    def write(self, directory: Path, provenance: Mapping[str, object]) -> str:
        """Write the adapter's directory, with `provenance` and `facts` in its manifest, and return its digest."""

    def facts(self) -> Mapping[str, object]:
        """Return numbers for people: how many parameters, which channels."""

    def disabled(self) -> AbstractContextManager[None]:
        """Make the model the base alone for a while."""


class Method(Protocol):
    """A way to train."""

    def attach(self, model: PreTrainedModel, context: Context, resumed: Mapping[str, Tensor] | None) -> Attached:
        """Put the method's parameters into a model whose own are all frozen.

        Semantics: `resumed` are the buffers of a checkpoint, whose parameters are copied in afterwards; nothing is
        chosen anew.
        Raises: TrainerError for settings that do not fit this base.
        """
