"""The sizes of a pruned base's layers, as its config.json keeps them under `pruned_shapes`, checked.

The config's own numbers stay the original's, so that each layer can be held against them. Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedConfig

from motley_bases.errors import UnreadableBaseError
from motley_bases.pruned_geometry import DecoderShape

FIELD = "pruned_shapes"
SIZES = ("num_heads", "num_kv_heads", "ffn_size")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What is left of one layer; the original's own numbers where it was not pruned."""

    num_heads: int
    num_kv_heads: int
    ffn_size: int


@dataclass(frozen=True, slots=True)
class PrunedShapes:
    """The shapes of all layers, in order."""

    layers: tuple[LayerShape, ...]

    def to_config(self) -> dict[str, object]:
        """Return what config.json keeps."""
        return {"layers": [{name: getattr(layer, name) for name in SIZES} for layer in self.layers]}


def decoder_shape(config: PreTrainedConfig) -> DecoderShape:
    """Return the sizes that a config of the Llama family declares for its layers: the original's."""
    sizes = cast(Any, config)
    head_dim = getattr(config, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return DecoderShape(
        num_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        ffn_size=sizes.intermediate_size,
        num_heads=sizes.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or sizes.num_attention_heads,
        head_dim=head_dim,
        vocab_size=sizes.vocab_size,
    )


def whole_shapes(shape: DecoderShape) -> PrunedShapes:
    """Return the shapes of a decoder of which nothing was pruned."""
    return PrunedShapes((LayerShape(shape.num_heads, shape.num_kv_heads, shape.ffn_size),) * shape.num_layers)


def read_pruned_shapes(config: PreTrainedConfig) -> PrunedShapes | None:
    """Return the shapes that a config keeps, or None where it keeps none.

    Raises: UnreadableBaseError with reason PRUNED_SHAPES and the field if they cannot be those of a pruned copy of the
    decoder that the rest of the config describes.
    """
    value = getattr(config, FIELD, None)
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.keys() != {"layers"} or not isinstance(value["layers"], list | tuple):
        raise _broken(FIELD, "is not an object with a list of layers")
    shapes = PrunedShapes(tuple(_parse_layer(layer, sizes) for layer, sizes in enumerate(value["layers"])))
    check_shapes(shapes, decoder_shape(config))
    return shapes


def check_shapes(shapes: PrunedShapes, original: DecoderShape) -> None:
    """Refuse shapes that no pruning of the original leaves.

    Semantics: a layer keeps at least one key-value head and one FFN channel, never more than it had, and each
    key-value head keeps all of its query heads.
    Raises: UnreadableBaseError with reason PRUNED_SHAPES and the field.
    """
    if len(shapes.layers) != original.num_layers:
        raise _broken(f"{FIELD}.layers", f"has {len(shapes.layers)} layers, the model has {original.num_layers}")
    group = original.num_heads // original.num_kv_heads
    bounds = {"num_kv_heads": original.num_kv_heads, "ffn_size": original.ffn_size}
    for layer, shape in enumerate(shapes.layers):
        for name, whole in bounds.items():
            size = getattr(shape, name)
            if not 1 <= size <= whole:
                raise _broken(f"{FIELD}.layers[{layer}].{name}", f"is {size}, not 1 to the original's {whole}")
        if shape.num_heads != group * shape.num_kv_heads:
            raise _broken(
                f"{FIELD}.layers[{layer}].num_heads",
                f"is {shape.num_heads}: {shape.num_kv_heads} key-value heads keep {group} query heads each",
            )


def _parse_layer(layer: int, sizes: object) -> LayerShape:
    where = f"{FIELD}.layers[{layer}]"
    if not isinstance(sizes, Mapping) or sizes.keys() != set(SIZES):
        raise _broken(where, f"is not an object with {', '.join(SIZES)} alone")
    for name in SIZES:
        if type(sizes[name]) is not int:
            raise _broken(f"{where}.{name}", f"is {sizes[name]!r}, not a whole number")
    return LayerShape(*(sizes[name] for name in SIZES))


def _broken(field: str, problem: str) -> UnreadableBaseError:
    return UnreadableBaseError(f"{field} {problem}", reason="PRUNED_SHAPES", field=field)
