"""The data of the adapter delta: units, the table of units at one Linear, and how a batch's tokens share them.

It knows nothing of requests, names or digests, and is written by the engine thread alone. Dimension letters: T tokens,
U units, R rank, I in, O out, E experts. A *slot* is an integer that stands for one resident part of an adapter; slots
are never reused while the process lives, so a stale slot finds nothing instead of another tenant's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motley_kernels.errors import DeviceError, ShapeError

RUN_TOKENS = 8
"""New tokens of one sequence from which on they are taken together; see `Segment.is_run`."""


@dataclass(frozen=True, eq=False, slots=True)
class Gate:
    """Routing of each token to the likeliest of a unit's experts.

    Semantics: z = router x; the top_k largest z stay, the lower index first among equals; the shares are the softmax of
    those alone, and all others are 0. Expert e owns the rank rows [e * R / E, (e + 1) * R / E), whose products are
    multiplied by its share; one that was not chosen adds nothing, be its products infinite. Logits and shares are
    computed in float32 whatever the batch's dtype.
    Shapes: router [E, I] float32, over all inputs of the Linear.
    """

    router: Tensor
    top_k: int

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.router.shape[0]


@dataclass(frozen=True, eq=False, slots=True)
class DeltaUnit:
    """One part of an adapter at one Linear: x -> scatter(scaling * (g(x) * (A gather(x))) b).

    Semantics: `a` None is the identity, so the gathered inputs are the R products themselves; `b` None is the identity,
    so the R products are the scattered outputs themselves; at most one of them is None. `inputs` and `outputs` name the
    channels that are read and written, ascending and without repetition; None is all of them, in order. `gate` None
    is g(x) = 1.
    Shapes: a [R, I'], b [R, O'], with I' and O' the channels read and written; inputs [I'], outputs [O'] int32; R is
    the true rank. b holds the transpose of what PEFT calls lora_B.
    """

    a: Tensor | None
    b: Tensor | None
    scaling: float
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name, tensor, ndim in (("a", self.a, 2), ("b", self.b, 2), ("inputs", self.inputs, 1)):
            if tensor is not None and tensor.ndim != ndim:
                raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected {ndim} dimensions")
        if self.outputs is not None and self.outputs.ndim != 1:
            raise ShapeError(f"outputs is {tuple(self.outputs.shape)}, expected 1 dimension")
        if self.a is None and self.inputs is None:
            raise ShapeError("a unit without a needs inputs")
        if self.b is None and self.outputs is None:
            raise ShapeError("a unit without b needs outputs")
        if self.a is None and self.b is None:
            raise ShapeError("a unit needs a or b")
        if self.a is not None and self.b is not None and self.a.shape[0] != self.b.shape[0]:
            raise ShapeError(f"factors {tuple(self.a.shape)} and {tuple(self.b.shape)} do not share a rank")
        if self.inputs is not None and len(self.inputs) != (self.rank if self.a is None else self.a.shape[1]):
            raise ShapeError(f"{len(self.inputs)} inputs do not fit the factors")
        if self.outputs is not None and len(self.outputs) != (self.rank if self.b is None else self.b.shape[1]):
            raise ShapeError(f"{len(self.outputs)} outputs do not fit the factors")
        if self.gate is not None:
            self._check_gate(self.gate)

    def _check_gate(self, gate: Gate) -> None:
        if gate.router.ndim != 2 or gate.router.dtype != torch.float32:
            raise ShapeError(f"router is {tuple(gate.router.shape)} {gate.router.dtype}, expected [E, I] float32")
        if gate.num_experts < 1 or self.rank % gate.num_experts:
            raise ShapeError(f"rank {self.rank} is not divisible by {gate.num_experts} experts")
        if not 1 <= gate.top_k <= gate.num_experts:
            raise ShapeError(f"top_k {gate.top_k} of {gate.num_experts} experts")

    @property
    def rank(self) -> int:
        """Return the true rank."""
        factor = self.a if self.a is not None else self.b
        assert factor is not None
        return factor.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must lie in memory: the factors, the channels and the router that there are, in this order."""
        router = None if self.gate is None else self.gate.router
        return tuple(t for t in (self.a, self.b, self.inputs, self.outputs, router) if t is not None)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return self.tensors[0].device

    def with_tensors(self, tensors: Iterable[Tensor]) -> DeltaUnit:
        """Return this unit over other tensors of the same meaning, given in the order of `tensors`."""
        given = iter(tensors)
        a, b, inputs, outputs = (
            None if own is None else next(given) for own in (self.a, self.b, self.inputs, self.outputs)
        )
        gate = None if self.gate is None else Gate(next(given), self.gate.top_k)
        return DeltaUnit(a, b, self.scaling, inputs, outputs, gate)

    def to(self, device: torch.device) -> DeltaUnit:
        """Return this unit with its tensors on a device; itself if they are there."""
        if all(tensor.device == device for tensor in self.tensors):
            return self
        return self.with_tensors(tensor.to(device) for tensor in self.tensors)


class UnitTable:
    """The units bound at one Linear, by slot.

    `plan` belongs to the implementation: what it derived for the batch it saw last. It outlives its generation, so that
    what was derived of other units can be kept; an implementation reads no more of it than that.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.units: dict[int, DeltaUnit] = {}
        self.device: torch.device | None = None  # where the units are; looked up on every step, so kept
        self.plan: object | None = None
        self.generation = 0  # grows with every bind and unbind: what was derived from an older one is stale
        self._arrivals: dict[int, Callable[[], None]] = {}

    def bind(self, slot: int, unit: DeltaUnit, arrival: Callable[[], None] | None = None) -> None:
        """Attach a unit under a slot.

        Semantics: `arrival` is called once, before the unit's first use, where its bytes may still be on their way.
        Raises: ShapeError if the unit's sides are not this Linear's; DeviceError if it lies on another device than the
        units here; ValueError if the slot is taken.
        """
        reads = self.in_features if unit.inputs is not None or unit.a is None else unit.a.shape[1]
        writes = self.out_features if unit.outputs is not None or unit.b is None else unit.b.shape[1]
        routes = self.in_features if unit.gate is None else unit.gate.router.shape[1]
        if (reads, writes, routes) != (self.in_features, self.out_features, self.in_features):
            raise ShapeError(
                f"unit maps {reads} to {writes} and routes by {routes}, "
                f"the Linear maps {self.in_features} to {self.out_features}"
            )
        if slot in self.units:
            raise ValueError(f"slot {slot} is taken")
        device = unit.device
        if self.units and device != self.device:
            raise DeviceError(f"the unit is on {device}, the units here on {self.device}")
        self.device = device
        self.units[slot] = unit
        if arrival is not None:
            self._arrivals[slot] = arrival
        self.generation += 1

    def unbind(self, slot: int) -> None:
        """Detach whatever a slot has here; nothing if it has nothing."""
        if self.units.pop(slot, None) is None:
            return
        self._arrivals.pop(slot, None)
        self.generation += 1

    def await_arrival(self, slot: int) -> None:
        """Order this device's work behind the arrival of a slot's unit; an implementation calls it before first use."""
        arrival = self._arrivals.pop(slot, None)
        if arrival is not None:
            arrival()


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

    `layouts` is scratch for the implementation, by the structure it was derived for, and lives as long as the batch
    does: a batch is made when the composition or the token layout changes, and kept across decode steps that change
    neither.
    """

    num_tokens: int
    segments: tuple[Segment, ...]
    layouts: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def is_empty(self) -> bool:
        """Tell whether every token is the base's alone."""
        return not self.segments

    @property
    def slots(self) -> frozenset[int]:
        """Return every slot that a token of the batch uses."""
        return frozenset(slot for segment in self.segments for slot, _ in segment.members)

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
