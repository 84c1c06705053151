"""Adapter directories of S2FT, GOAT and LoRAM: random factors, large enough to change answers, on any base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, write_goat
from motley_adapters.kinds.goat_init import slice_spectrum, theoretical_scale
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.kinds.loram_recovery import recover
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.spec import Side
from motley_bases.pruned_geometry import KeptChannels
from motley_bases.spec import BaseSpec
from torch import Tensor, nn

SIDES: Mapping[str, Side] = {"o_proj": "input", "down_proj": "input", "v_proj": "output", "up_proj": "output"}
PRUNED_FINGERPRINT = f"sha256:{'d' * 64}"
GOAT_GEOMETRY = GoatGeometry(experts=4, top_k=2, rank=8, rho=10.0, segments="head")
READ_PRUNED = ("o_proj", "down_proj")  # Linears that read pruned channels; the others of a layer write them


def layer_linears(base: BaseSpec, names: Iterable[str] | None = None) -> list[str]:
    """Return the paths of a base's Linears but lm_head, or of those with one of these last names."""
    wanted = None if names is None else set(names)
    return [
        path
        for path in sorted(base.linears)
        if path != base.lm_head_path and (wanted is None or path.rpartition(".")[2] in wanted)
    ]


def some_channels(num_channels: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw distinct channels, ascending."""
    return torch.randperm(num_channels, generator=generator)[:count].sort().values.to(torch.int32)


def make_s2ft(
    directory: Path,
    base: BaseSpec,
    *,
    seed: int,
    sides: Mapping[str, Side] = SIDES,
    num_channels: int = 6,
    strength: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an S2FT directory that changes some channels of every Linear with one of these last names."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for path in layer_linears(base, sides):
        inputs, outputs = base.linears[path]
        side = sides[path.rpartition(".")[2]]
        indices = some_channels(inputs if side == "input" else outputs, num_channels, generator)
        shape = (outputs, num_channels) if side == "input" else (num_channels, inputs)
        blocks[path] = ChannelBlock(side, indices, _random(shape, strength, generator))
    write_s2ft(directory, base, blocks, dtype=dtype)
    return directory


def make_goat(
    directory: Path,
    model: nn.Module | Callable[[str], Tensor],
    base: BaseSpec,
    *,
    seed: int,
    geometry: GoatGeometry = GOAT_GEOMETRY,
    names: Iterable[str] | None = None,
    strength: float = 0.5,
    eta: float = 0.1,
    residuals: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a GOAT directory as if trained: started from the base's own slices, then moved away from them.

    Semantics: `model` has the base's weights, as a module or as what gives a parameter by name. Two seeds share the
    residual where base, geometry and names are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path in layer_linears(base, names):
        weight = model.get_parameter(f"{path}.weight") if isinstance(model, nn.Module) else model(f"{path}.weight")
        slices = slice_spectrum(weight.cpu(), geometry, torch.Generator().manual_seed(0))
        scale = theoretical_scale(geometry, weight.shape[1], eta=eta)
        a, b = slices.initial_factors(scale, geometry.rho)
        residual_a, residual_b = slices.residual_factors
        modules[path] = GoatModule(
            a=a + _random(tuple(a.shape), strength * 2 / scale, generator),
            b=b + _random(tuple(b.shape), strength * 2, generator),
            router=_random((geometry.experts, weight.shape[1]), 4.0, generator),
            scale=scale,
            residual_a=residual_a,
            residual_b=residual_b,
        )
    source = {"eta": eta, "rank_for_scale": "expert"}
    write_goat(directory, base, geometry, modules, residuals=residuals, dtype=dtype, details=source)
    return directory


def make_loram(
    directory: Path,
    base: BaseSpec,
    *,
    seed: int,
    rank: int = 4,
    names: Iterable[str] | None = None,
    kept_share: float = 0.5,
    strength: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a recovered LoRAM directory: zero-filled factors, and a manifest that says so."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in layer_linears(base, names):
        sides = base.linears[path]
        is_read = path.rpartition(".")[2] in READ_PRUNED
        pruned_side = sides[0] if is_read else sides[1]
        channels = some_channels(pruned_side, max(1, int(kept_share * pruned_side)), generator).tolist()
        kept = KeptChannels(inputs=tuple(channels)) if is_read else KeptChannels(outputs=tuple(channels))
        inputs, outputs = (len(channels), sides[1]) if is_read else (sides[0], len(channels))
        pruned = LoraPair(_random((rank, inputs), 1.0, generator), _random((outputs, rank), strength, generator), 2.0)
        pairs[path] = recover(pruned, kept, *sides)
    write_peft_lora(directory, pairs, dtype=dtype)
    write_loram_manifest(directory, base, trained_on=PRUNED_FINGERPRINT)
    return directory


def _random(shape: tuple[int, ...], strength: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * strength / shape[1] ** 0.5
