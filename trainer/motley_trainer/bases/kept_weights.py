"""Whether a pruned copy's weights are those that its manifest says were kept: lists are easily edited, weights are not.

Owns the comparison of the two checkpoints, channel by channel. Reads the keys' and values' rows and those of the FFN's
two inputs, from whose lists all others follow. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from motley_bases.checkpoint import weight_files
from motley_bases.kept_channels import kept_by_path
from motley_bases.loader import load_model
from motley_bases.prune_manifest import PruneManifest
from motley_bases.quantization import NONE
from motley_bases.spec import BaseSpec
from safetensors import safe_open
from torch import Tensor, nn

from motley_trainer.errors import UnsuitableBaseError

FIELDS: Mapping[str, tuple[str, str]] = {
    "kv_heads": ("self_attn.k_proj", "self_attn.v_proj"),
    "ffn_channels": ("mlp.gate_proj", "mlp.up_proj"),
}
NUM_PROBES = 256
# Of a channel with what training, or fewer bits, made of it; on the embedded base that is 0.96 at least, and 0.61 at
# most with another channel.
LEAST_COSINE = 0.75

Read = Callable[[str], Tensor]
"""Gives the weight of the Linear of a path, or what stands for it. Shapes: result [O, N]."""


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A checkpoint that can be read, and what is known of it."""

    directory: Path
    spec: BaseSpec


def check_kept_weights(manifest: PruneManifest, original: StoredBase, pruned: StoredBase) -> None:
    """Refuse a manifest whose lists are not those that the pruned weights were cut by.

    Semantics: where nothing was merged into the copy and neither base is quantized, each of its channels must be
    exactly the one of the original that the manifest names. Elsewhere it must point in nearly the same direction, which
    tells it from any other channel, but not from one that was all but equal.
    Raises: UnsuitableBaseError with reason OTHER_KEPT and the list; UnreadableBaseError with reason OTHER_ORIGINAL or
    PRUNE_MANIFEST as `kept_by_path` does.
    """
    kept = kept_by_path(manifest, original.spec)
    is_exact = manifest.recovery is None and original.spec.quantization == pruned.spec.quantization == NONE
    read_before, read_after = (_reader(base, is_exact=is_exact) for base in (original, pruned))
    for layer, keep in enumerate(manifest.layers):
        for field, names in FIELDS.items() if keep is not None else ():
            indices: Sequence[int] = getattr(keep, field)
            where = f"layers[{layer}].{field}"
            before, after = [], []
            for path in (f"model.layers.{layer}.{name}" for name in names):
                outputs = kept[path].outputs or ()
                whole, cut = read_before(path), read_after(path)
                if len(cut) != len(outputs) or len(whole) <= outputs[-1]:
                    raise _other_kept(where, f"keeps {len(outputs)} rows of {len(whole)} of {path}, not {len(cut)}")
                before.append(whole[torch.tensor(outputs)].reshape(len(indices), -1))
                after.append(cut.reshape(len(indices), -1))
            is_same = _is_same(torch.cat(before, 1), torch.cat(after, 1), is_exact=is_exact)
            if not bool(is_same.all()):
                index = indices[int(is_same.int().argmin())]
                raise _other_kept(where, f"names {index} of {original.spec.name}, and the copy has other weights there")


def _is_same(before: Tensor, after: Tensor, *, is_exact: bool) -> Tensor:
    """Tell of each head or channel whether it is what was kept of the original. Shapes: both [C, N]; result [C]."""
    if is_exact:
        return (before.to(after.dtype) == after).all(1)
    return torch.nn.functional.cosine_similarity(before, after, dim=1) > LEAST_COSINE


def _reader(base: StoredBase, *, is_exact: bool) -> Read:
    """Return what reads a Linear's weight: the rows themselves, or what random inputs become by them.

    Semantics: the second can be had of a quantized weight too, without expanding it, and keeps angles.
    """
    if base.spec.quantization == NONE:
        stored = _StoredWeights(base.directory)
        return stored.read if is_exact else lambda path: _sketch(stored.read(path))
    model = load_model(base.directory, torch.float32, torch.device("cpu"), base.spec.quantization)

    @torch.inference_mode()
    def read(path: str) -> Tensor:
        linear = cast(nn.Linear, model.get_submodule(path))
        products: Tensor = linear(_probes(linear.in_features))
        bias: Tensor = linear(torch.zeros(1, linear.in_features))
        return (products - bias).T

    return read


class _StoredWeights:
    """Single tensors of a checkpoint, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}
        for path in weight_files(directory):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def read(self, path: str) -> Tensor:
        """Return the weight of a Linear.

        Raises: UnsuitableBaseError with reason OTHER_KEPT if it is not stored under any name that it may have.
        """
        for name in (f"{path}.weight", f"{path.removeprefix('model.')}.weight"):
            if name in self._files:
                with safe_open(self._files[name], "pt") as file:
                    weight: Tensor = file.get_tensor(name)
                    return weight
        raise _other_kept("layers", f"cannot be held against {self._directory}: it has no {path}.weight")


def _sketch(weight: Tensor) -> Tensor:
    return weight.float() @ _probes(weight.shape[1]).T


def _probes(num_inputs: int) -> Tensor:
    """Draw the random inputs, the same every time. Shapes: result [NUM_PROBES, I]."""
    return torch.randn(NUM_PROBES, num_inputs, generator=torch.Generator().manual_seed(0))


def _other_kept(name: str, problem: str) -> UnsuitableBaseError:
    field = f"prune_manifest.{name}"
    return UnsuitableBaseError(f"{field} {problem}", reason="OTHER_KEPT", field=field)
