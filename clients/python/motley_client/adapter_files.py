"""The files of an adapter on the client's disk: which are sent, and which directories are refused.

Owns the names that an adapter's files may have. Knows nothing of channels. Everything blocks; whoever must not, runs
it on a thread.
"""

from __future__ import annotations

from pathlib import Path

from motley_client.errors import InvalidArgumentError

FILE_NAMES = (
    "adapter_config.json",
    "motley_manifest.json",
    "prune_manifest.json",
    "goat_residual.safetensors",
    "adapter_model.safetensors",
)

_PICKLE = "adapter_model.bin"


def find_files(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory that make an adapter; whatever else lies there is left out.

    Raises: InvalidArgumentError (reason=NO_ADAPTER_FILES, NOT_A_FILE or PICKLED_TENSORS) for what is refused; OSError.
    """
    found = []
    for name in FILE_NAMES:
        path = directory / name
        if path.is_symlink():
            raise _refusal(f"{path} is a symbolic link: copy the directory with its files (cp -rL)", "NOT_A_FILE")
        if path.is_file():
            found.append(path)
        elif path.exists():
            raise _refusal(f"{path} is no file", "NOT_A_FILE")
    if directory / "adapter_model.safetensors" not in found and (directory / _PICKLE).exists():
        hint = "a pickle can run code where it is read: save the adapter as safetensors (safe_serialization=True)"
        raise _refusal(f"{directory / _PICKLE}: {hint}", "PICKLED_TENSORS")
    if not found:
        raise _refusal(f"{directory} holds none of {', '.join(FILE_NAMES)}", "NO_ADAPTER_FILES")
    return tuple(found)


def _refusal(message: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field="directory")
