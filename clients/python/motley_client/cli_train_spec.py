"""The spec that the flags of `motley train submit` make.

Owns that none of them is ignored: one that the method leaves no room for is refused by name. Knows no server, and
loads no gRPC.
"""

from __future__ import annotations

import typer

from motley_client.cli_train_flags import PUBLISHING, TrainingFlags
from motley_client.cli_train_settings import settings_of
from motley_client.cli_transfers import read_label
from motley_client.types_training_methods import TrainingMethod
from motley_client.types_training_spec import Gate, OptimizerSettings, PublishSettings, TrainingSpec


def spec_of(flags: TrainingFlags) -> TrainingSpec:
    """Make the spec that flags say, but for the data.

    Raises: typer.BadParameter for a flag that is missing, or for which the method has no room.
    """
    makes_base = flags.method is TrainingMethod.LOQT
    if flags.method is None or (flags.adapter is None and not makes_base):
        raise typer.BadParameter("name --adapter and --method, or say everything by --spec")
    if makes_base and (strangers := flags.said(PUBLISHING)):
        raise typer.BadParameter(f"--method loqt makes a base, and has no {' and no '.join(strangers)}")
    if flags.steps is not None and flags.epochs is not None:
        raise typer.BadParameter("choose one of --steps and --epochs")
    if flags.keep_aliases and flags.alias:
        raise typer.BadParameter("choose one of --alias and --keep-aliases")
    optimizer = OptimizerSettings(flags.lr, flags.schedule, flags.warmup)
    gate = Gate(max_loss_ratio=flags.max_loss_ratio, min_exact_match=flags.min_exact_match)
    return TrainingSpec(
        dataset="",
        settings=settings_of(flags.method, flags),
        publish=_publishing(flags.adapter, flags),
        quantization=flags.quantization,
        steps=flags.steps,
        epochs=flags.epochs,
        batch_size=flags.batch_size,
        micro_batch_size=flags.micro_batch_size,
        max_length=flags.max_length,
        over_length=flags.over_length,
        seed=flags.seed or 0,
        checkpoint_steps=flags.checkpoint_steps,
        optimizer=None if optimizer == OptimizerSettings() else optimizer,
        gate=None if gate == Gate() else gate,
    )


def _publishing(adapter: str | None, flags: TrainingFlags) -> PublishSettings | None:
    """Return what is published; None for a job that makes a base."""
    if adapter is None:
        return None
    labels = dict(read_label(text) for text in flags.label or ())
    return PublishSettings(adapter, tuple(flags.alias or ()), labels, flags.keep_aliases)
