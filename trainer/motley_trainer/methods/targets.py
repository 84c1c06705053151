"""Which Linears of a base the names in a method's settings mean.

Facts of the base alone, no model. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from motley_bases.spec import BaseSpec

from motley_trainer.errors import SettingsError


def named_linears(names: Sequence[str], spec: BaseSpec, field: str) -> list[str]:
    """Return the paths of the Linears that names mean, in the base's order; without names, of all but lm_head.

    Semantics: a name means every Linear whose path ends with it at a dot, a whole path that one alone.
    Raises: SettingsError with reason NO_SUCH_MODULE and the field, for a name that means none.
    """
    if not names:
        return [path for path in spec.linears if path != spec.lm_head_path]
    refuse_idle(names, spec.linears, field, f"no Linear of {spec.name}")
    return [path for path in spec.linears if longest_key(path, names) is not None]


def longest_key(path: str, keys: Iterable[str]) -> str | None:
    """Return the longest key that means a Linear, None if none does."""
    return max((key for key in keys if _means(key, path)), key=len, default=None)


def refuse_idle(keys: Iterable[str], paths: Iterable[str], field: str, none_of_them: str) -> None:
    """Refuse a key that means none of these Linears.

    Raises: SettingsError with reason NO_SUCH_MODULE and the field.
    """
    paths = tuple(paths)
    for key in keys:
        if not any(_means(key, path) for path in paths):
            names = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            message = f"{field} has {key!r}, which names {none_of_them}; there are {names}"
            raise SettingsError(message, reason="NO_SUCH_MODULE", field=field)


def check_rank(rank: int, path: str, spec: BaseSpec, field: str) -> None:
    """Refuse a rank that a Linear's weight cannot have.

    Raises: SettingsError with reason RANK_TOO_LARGE and the field.
    """
    smaller = min(spec.linears[path])
    if rank > smaller:
        message = f"{field} {rank} is more than the smaller side of {path}, which is {smaller}"
        raise SettingsError(message, reason="RANK_TOO_LARGE", field=field)


def _means(key: str, path: str) -> bool:
    return path == key or path.endswith(f".{key}")
