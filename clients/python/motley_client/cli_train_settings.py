"""What the flags of `motley train submit` say of a method: its settings, or which of them it has no room for.

Knows no server, and loads no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

import typer

from motley_client.cli_train_flags import FACTORS, GOAT, LOQT, LORA, LORAM, RANK, S2FT, START, TrainingFlags
from motley_client.types_training_methods import (
    GoatSettings,
    LoqtSettings,
    LoqtStart,
    LoramAlignment,
    LoramSettings,
    LoraSettings,
    MethodSettings,
    S2ftSettings,
    TrainingMethod,
)

SCRATCH = "scratch"
"""What `--from` says for weights that are drawn."""

_Settings = TypeVar("_Settings", bound=Any)

_PANELS: Mapping[TrainingMethod, tuple[str, ...]] = MappingProxyType({
    TrainingMethod.LORA: (RANK, FACTORS, LORA),
    TrainingMethod.S2FT: (S2FT,),
    TrainingMethod.GOAT: (RANK, FACTORS, GOAT),
    TrainingMethod.LORAM: (RANK, FACTORS, LORA, LORAM, LOQT),
    TrainingMethod.LOQT: (RANK, START, LOQT),
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


def _same(kind: type[_Settings], flags: TrainingFlags, **other: object) -> _Settings:
    """Make settings of what the flags of their own names say, and of what is given here."""
    names = {one.name for one in fields(TrainingFlags)} - set(other)
    said = {one.name: getattr(flags, one.name) for one in fields(kind) if one.name in names}
    made: _Settings = kind(**said | other)
    return made


def _lora(flags: TrainingFlags) -> LoraSettings:
    return _same(LoraSettings, flags, use_rslora=flags.rslora, target_modules=tuple(flags.target or ()))


def _s2ft(flags: TrainingFlags) -> S2ftSettings:
    return _same(S2ftSettings, flags, disjoint_from=tuple(flags.disjoint_from or ()))


def _goat(flags: TrainingFlags) -> GoatSettings:
    return _same(GoatSettings, flags, target_modules=tuple(flags.target or ()))


def _loram(flags: TrainingFlags) -> LoramSettings:
    texts = {name: getattr(flags, name) for name in ("ratio", "layers", "pattern", "same_cut_as")}
    empty = [f"--{name.replace('_', '-')}" for name, text in texts.items() if text == ""]
    if empty:
        raise typer.BadParameter(f"{' and '.join(empty)} says nothing: give it a value, or leave it out")
    texts = {name: text or "" for name, text in texts.items()}
    return _same(LoramSettings, flags, lora=_lora(flags), alignment=_alignment(flags), **texts)


def _loqt(flags: TrainingFlags) -> LoqtSettings:
    start = None if flags.start is None else LoqtStart.SCRATCH if flags.start == SCRATCH else LoqtStart.BASE
    return _same(LoqtSettings, flags, start=start, scale=flags.factor_scale, schedule=flags.merge_schedule)


def _alignment(flags: TrainingFlags) -> LoramAlignment | None:
    """Return how the copy is aligned, None if it is not."""
    if flags.align_with is None:
        said = [flag for flag in flags.said(LORAM) if flag.startswith("--align-")]
        if said:
            raise typer.BadParameter(f"name the text to align on by --align-with, or leave out {' and '.join(said)}")
    idle = [*flags.said(LOQT), *(["--align-rank"] if flags.align_rank is not None else [])]
    if idle and not flags.align_by_loqt:
        raise typer.BadParameter(f"say --align-by-loqt too, or leave out {' and '.join(idle)}")
    if flags.align_with is None:
        return None
    loqt = replace(_loqt(flags), rank=flags.align_rank) if flags.align_by_loqt else None
    return LoramAlignment("", flags.align_steps, flags.align_learning_rate, flags.align_batch_size, loqt)


_MADE_BY: Mapping[TrainingMethod, Callable[[TrainingFlags], MethodSettings]] = MappingProxyType({
    TrainingMethod.LORA: _lora,
    TrainingMethod.S2FT: _s2ft,
    TrainingMethod.GOAT: _goat,
    TrainingMethod.LORAM: _loram,
    TrainingMethod.LOQT: _loqt,
})  # fmt: skip
