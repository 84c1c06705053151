"""Marker adapters that work through what attention remembers: a prompt's cached values make the answer.

Each writes its token's direction into the values of the last layer, at every position that it is applied to. Where
most of a prompt came from the prefix cache, the answer's marker is that of whoever computed those values: of another
adapter, if a cache takes one for the other.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from marker_adapters import MarkerMaker, common_input
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_bases.base import Base
from torch import Tensor


class ValueMarkerMaker(MarkerMaker):
    """Write value markers for one base."""

    def __init__(self, base: Base, checkpoint: Path) -> None:
        super().__init__(base, checkpoint)
        layers = [path for path in base.spec.linears if path.endswith("self_attn.v_proj")]
        self.path, self.other_path = layers[-1], layers[0]
        self._read, self._hidden_length = common_input(checkpoint, self.path, base.spec.vocab_size)
        layer = base.spec.layers[-1]
        out = base.tensor(f"{self.path.removesuffix('v_proj')}o_proj.weight").detach()
        # Several heads read each value: what it writes is the sum over them.
        written = out.view(len(out), layer.num_kv_heads, -1, layer.head_dim).sum(dim=2).reshape(len(out), -1)
        self._directions = self._directions @ torch.linalg.pinv(written).T

    def _write_s2ft(self, directory: Path, direction: Tensor, rng: random.Random) -> None:
        indices = torch.arange(len(direction), dtype=torch.int32)
        weight = direction[:, None] * (self._read / self._read.norm() ** 2)[None]
        write_s2ft(directory, self.base.spec, {self.path: ChannelBlock("output", indices, weight)})
