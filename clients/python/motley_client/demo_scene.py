"""What `motley demo` shows: a base, whole or pruned for the occasion, and adapters that fit it.

Owns which adapters are shown over which base, and where their files are found or made. Making them is the business of
`motley base`: nothing of the roots that do it is imported. Runs on the caller's event loop.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motley_client.demo_child import DemoError, run_base, run_each_base

DIGEST_DIGITS = 8  # that a reader can tell apart at a glance

AdapterSet = tuple[tuple[str, float], ...]  # what a request wears: names and weights; none is the base alone

# Embedded adapters, named for their skills: one of each kind, and those that can be cut to a pruned copy.
KINDS = {"next": "lora", "unvowel": "s2ft", "rotate": "goat", "previous": "loram"}
KINDS_ON_PRUNED = {"next": "lora", "unvowel": "s2ft", "reverse": "lora", "swap": "lora"}
FUSION: AdapterSet = (("next", 0.9), ("unvowel", 0.9))

# Of the fourth layer one of two key-value heads, with the query heads that read it, and half of the FFN channels: the
# adapters above hardly notice, but that `reverse` misses a word now and then. Without either head of the first layer
# hardly anything is right, and with the fifth layer cut as well `reverse` misses more.
PRUNING = ("--ratio", "1/2", "--layers", "3:4", "--windows", "64")


@dataclass(frozen=True, slots=True)
class Scene:
    """A base and its adapters, ready to be served.

    Semantics: `kinds` by the adapters' names, in the order in which they are shown; `fusion` is of some of them;
    `base_fingerprint` is that of the base that has to answer, None where it is not known beforehand.
    """

    summary: str
    kinds: Mapping[str, str]
    fusion: AdapterSet
    server_arguments: tuple[str, ...]
    base_fingerprint: str | None = None


def whole_scene(quantize: str | None) -> Scene:
    """Set the embedded base, held as `quantize` says, with an adapter of each kind.

    Raises: DemoError, naming the adapters that are missing.
    """
    folders = find_adapters(KINDS)
    return Scene(
        summary=f"the tiny base{_held(quantize)} and {len(folders)} adapters, one of each kind",
        kinds=KINDS,
        fusion=FUSION,
        server_arguments=server_arguments("tiny", folders, quantize),
    )


async def pruned_scene(folder: Path, quantize: str | None, tell: Callable[[str], None]) -> Scene:
    """Prune the embedded base into `folder`, cut adapters of it to what is left, and set these.

    Semantics: `tell` gets a line when the work begins, and one on what pruning left.
    Raises: DemoError if files are missing, or with what a child says that could not do its part.
    """
    adapters, calibration, copy = find_adapters(KINDS_ON_PRUNED), find_calibration(), folder / "tiny-pruned"
    tell(f"pruning the tiny base, and cutting {len(adapters)} of its adapters to what is left ...")
    printed = await run_base("prune", "tiny", *PRUNING, "--calibration", str(calibration), "--out", str(copy), "--json")
    made = json.loads(printed)
    before, after, fingerprint = made["num_parameters_before"], made["num_parameters_after"], made["fingerprint"]
    tell(f"{before:,} parameters became {after:,} ({after / before:.1%}): a base of its own, {shorten(fingerprint)}")
    cut = [folder / adapter.name for adapter in adapters]
    await run_each_base(
        ("restrict", str(adapter), "--original", "tiny", "--pruned", str(copy), "--out", str(out))
        for adapter, out in zip(adapters, cut, strict=True)
    )
    return Scene(
        summary=f"this base{_held(quantize)} and {len(cut)} adapters of the whole one",
        kinds=KINDS_ON_PRUNED,
        fusion=FUSION,
        server_arguments=server_arguments(str(copy), cut, quantize),
        base_fingerprint=fingerprint,
    )


def find_adapters(names: Mapping[str, str]) -> list[Path]:
    """List the folders of the embedded adapters of these names, without importing anything of theirs.

    Raises: DemoError, naming those that are missing.
    """
    found = {name: _find_asset("motley_adapters", name, "adapter_model.safetensors") for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        raise DemoError(f"there are no embedded adapters {', '.join(missing)} to show a mixed batch with")
    return [path.parent for path in found.values() if path is not None]


def find_calibration() -> Path:
    """Return the text that the embedded base is pruned on, without importing anything of the bases.

    Raises: DemoError if it is missing.
    """
    path = _find_asset("motley_bases", "calibration.txt")
    if path is None:
        raise DemoError("there is no embedded calibration text to prune the tiny base on")
    return path


def server_arguments(base: str, folders: Sequence[Path], quantize: str | None = None) -> tuple[str, ...]:
    """Return what to tell `motley serve`: the base, adapters by the names of their folders, and how it is held."""
    adapters = (part for folder in folders for part in ("--adapter", f"{folder.name}={folder}"))
    return "--base", base, *adapters, *(() if quantize is None else ("--quantize", quantize))


def shorten(digest: str) -> str:
    """Shorten a digest or a fingerprint to what a reader compares."""
    return digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def _find_asset(package: str, *parts: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    roots = [] if spec is None else spec.submodule_search_locations or []
    paths = (Path(root, "assets", "tiny", *parts) for root in roots)
    return next((path for path in paths if path.is_file()), None)


def _held(quantize: str | None) -> str:
    return "" if quantize is None else f" in {quantize}"
