"""The kind `s2ft`: whole channels of a Linear, by number, and the dense block that is added to their weights.

On the input side the block is added to columns of the weight, so a unit gathers those inputs; on the output side it is
added to rows, so a unit scatters to those outputs. The base is never permuted: numbers are those of the original. It
checks against the base's facts alone. Reading blocks; any thread but the event loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from safetensors.torch import save_file
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import TENSOR_FILE, read_tensor_file, refuse_peft_config
from motley_adapters.identity import adapter_digest
from motley_adapters.kinds.checks import check_linear, refuse_others, shape_error, take_tensor
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.spec import Channels, Side
from motley_adapters.tensor_file import FLOATS_AND_INDICES, parse_tensors

KIND = "s2ft"

_FIELD = "motley_manifest.s2ft.modules"


@dataclass(frozen=True, eq=False, slots=True)
class ChannelBlock:
    """What is added to some channels of one Linear's weight.

    Shapes: indices [S] int32, ascending without repetition; weight [O, S] on the input side, [S, I] on the output
    side, in the order of the indices.
    """

    side: Side
    indices: Tensor
    weight: Tensor

    @property
    def unit(self) -> DeltaUnit:
        """Return the unit that computes it, over the same memory."""
        if self.side == "input":
            return DeltaUnit(None, self.weight.T, 1.0, inputs=self.indices)
        return DeltaUnit(self.weight, None, 1.0, outputs=self.indices)

    @property
    def channels(self) -> Channels:
        """Return which channels these are."""
        return Channels(self.side, tuple(self.indices.tolist()))


def read_s2ft(source: KindSource) -> KindContent:
    """Read an S2FT directory.

    Raises: AdapterFormatError for files that are malformed or at odds with each other; AdapterMismatchError for
    modules, channels or shapes that are not the base's. The field is the tensor's name or the manifest's field.
    """
    blocks = read_blocks(source)
    return KindContent(
        units={path: block.unit for path, block in blocks.items()},
        channels={path: block.channels for path, block in blocks.items()},
    )


def read_blocks(source: KindSource) -> dict[str, ChannelBlock]:
    """Read the blocks of an S2FT directory as they are stored; see `read_s2ft`."""
    refuse_peft_config(source.directory, KIND)
    details = source.details(KIND)
    details.allow("modules")
    modules = details.child("modules")
    sides = {path: cast(Side, modules.choice(path, ("input", "output"))) for path in sorted(modules)}
    if not sides:
        raise details.error("INVALID_FIELD", "modules", "names no module")
    tensors = parse_tensors(read_tensor_file(source.directory, source.read), dtypes=FLOATS_AND_INDICES)
    blocks = {path: _block(path, side, tensors, source.base) for path, side in sides.items()}
    refuse_others(tensors, KIND)
    return blocks


def write_s2ft(
    directory: Path,
    base: BaseSpec,
    blocks: Mapping[str, ChannelBlock],
    *,
    dtype: torch.dtype | None = torch.float32,
    trained_on: str | None = None,
    provenance: Mapping[str, object] | None = None,
) -> str:
    """Write an S2FT directory for a base and return the adapter's digest; the manifest comes last.

    Semantics: without a `dtype` each block is stored in its own; without `trained_on` that is the base as well.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = {path: ChannelBlock(b.side, b.indices, b.weight.detach().to(dtype)) for path, b in sorted(blocks.items())}
    tensors = {}
    for path, block in stored.items():
        tensors[f"{path}.s2_idx"] = block.indices.to(torch.int32).contiguous()
        tensors[f"{path}.s2_weight"] = block.weight.contiguous()
    save_file(tensors, directory / TENSOR_FILE)
    digest = adapter_digest(KIND, {path: block.unit for path, block in stored.items()})
    details = {"modules": {path: block.side for path, block in stored.items()}}
    declared = Manifest(KIND, trained_on or base.fingerprint, base.fingerprint, digest)
    write_manifest(directory, declared, details, provenance)
    return digest


def _block(path: str, side: Side, tensors: dict[str, Tensor], base: BaseSpec) -> ChannelBlock:
    inputs, outputs = check_linear(path, base, f"{_FIELD}.{path}", KIND)
    if path == base.lm_head_path:
        message = f"{path} gives the logits, and the kind {KIND} adapts Linears inside the layers"
        raise AdapterMismatchError(message, reason="WRONG_MODULE_KIND", field=f"{_FIELD}.{path}")
    indices = take_tensor(tensors, f"{path}.s2_idx", (torch.int32,))
    check_channels(f"{path}.s2_idx", indices, inputs if side == "input" else outputs)
    name = f"{path}.s2_weight"
    weight = take_tensor(tensors, name)
    expected = (outputs, len(indices)) if side == "input" else (len(indices), inputs)
    channel_axis = 1 if side == "input" else 0
    if weight.ndim != 2 or weight.shape[1 - channel_axis] != expected[1 - channel_axis]:
        raise shape_error(name, expected, weight)
    if weight.shape[channel_axis] != len(indices):
        message = f"{name} has {weight.shape[channel_axis]} channels, but {path}.s2_idx names {len(indices)}"
        raise AdapterFormatError(message, reason="RANK_MISMATCH", field=name)
    return ChannelBlock(side, indices, weight)


def check_channels(name: str, indices: Tensor, num_channels: int) -> None:
    """Refuse channel numbers that a Linear does not have, that come twice, or that do not ascend.

    Raises: AdapterMismatchError with reason SHAPE_MISMATCH or CHANNEL_OUT_OF_RANGE; AdapterFormatError with reason
    DUPLICATE_CHANNEL or UNSORTED_CHANNELS.
    """
    if indices.ndim != 1:
        message = f"{name} has shape {list(indices.shape)}, it must be a list of channels"
        raise AdapterMismatchError(message, reason="SHAPE_MISMATCH", field=name)
    wrong = indices[(indices < 0) | (indices >= num_channels)]
    if len(wrong):
        message = f"{name} names channel {int(wrong[0])}; the Linear has {num_channels} on this side"
        raise AdapterMismatchError(message, reason="CHANNEL_OUT_OF_RANGE", field=name)
    ascending, counts = torch.unique(indices, return_counts=True)
    if len(ascending) != len(indices):
        message = f"{name} names channel {int(ascending[counts > 1][0])} more than once"
        raise AdapterFormatError(message, reason="DUPLICATE_CHANNEL", field=name)
    if not torch.equal(ascending, indices):
        position = int(torch.nonzero(indices[1:] < indices[:-1])[0])
        message = f"{name} does not ascend: {int(indices[position])} is before {int(indices[position + 1])}"
        raise AdapterFormatError(message, reason="UNSORTED_CHANNELS", field=name)
