"""Which Linears of the base the settings of a LoRA mean, and whether their ranks fit there.

A name means every Linear whose path it ends at a dot; a full path means one. Pure checks; run on the event loop's
thread, so that a list may be long, but not what is done for each of its items.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Protocol

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.errors import InvalidArgumentError

MAX_NAMES: Final = 1024
MAX_SHOWN: Final = 140  # characters
DEFAULT_RANK: Final = 8


class Allowed(Protocol):
    """Tells what a number may be."""

    def allow(self, value: float) -> bool:
        """Tell whether a number is within."""


def check_targets(settings: training_pb2.LoraSettings, base: BaseSpec, ranks: Allowed, alphas: Allowed) -> None:
    """Refuse names that mean nothing, and ranks that are larger than a Linear's smaller side.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, UNKNOWN_TARGET or RANK_TOO_LARGE) with the field below `spec`.
    """
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        if len(items := getattr(settings, name)) > MAX_NAMES:
            raise _wrong("OUT_OF_RANGE", name, f"{len(items)} items; {MAX_NAMES} are allowed")
    meant = _by_name(base)
    targets: set[str] = set()
    for index, name in enumerate(settings.target_modules):
        if name not in meant:
            message = f"{name[:MAX_SHOWN]!r} means no Linear of {base.name}; {_known(base)}"
            raise _wrong("UNKNOWN_TARGET", f"target_modules[{index}]", message)
        targets.update(meant[name])
    targets = targets or {path for path in base.linears if path != base.lm_head_path}
    _check_pattern("rank_pattern", settings.rank_pattern, ranks, meant, targets)
    _check_pattern("alpha_pattern", settings.alpha_pattern, alphas, meant, targets)
    for path in sorted(targets):
        _check_rank(settings, path, min(base.linears[path]))


def _check_pattern(
    field: str,
    pattern: Mapping[str, float],
    allowed: Allowed,
    meant: Mapping[str, Collection[str]],
    targets: Collection[str],
) -> None:
    for name, value in sorted(pattern.items()):
        where = f"{field}[{name[:MAX_SHOWN]}]"
        if not allowed.allow(value):
            raise _wrong("OUT_OF_RANGE", where, f"{value:g} is not {allowed}")
        if not any(path in targets for path in meant.get(name, ())):
            raise _wrong("UNKNOWN_TARGET", where, f"{name[:MAX_SHOWN]!r} means no Linear that is trained")


def _check_rank(settings: training_pb2.LoraSettings, path: str, smaller_side: int) -> None:
    """Check the rank that a Linear has: of the longest name in the pattern that means it, or the common one."""
    name = next((ending for ending in _endings(path) if ending in settings.rank_pattern), None)
    if name is not None:
        rank, field = settings.rank_pattern[name], f"rank_pattern[{name}]"
    else:
        rank, field = (settings.rank if settings.HasField("rank") else DEFAULT_RANK), "rank"
    if rank > smaller_side:
        message = f"rank {rank} is more than the smaller side of {path}, which has {smaller_side}"
        raise _wrong("RANK_TOO_LARGE", field, message)


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


def _wrong(reason: str, field: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field=f"spec.lora.{field}")
