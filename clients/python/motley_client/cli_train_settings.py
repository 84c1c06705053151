"""What the flags of `motley train submit` say of a method: its settings, or which of them it has no room for.

Knows no server, and loads no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import typer

from motley_client.cli_train_flags import FACTORS, GOAT, LORA, LORAM, S2FT, TrainingFlags
from motley_client.types_training_methods import (
    GoatSettings,
    LoramAlignment,
    LoramSettings,
    LoraSettings,
    MethodSettings,
    S2ftSettings,
    TrainingMethod,
)

_PANELS: Mapping[TrainingMethod, tuple[str, ...]] = MappingProxyType({
    TrainingMethod.LORA: (FACTORS, LORA),
    TrainingMethod.S2FT: (S2FT,),
    TrainingMethod.GOAT: (FACTORS, GOAT),
    TrainingMethod.LORAM: (FACTORS, LORA, LORAM),
})  # fmt: skip


def settings_of(method: TrainingMethod, flags: TrainingFlags) -> MethodSettings:
    """Return the settings that flags say of a method; the data to align on has no digest yet.

    Raises: typer.BadParameter for a flag that is another method's, or says nothing without one that is missing.
    """
    others = {panel for panels in _PANELS.values() for panel in panels} - set(_PANELS[method])
    strangers = flags.said(*others)
    if strangers:
        raise typer.BadParameter(f"--method {method.value} has no {' and no '.join(strangers)}")
    return _MADE_BY[method](flags)


def _lora(flags: TrainingFlags) -> LoraSettings:
    return LoraSettings(
        rank=flags.rank,
        alpha=flags.alpha,
        use_rslora=flags.rslora,
        target_modules=tuple(flags.target or ()),
        dropout=flags.dropout,
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


def _goat(flags: TrainingFlags) -> GoatSettings:
    return GoatSettings(
        rank=flags.rank,
        experts=flags.experts,
        top_k=flags.top_k,
        rho=flags.rho,
        segments=flags.segments,
        scale=flags.scale,
        eta=flags.eta,
        rank_for_scale=flags.rank_for_scale,
        alpha=flags.alpha,
        balance_loss=flags.balance_loss,
        dropout=flags.dropout,
        target_modules=tuple(flags.target or ()),
    )


def _loram(flags: TrainingFlags) -> LoramSettings:
    return LoramSettings(
        lora=_lora(flags),
        pruning=flags.pruning,
        ratio=flags.ratio or "",
        layers=flags.layers or "",
        pattern=flags.pattern or "",
        same_cut_as=flags.same_cut_as or "",
        alignment=_alignment(flags),
    )


def _alignment(flags: TrainingFlags) -> LoramAlignment | None:
    alignment = LoramAlignment("", flags.align_steps, flags.align_learning_rate, flags.align_batch_size)
    if flags.align_with is not None:
        return alignment
    if alignment != LoramAlignment(""):
        said = [flag for flag in flags.said(LORAM) if flag.startswith("--align-")]
        raise typer.BadParameter(f"name the text to align on by --align-with, or leave out {' and '.join(said)}")
    return None


_MADE_BY: Mapping[TrainingMethod, Callable[[TrainingFlags], MethodSettings]] = MappingProxyType({
    TrainingMethod.LORA: _lora,
    TrainingMethod.S2FT: _s2ft,
    TrainingMethod.GOAT: _goat,
    TrainingMethod.LORAM: _loram,
})  # fmt: skip
