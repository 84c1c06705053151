"""The flags that say how a job trains, and the spec that they make.

Owns how those flags are called (scripts rely on it), and that none is ignored: one that the method or `--spec` leaves
no room for is refused by name. Knows no server, and loads no gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from motley_client.cli_transfers import read_label
from motley_client.types_training_spec import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    Gate,
    LearningRateSchedule,
    LoraSettings,
    OptimizerSettings,
    OverLength,
    PublishSettings,
    S2ftSettings,
    TrainingMethod,
    TrainingSpec,
)

_PUBLISHING, _STEPS, _LORA, _S2FT = "What becomes of it", "How it trains", "Of --method lora", "Of --method s2ft"


def _flag(help: str, panel: str, metavar: str | None = None, name: str | None = None) -> Any:
    names = [] if name is None else [name]
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True, slots=True)
class TrainingFlags:
    """What was said of a job; None, empty and False are what nobody said."""

    adapter: Annotated[str | None, _flag("The adapter that gets a new version.", _PUBLISHING, "NAME")] = None
    alias: Annotated[
        list[str] | None, _flag("Point it at the version, not `default`; may be repeated.", _PUBLISHING, "ALIAS")
    ] = None
    keep_aliases: Annotated[
        bool, _flag("Point no alias at it: NAME@N alone means it.", _PUBLISHING, name="--keep-aliases")
    ] = False
    label: Annotated[list[str] | None, _flag("Label the version; may be repeated.", _PUBLISHING, "KEY=VALUE")] = None
    eval: Annotated[
        str | None, _flag("Measure on this data, as DATA is given; else a part of DATA.", _PUBLISHING, "FILE")
    ] = None
    max_loss_ratio: Annotated[
        float | None, _flag("Publish if the loss is at most X times what it was (1).", _PUBLISHING, "X")
    ] = None
    min_exact_match: Annotated[
        float | None, _flag("Publish if this share of answers is exactly right.", _PUBLISHING, "X")
    ] = None
    method: Annotated[TrainingMethod | None, _flag("How to train, and the adapter's kind.", _STEPS)] = None
    steps: Annotated[int | None, _flag("Steps of the optimizer.", _STEPS, "N")] = None
    epochs: Annotated[float | None, _flag("Passes over the data (3).", _STEPS, "E")] = None
    batch_size: Annotated[int | None, _flag("Samples a step (16).", _STEPS, "N")] = None
    micro_batch_size: Annotated[int | None, _flag("Samples at once (the batch).", _STEPS, "N")] = None
    lr: Annotated[float | None, _flag("The learning rate (2e-4).", _STEPS, "X")] = None
    schedule: Annotated[LearningRateSchedule | None, _flag("How it goes on (linear).", _STEPS)] = None
    warmup: Annotated[int | None, _flag("Steps of warm-up (a tenth, at most 100).", _STEPS, "N")] = None
    max_length: Annotated[int | None, _flag("Tokens of a sample (512).", _STEPS, "N")] = None
    over_length: Annotated[OverLength | None, _flag("What becomes of longer ones (truncate).", _STEPS)] = None
    seed: Annotated[int | None, _flag("The same seed and data give the same adapter (0).", _STEPS, "N")] = None
    quantization: Annotated[str | None, _flag("How to hold the base (as it is served).", _STEPS, "none|nf4")] = None
    checkpoint_steps: Annotated[int | None, _flag("Steps between checkpoints (50).", _STEPS, "N")] = None
    rank: Annotated[int | None, _flag("The rank (8).", _LORA, "R")] = None
    alpha: Annotated[float | None, _flag("The scale, over the rank (twice the rank).", _LORA, "A")] = None
    rslora: Annotated[bool, _flag("Scale by alpha over the rank's root.", _LORA, name="--rslora")] = False
    target: Annotated[
        list[str] | None, _flag("A Linear, by name or path (all of the layers); may be repeated.", _LORA, "NAME")
    ] = None
    o_share: Annotated[float | None, _flag("Share of o_proj's heads (0.05 if none is said).", _S2FT, "X")] = None
    down_share: Annotated[float | None, _flag("Share of down_proj's channels (0.02 likewise).", _S2FT, "X")] = None
    score: Annotated[ChannelScore | None, _flag("How channels are scored (random).", _S2FT)] = None
    order: Annotated[ChannelOrder | None, _flag("Which to take, by score (small).", _S2FT)] = None
    budget: Annotated[ChannelBudget | None, _flag("Of what the shares are (layer).", _S2FT)] = None
    disjoint_from: Annotated[
        list[str] | None, _flag("Take no channel of this adapter; may be repeated.", _S2FT, "NAME")
    ] = None

    def said(self, *panels: str) -> list[str]:
        """Return the flags of these panels, or of all, that were said, by their names."""
        hints = get_type_hints(TrainingFlags, include_extras=True)
        return [
            "--" + one.name.replace("_", "-")
            for one in fields(self)
            if not any(getattr(self, one.name) is nothing for nothing in (None, False))
            and getattr(self, one.name) != []
            and (not panels or hints[one.name].__metadata__[0].rich_help_panel in panels)
        ]


def spec_of(flags: TrainingFlags) -> TrainingSpec:
    """Make the spec that flags say, but for the data.

    Raises: typer.BadParameter for a flag that is missing, or for which the method has no room.
    """
    if flags.adapter is None or flags.method is None:
        raise typer.BadParameter("name --adapter and --method, or say everything by --spec")
    if flags.steps is not None and flags.epochs is not None:
        raise typer.BadParameter("choose one of --steps and --epochs")
    settings: LoraSettings | S2ftSettings
    match flags.method:
        case TrainingMethod.LORA:
            settings, strangers = _lora(flags), flags.said(_S2FT)
        case TrainingMethod.S2FT:
            settings, strangers = _s2ft(flags), flags.said(_LORA)
    if strangers:
        raise typer.BadParameter(f"--method {flags.method.value} has no {' and no '.join(strangers)}")
    if flags.keep_aliases and flags.alias:
        raise typer.BadParameter("choose one of --alias and --keep-aliases")
    optimizer = OptimizerSettings(flags.lr, flags.schedule, flags.warmup)
    gate = Gate(max_loss_ratio=flags.max_loss_ratio, min_exact_match=flags.min_exact_match)
    labels = dict(read_label(text) for text in flags.label or ())
    return TrainingSpec(
        dataset="",
        settings=settings,
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


def _lora(flags: TrainingFlags) -> LoraSettings:
    return LoraSettings(
        rank=flags.rank, alpha=flags.alpha, use_rslora=flags.rslora, target_modules=tuple(flags.target or ())
    )


def _s2ft(flags: TrainingFlags) -> S2ftSettings:
    return S2ftSettings(
        o_share=flags.o_share,
        down_share=flags.down_share,
        score=flags.score,
        order=flags.order,
        budget=flags.budget,
        disjoint_from=tuple(flags.disjoint_from or ()),
    )
