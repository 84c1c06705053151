"""What is known of an adapter: frozen facts, and the parts that its files become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

UNDECLARED = "undeclared"

# Gives a parameter of the base by name (`model.embed_tokens.weight`) with the values that its checkpoint stores.
BaseTensor = Callable[[str], Tensor]

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of one Linear that an adapter changes the weights of: columns (input) or rows (output).

    Semantics: `indices` ascend without repetition.
    """

    side: Side
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The facts of one adapter version.

    Semantics: `digest` is "sha256:..." over the canonical content (tensors, resolved scales, kind, geometry, shared
    parts), so two directories that serve the same function share it; `ranks` and `scalings` are by module path of the
    base and of the adapter's own units; `nbytes` counts those alone. `trained_on` and `serves_on` are base fingerprints
    or `undeclared`; `shared` are digests of parts that other adapters may name too; `channels` is S2FT's alone.
    """

    digest: str
    kind: str
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    trained_on: str
    nbytes: int
    shared: tuple[str, ...] = ()
    serves_on: str = UNDECLARED
    channels: Mapping[str, Channels] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Units by module path that come and go together, under the digest of what they are."""

    digest: str
    units: Mapping[str, DeltaUnit]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all units."""
        return sum(unit.nbytes for unit in self.units.values())


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """An adapter in host memory: its facts, its own units by module path of the base, and the parts it shares.

    Shapes: a unit on the token embedding has a [R, vocab_size] and b [R, hidden_size]: a token id picks its column
    of a.
    """

    spec: AdapterSpec
    units: Mapping[str, DeltaUnit]
    shared: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return everything that must be resident for this adapter: its own part, then the shared ones."""
        return (Part(self.spec.digest, self.units), *self.shared)
