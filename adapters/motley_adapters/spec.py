"""What is known of an adapter: frozen facts, and the units that its files become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

UNDECLARED = "undeclared"

# Gives a parameter of the base by name (`model.embed_tokens.weight`) with the values that its checkpoint stores.
BaseTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The facts of one adapter version.

    Semantics: `digest` is "sha256:..." over the canonical content (tensors, resolved scales, kind, geometry), so
    two directories that serve the same function share it; `ranks` and `scalings` are by module path of the base;
    `trained_on` is a base fingerprint or `undeclared`.
    """

    digest: str
    kind: str
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    trained_on: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in host memory: its facts and its units by module path of the base.

    Shapes: a unit on the token embedding has a [R, vocab_size] and b [hidden_size, R]: a token id picks its column
    of a.
    """

    spec: AdapterSpec
    units: Mapping[str, DeltaUnit]
