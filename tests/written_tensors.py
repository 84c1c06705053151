"""What lies in the tensor files that an adapter is written as."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


def tensor_bytes(directory: Path) -> int:
    """Count the bytes of all tensors in a directory, without their files' headers."""
    files = [load_file(path) for path in directory.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())
