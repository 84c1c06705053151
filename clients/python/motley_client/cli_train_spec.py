"""The spec that the flags of `motley train submit` make.

Owns that none of them is ignored: one that the method leaves no room for is refused by name. Knows no server, and
loads no gRPC.
"""

from __future__ import annotations

import typer

from motley_client.cli_train_flags import TrainingFlags
from motley_client.cli_train_settings import settings_of
from motley_client.cli_transfers import read_label
from motley_client.types_training_spec import Gate, OptimizerSettings, PublishSettings, TrainingSpec


def spec_of(flags: TrainingFlags) -> TrainingSpec:
    """Make the spec that flags say, but for the data.

    Raises: typer.BadParameter for a flag that is missing, or for which the method has no room.
    """
    if flags.adapter is None or flags.method is None:
        raise typer.BadParameter("name --adapter and --method, or say everything by --spec")
    if flags.steps is not None and flags.epochs is not None:
        raise typer.BadParameter("choose one of --steps and --epochs")
    if flags.keep_aliases and flags.alias:
        raise typer.BadParameter("choose one of --alias and --keep-aliases")
    optimizer = OptimizerSettings(flags.lr, flags.schedule, flags.warmup)
    gate = Gate(max_loss_ratio=flags.max_loss_ratio, min_exact_match=flags.min_exact_match)
    labels = dict(read_label(text) for text in flags.label or ())
    return TrainingSpec(
        dataset="",
        settings=settings_of(flags.method, flags),
        publish=PublishSettings(flags.adapter, tuple(flags.alias or ()), labels, flags.keep_aliases),
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
