"""The data of the adapter delta: units, the table of units at one Linear, and how a batch's tokens share them.

It knows nothing of requests, names or digests, and is written by the engine thread alone. Dimension letters: T tokens,
U units, R rank, I in, O out. A *slot* is an integer that stands for one resident adapter; slots are never reused while
the process lives, so a stale slot finds nothing instead of another tenant's weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from motley_kernels.errors import ShapeError

if TYPE_CHECKING:
    from motley_kernels.adapter_delta.stacks import RankStack

RUN_TOKENS = 8
"""New tokens of one sequence from which on they are taken together; see `Segment.is_run`."""


@dataclass(frozen=True, eq=False, slots=True)
class DeltaUnit:
    """One adapter's low-rank pair at one Linear: x -> scaling * B (A x).

    Shapes: a [R, I], b [O, R]; R is the true rank.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(f"factors {tuple(self.a.shape)} and {tuple(self.b.shape)} do not share a rank")

    @property
    def rank(self) -> int:
        """Return the true rank."""
        return self.a.shape[0]

    def to(self, device: torch.device) -> DeltaUnit:
        """Return this unit with its factors on a device; itself if they are there."""
        if self.a.device == device and self.b.device == device:
            return self
        return DeltaUnit(self.a.to(device), self.b.to(device), self.scaling)

    @property
    def nbytes(self) -> int:
        """Return the bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


class UnitTable:
    """The units bound at one Linear, by slot.

    `stacks` belongs to the implementation: copies, by rank, of the units that recent batches use one token at a time.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.units: dict[int, DeltaUnit] = {}
        self.stacks: dict[int, RankStack] = {}
        self.generation = 0  # grows with every bind and unbind: what was derived from an older one is stale

    def bind(self, slot: int, unit: DeltaUnit) -> None:
        """Attach a unit under a slot.

        Raises: ShapeError if the unit's sides are not this Linear's; ValueError if the slot is taken.
        """
        if (unit.a.shape[1], unit.b.shape[0]) != (self.in_features, self.out_features):
            raise ShapeError(
                f"unit maps {unit.a.shape[1]} to {unit.b.shape[0]}, "
                f"the Linear {self.in_features} to {self.out_features}"
            )
        if slot in self.units:
            raise ValueError(f"slot {slot} is taken")
        self.units[slot] = unit
        self.generation += 1

    def unbind(self, slot: int) -> None:
        """Detach whatever a slot has here; nothing if it has nothing."""
        unit = self.units.pop(slot, None)
        if unit is None:
            return
        self.generation += 1
        stack = self.stacks.get(unit.rank)
        if stack is not None and stack.forget(unit):
            del self.stacks[unit.rank]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that share a unit set.

    Semantics: `members` are (slot, weight) in the set's order, which fixes the order of summation; `token_indices` [m]
    int64 are rows of the batch. `is_run` says that every token here has RUN_TOKENS - 1 or more companions of its own
    sequence in this pass. An implementation may round runs and single tokens differently, so what decides is the
    token's own sequence and never a neighbour with the same set.
    """

    members: tuple[tuple[int, float], ...]
    token_indices: Tensor
    is_run: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class DeltaBatch:
    """How the tokens of one forward pass share unit sets; a token in no segment is the base's alone.

    `layouts` is scratch for the implementation, keyed by what it was derived for, and lives as long as the batch does:
    a batch is made when the composition or the token layout changes, and kept across decode steps that change neither.
    """

    num_tokens: int
    segments: tuple[Segment, ...]
    layouts: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def is_empty(self) -> bool:
        """Tell whether every token is the base's alone."""
        return not self.segments

    @classmethod
    def from_sets(cls, sets: Iterable[tuple[tuple[int, float], ...]]) -> DeltaBatch:
        """Group single tokens, given each token's unit set in row order.

        Semantics: an empty set is the base alone.
        """
        return cls.from_sequences((members, 1) for members in sets)

    @classmethod
    def from_sequences(
        cls, sequences: Iterable[tuple[tuple[tuple[int, float], ...], int]], device: torch.device | None = None
    ) -> DeltaBatch:
        """Group packed tokens, given each sequence's unit set and number of new tokens in row order.

        Semantics: an empty set is the base alone; padding is a sequence with an empty set.
        """
        rows: dict[tuple[tuple[tuple[int, float], ...], bool], list[int]] = {}
        num_tokens = 0
        for members, num_new in sequences:
            if members and num_new:
                rows.setdefault((members, num_new >= RUN_TOKENS), []).extend(range(num_tokens, num_tokens + num_new))
            num_tokens += num_new
        segments = tuple(
            Segment(members, torch.tensor(indices, device=device), is_run)
            for (members, is_run), indices in rows.items()
        )
        return cls(num_tokens, segments)
