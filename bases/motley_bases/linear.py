"""Adapter sites: the base's Linears and token embedding, each able to add the deltas of the tokens in the batch.

A site wraps the original module and leaves its weight untouched. It holds the units bound to it by slot and looks up,
in one object shared by all sites of a model, how the tokens of the present batch use them. Knows nothing of adapters'
names, files or kinds. Binding and forward passes both happen on the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from motley_kernels.adapter_delta import add_delta, add_embedding_delta
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit, UnitTable
from torch import Tensor, nn

from motley_bases.errors import UnboundSlotError, UnknownSiteError, UnsupportedBaseError
from motley_bases.spec import BaseSpec


class DeltaBinding:
    """What the sites of one model see of the present batch; None where every row is the base's alone."""

    __slots__ = ("sampled", "tokens")

    def __init__(self) -> None:
        self.tokens: DeltaBatch | None = None  # one row a token: what every site but lm_head sees
        self.sampled: DeltaBatch | None = None  # one row a wanted logit: what lm_head sees


class AdapterLinear(nn.Module):
    """A Linear that adds to its output what the batch's adapters add."""

    def __init__(self, base: nn.Linear, binding: DeltaBinding, *, sees_sampled_rows: bool) -> None:
        super().__init__()
        self.training = base.training
        self.base = base
        self.binding = binding
        self.sees_sampled_rows = sees_sampled_rows
        self.table = UnitTable(base.in_features, base.out_features)

    @property
    def weight(self) -> Tensor:
        """Return the base's weight: modelling code looks at its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Return the base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base, then add the deltas of the rows that have any.

        Shapes: x [..., I] with the batch's rows in front, flattened; returns [..., O].
        """
        base = self._modules["base"]  # as self.base, without torch's attribute search: 3 us a call on CPU
        assert base is not None
        y: Tensor = base(x)
        batch = self.binding.sampled if self.sees_sampled_rows else self.binding.tokens
        if batch is not None and self.table.units:
            add_delta(y, x, self.table, batch)
        return y


class AdapterEmbedding(nn.Module):
    """A token embedding that adds to its rows what the batch's adapters add.

    Semantics: a unit's a is [R, vocab], of which a token picks its column, and b is [R, d]. Where the embedding
    multiplies its rows by a scale (Gemma), the delta is multiplied by the same number, as if it had been added to the
    weight.
    """

    def __init__(self, base: nn.Embedding, binding: DeltaBinding) -> None:
        super().__init__()
        self.training = base.training
        self.base = base
        self.binding = binding
        self.table = UnitTable(base.num_embeddings, base.embedding_dim)
        self.output_scale = _output_scale(base)

    @property
    def weight(self) -> Tensor:
        """Return the base's weight: modelling code looks at its dtype and device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the rows up, then add the deltas of the tokens that have any."""
        y: Tensor = self.base(input_ids)
        batch = self.binding.tokens
        if batch is not None and self.table.units:
            rows = y.view(-1, self.table.out_features)
            add_embedding_delta(rows, input_ids.reshape(-1), self.table, batch, output_scale=self.output_scale)
        return y


class DeltaSites:
    """All adapter sites of one model, by the path that the checkpoint gives them."""

    def __init__(self, tables: Mapping[str, UnitTable], binding: DeltaBinding) -> None:
        self.tables = dict(tables)
        self.binding = binding
        self._paths_by_slot: dict[int, tuple[str, ...]] = {}

    def bind(
        self, slot: int, units: Mapping[str, DeltaUnit], arrivals: Mapping[str, Callable[[], None]] | None = None
    ) -> None:
        """Attach the units of one part of an adapter under a slot: all of them, or none.

        Semantics: `arrivals` are called once each, before the first use of the unit at their path, where bytes may
        still be on their way.
        Raises: UnknownSiteError if a path names no site; ShapeError if a unit does not fit its site; ValueError if the
        slot is taken.
        """
        if slot in self._paths_by_slot:
            raise ValueError(f"slot {slot} is taken")
        for path in units:
            if path not in self.tables:
                raise UnknownSiteError(
                    f"no adapter can attach to {path}: the base has no such Linear", reason="UNKNOWN_SITE", field=path
                )
        bound: list[str] = []
        try:
            for path, unit in units.items():
                self.tables[path].bind(slot, unit, None if arrivals is None else arrivals.get(path))
                bound.append(path)
        except ValueError:
            for path in bound:
                self.tables[path].unbind(slot)
            raise
        self._paths_by_slot[slot] = tuple(bound)

    def unbind(self, slot: int) -> None:
        """Detach a slot's units everywhere; nothing if it has none."""
        for path in self._paths_by_slot.pop(slot, ()):
            self.tables[path].unbind(slot)

    def set_batch(self, tokens: DeltaBatch | None, sampled: DeltaBatch | None) -> None:
        """Say how the rows of the next forward passes use the slots; None or an empty batch is the base alone.

        Raises: UnboundSlotError if a batch names a slot that nothing is bound under: its tokens would be served by less
        than they asked for.
        """
        for batch in (tokens, sampled):
            if batch is not None and (unbound := batch.slots - self._paths_by_slot.keys()):
                raise UnboundSlotError(
                    f"nothing is bound under slots {sorted(unbound)}", reason="UNBOUND_SLOT", field="slots"
                )
        self.binding.tokens = tokens if tokens is not None and not tokens.is_empty else None
        self.binding.sampled = sampled if sampled is not None and not sampled.is_empty else None


def attach(model: nn.Module, spec: BaseSpec) -> DeltaSites:
    """Put an adapter site in the place of every Linear of the spec and of the token embedding.

    Effects: replaces submodules of `model`; weights stay where they are. Tied embedding and lm_head become two sites
    over one weight: a unit of the one does not touch the other.
    """
    binding = DeltaBinding()
    tables: dict[str, UnitTable] = {}
    for path in spec.linears:
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{path} is a {type(linear).__name__}, not a Linear; was the model attached to before?")
        site = AdapterLinear(linear, binding, sees_sampled_rows=path == spec.lm_head_path)
        tables[path] = site.table
        _replace(model, path, site)
    embedding = model.get_submodule(spec.embedding_path)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{spec.embedding_path} is a {type(embedding).__name__}, not an Embedding")
    embedding_site = AdapterEmbedding(embedding, binding)
    tables[spec.embedding_path] = embedding_site.table
    _replace(model, spec.embedding_path, embedding_site)
    return DeltaSites(tables, binding)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


def _output_scale(embedding: nn.Embedding) -> float:
    """Return what the embedding multiplies its rows by, rounded to the weight's dtype as its own forward does."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return 1.0
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return float(scale.to(embedding.weight.dtype).item())
    if isinstance(scale, int | float):
        return float(scale)
    raise UnsupportedBaseError(
        f"{type(embedding).__name__} scales its rows by something other than one number",
        reason="EMBEDDING_SCALE",
        field="embed_scale",
    )
