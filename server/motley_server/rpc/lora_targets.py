"""Which Linears of the base the settings of a job mean, and whether the ranks of a LoRA fit there.

A name means every Linear whose path it ends at a dot; a full path means one. Pure checks; run on the event loop's
thread, so that a list may be long, but not what is done for each of its items.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.rpc.training_bounds import POSITIVE, RANK, Bounds, wrong

Sides = tuple[int, int]

MAX_NAMES: Final = 1024
MAX_SHOWN: Final = 140  # characters
DEFAULT_RANK: Final = 8


def check_targets(
    settings: training_pb2.LoraSettings, base: BaseSpec, field: str, sides: Mapping[str, Sides] | None = None
) -> None:
    """Refuse names that mean nothing, and ranks that are larger than a Linear's smaller side.

    Semantics: `field` is the path of the settings below `spec`. `sides` are those that the Linears have in training, by
    path, where that is not the base's own.
    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, UNKNOWN_TARGET or RANK_TOO_LARGE) with the field below `spec`.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        _check_number(getattr(settings, name), f"{field}.{name}")
    targets = targets_of(settings.target_modules, base, field)
    meant = _by_name(base)
    _check_pattern(f"{field}.rank_pattern", settings.rank_pattern, RANK, meant, targets)
    _check_pattern(f"{field}.alpha_pattern", settings.alpha_pattern, POSITIVE, meant, targets)
    for path in sorted(targets):
        _check_rank(settings, path, field, base.linears[path], (sides or base.linears)[path])


def targets_of(names: Sequence[str], base: BaseSpec, field: str) -> Collection[str]:
    """Return the Linears that names mean, by path; without any, all of the layers.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE or UNKNOWN_TARGET); `field` is the path of the settings.
    """
    where = f"{field}.target_modules"
    _check_number(names, where)
    meant = _by_name(base)
    targets: set[str] = set()
    for index, name in enumerate(names):
        if name not in meant:
            message = f"{name[:MAX_SHOWN]!r} means no Linear of {base.name}; {_known(base)}"
            raise wrong("UNKNOWN_TARGET", f"{where}[{index}]", message)
        targets.update(meant[name])
    return targets or {path for path in base.linears if path != base.lm_head_path}


def _check_number(items: Sized, field: str) -> None:
    if len(items) > MAX_NAMES:
        raise wrong("OUT_OF_RANGE", field, f"{len(items)} items; {MAX_NAMES} are allowed")


def _check_pattern(
    field: str,
    pattern: Mapping[str, float],
    allowed: Bounds,
    meant: Mapping[str, Collection[str]],
    targets: Collection[str],
) -> None:
    for name, value in sorted(pattern.items()):
        where = f"{field}[{name[:MAX_SHOWN]}]"
        if not allowed.allow(value):
            raise wrong("OUT_OF_RANGE", where, f"{value:g} is not {allowed}")
        if not any(path in targets for path in meant.get(name, ())):
            raise wrong("UNKNOWN_TARGET", where, f"{name[:MAX_SHOWN]!r} means no Linear that is trained")


def _check_rank(settings: training_pb2.LoraSettings, path: str, field: str, whole: Sides, left: Sides) -> None:
    """Check the rank that a Linear has: of the longest name in the pattern that means it, or the common one."""
    name = next((ending for ending in _endings(path) if ending in settings.rank_pattern), None)
    if name is not None:
        rank, where = settings.rank_pattern[name], f"rank_pattern[{name}]"
    else:
        rank, where = (settings.rank if settings.HasField("rank") else DEFAULT_RANK), "rank"
    if rank > min(left):
        has = "has" if min(left) == min(whole) else "once it is pruned has"
        message = f"rank {rank} is more than the smaller side of {path}, which {has} {min(left)}"
        raise wrong("RANK_TOO_LARGE", f"{field}.{where}", message)


def _by_name(base: BaseSpec) -> dict[str, list[str]]:
    """Return which Linears each name means that means any."""
    meant: dict[str, list[str]] = {}
    for path in base.linears:
        for ending in _endings(path):
            meant.setdefault(ending, []).append(path)
    return meant


def _endings(path: str) -> list[str]:
    """Return a path and what follows each of its dots, the longest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _known(base: BaseSpec) -> str:
    names = sorted({path.rpartition(".")[2] for path in base.linears})
    return f"its Linears are called {', '.join(names[:16])}" if names else "it has none"
