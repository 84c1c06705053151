"""A checkpoint directory as it lies on disk: which files it must have, which it must not, and which hold the weights.

Reads names and JSON, never tensors; knows nothing of models. Runs on whichever thread loads the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from motley_bases.errors import UnreadableBaseError

EMBEDDED_BASES = ("tiny",)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"})


def find_base(name: str) -> Path:
    """Turn what `--base` says into a directory that holds a base's config, whether or not its weights lie there.

    Raises: UnreadableBaseError if there is no such directory, or it is an adapter's, or has no config.
    """
    try:
        directory = Path(__file__).parent / "assets" / name if name in EMBEDDED_BASES else Path(name).expanduser()
        is_there = directory.is_dir()
    except (OSError, RuntimeError) as error:  # a name longer than names may be, or ~ of nobody
        raise _unreadable(f"no base at {name[:100]}: {error}", "NO_SUCH_BASE") from error
    if not is_there:
        known = ", ".join(EMBEDDED_BASES)
        raise _unreadable(f"no base at {directory}: neither a directory nor an embedded base ({known})", "NO_SUCH_BASE")
    if (directory / "adapter_config.json").exists():
        raise _unreadable(f"{directory} is an adapter (it has adapter_config.json), not a base", "IS_AN_ADAPTER")
    read_config(directory)
    return directory


def resolve_base(name: str) -> Path:
    """Turn what `--base` says into the directory of a readable checkpoint.

    Raises: UnreadableBaseError if there is no such directory, or a file that every checkpoint needs is missing from it.
    """
    directory = find_base(name)
    weight_files(directory)
    if not (directory / TOKENIZER_FILE).is_file():
        raise _unreadable(f"{directory} has no {TOKENIZER_FILE}: only fast tokenizers are read", "NO_TOKENIZER")
    return directory


def read_config(directory: Path) -> Mapping[str, object]:
    """Read config.json as it is stored."""
    return _read_object(directory / "config.json", "NO_CONFIG")


def read_generation_config(directory: Path) -> Mapping[str, object] | None:
    """Read generation_config.json as it is stored; None if the checkpoint has none."""
    path = directory / "generation_config.json"
    return _read_object(path, "NO_CONFIG") if path.exists() else None


def has_weights(directory: Path) -> bool:
    """Tell whether weights lie in a directory."""
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that hold the weights, sorted by name.

    Raises: UnreadableBaseError if there are none, naming the pickled files found instead, or if the index points
    outside the directory or to nothing.
    """
    if (directory / SINGLE_FILE).is_file():
        return (directory / SINGLE_FILE,)
    if not (directory / INDEX_FILE).is_file():
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise _unreadable(
                f"{directory} holds pickled weights ({', '.join(pickled)}), which can run code: convert to safetensors",
                "PICKLED_WEIGHTS",
            )
        raise _unreadable(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}", "NO_WEIGHTS")
    weight_map = _read_object(directory / INDEX_FILE, "NO_WEIGHTS").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _unreadable(f"{directory / INDEX_FILE} has no weight_map", "BROKEN_INDEX")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _unreadable(f"{INDEX_FILE} names {name!r}, not a safetensors file beside it", "BROKEN_INDEX")
        if not (directory / name).is_file():
            raise _unreadable(f"{INDEX_FILE} names {name}, which is missing", "MISSING_SHARD")
    return tuple(directory / name for name in names)


def _read_object(path: Path, missing_reason: str) -> Mapping[str, object]:
    if not path.is_file():
        raise _unreadable(f"{path.parent} has no {path.name}", missing_reason)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(f"{path} cannot be read: {error.strerror}", "BROKEN_JSON") from error
    except (ValueError, RecursionError) as error:  # the latter where lists lie in lists, thousands deep
        raise _unreadable(f"{path} is not JSON: {error}", "BROKEN_JSON") from error
    if not isinstance(content, dict):
        raise _unreadable(f"{path} is not a JSON object", "BROKEN_JSON")
    return content


def _unreadable(message: str, reason: str) -> UnreadableBaseError:
    return UnreadableBaseError(message, reason=reason)
