"""How many bytes the adapter of a job will have, as far as that follows from its spec and the base's Linears.

What would not fit its tenant's quota at the end is refused before anybody trains it. Files have a little beside their
tensors, so that what is told here is never too much. Pure; runs on the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.rpc.lora_targets import DEFAULT_RANK
from motley_server.rpc.training_goat import DEFAULT_EXPERTS
from motley_server.rpc.training_goat import DEFAULT_RANK as DEFAULT_GOAT_RANK

NUMBER_BYTES: Final = 4  # of float32, in which every method writes, and of a channel's number
# By share: the Linear of every layer that it is of, whether of its heads, and whether of its inputs.
PLACES: Final = (
    ("o_share", "self_attn.o_proj", True, True),
    ("down_share", "mlp.down_proj", False, True),
    ("v_share", "self_attn.v_proj", True, False),
    ("up_share", "mlp.up_proj", False, False),
)
DEFAULT_SHARES: Final = {"o_share": 0.05, "down_share": 0.02}


def least_adapter_bytes(spec: training_pb2.TrainingSpec, base: BaseSpec) -> int:
    """Return how many bytes the tensors of a job's adapter take; 0 for a method of which that is not known."""
    match spec.method:
        case training_pb2.TRAINING_METHOD_LORA:
            return sum(_lora_numbers(spec.lora, base)) * NUMBER_BYTES
        case training_pb2.TRAINING_METHOD_S2FT:
            return sum(_s2ft_numbers(spec.s2ft, base)) * NUMBER_BYTES
        case training_pb2.TRAINING_METHOD_GOAT:
            return sum(_goat_numbers(spec.goat, base)) * NUMBER_BYTES
        case training_pb2.TRAINING_METHOD_LORAM:  # it has the base's own shapes, with zeros where the copy was pruned
            return sum(_lora_numbers(spec.loram.lora, base)) * NUMBER_BYTES
        case _:
            return 0


def _lora_numbers(settings: training_pb2.LoraSettings, base: BaseSpec) -> Iterator[int]:
    """Yield what two factors have, of each Linear that is meant."""
    ranks = dict(settings.rank_pattern)
    common = settings.rank if settings.HasField("rank") else DEFAULT_RANK
    for path, names in _meant(settings.target_modules, base):
        yield next((ranks[name] for name in names if name in ranks), common) * sum(base.linears[path])


def _goat_numbers(settings: training_pb2.GoatSettings, base: BaseSpec) -> Iterator[int]:
    """Yield what the experts' factors have, a residual of as many beside them, and a router of the inputs."""
    rank = settings.rank if settings.HasField("rank") else DEFAULT_GOAT_RANK
    experts = settings.experts if settings.HasField("experts") else DEFAULT_EXPERTS
    for path, _ in _meant(settings.target_modules, base):
        inputs, outputs = base.linears[path]
        yield 2 * rank * (inputs + outputs) + experts * inputs


def _meant(target_modules: Sequence[str], base: BaseSpec) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the Linears that names mean, each with all its names, the longest first, which says the most."""
    targets = set(target_modules)
    for path in base.linears:
        parts = path.split(".")
        names = [".".join(parts[start:]) for start in range(len(parts))]
        if targets.intersection(names) or (not targets and path != base.lm_head_path):
            yield path, names


def _s2ft_numbers(settings: training_pb2.S2ftSettings, base: BaseSpec) -> Iterator[int]:
    """Yield what the channels of a place have, each of them a row or a column and its number.

    Semantics: a share of all layers together may fall on any of them: it is taken for the smallest.
    """
    given = any(settings.HasField(name) for name, *_ in PLACES)  # type: ignore[arg-type]
    for name, path, of_heads, of_inputs in PLACES:
        share: float = getattr(settings, name) if given else DEFAULT_SHARES.get(name, 0.0)
        if not share:
            continue
        sites = []
        for layer, attention in enumerate(base.layers):
            inputs, outputs = base.linears[f"model.layers.{layer}.{path}"]
            channels, length = (inputs, outputs) if of_inputs else (outputs, inputs)
            size = attention.head_dim if of_heads else 1
            sites.append((channels // size, size * (length + 1)))
        if settings.budget == training_pb2.CHANNEL_BUDGET_GLOBAL:
            yield _num_items(share, sum(items for items, _ in sites)) * min(numbers for _, numbers in sites)
        else:
            yield sum(_num_items(share, items) * numbers for items, numbers in sites)


def _num_items(share: float, total: int) -> int:
    """Return how many items a share is, as workers count them: one at least."""
    return max(1, math.floor(Fraction(str(share)) * total))
