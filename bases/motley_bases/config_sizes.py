"""The sizes that a config gives a model: whole numbers that some model could have, or a fault by the field's name.

Checked as they are stored, so that the field is known where transformers would trip over it, and again as they are
parsed, with what is derived and what is left to be its default. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

# What no model comes near: one of more would be counted for hours, or beyond what torch can number.
LARGEST_SIZES = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**20,
    "num_attention_heads": 2**16,
    "vocab_size": 2**31 - 1,
    # These a config may leave out.
    "max_position_embeddings": 2**31 - 1,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
}
REQUIRED_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
MAX_QUOTED = 40  # characters


def stored_size_faults(stored: Mapping[str, object], spelled: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (field, sentence) of every size in a stored config that is none.

    Semantics: `spelled` is how this model's config spells what most call otherwise. What is absent, or null, is left to
    transformers.
    """
    fields = {name: spelled.get(name, name) for name in LARGEST_SIZES}
    yield from _faults({name: stored.get(field) for name, field in fields.items()}, fields)


def size_faults(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Yield (field, sentence) of every size in a parsed config that is none, or that does not go with another."""
    fields = {name: config.attribute_map.get(name, name) for name in LARGEST_SIZES}
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in LARGEST_SIZES}
    unsaid = ((fields[name], f"its {fields[name]} is not said") for name in REQUIRED_SIZES if sizes[name] is None)
    if alone := [*unsaid, *_faults(sizes, fields)]:
        yield from alone
        return
    num_heads, num_kv_heads, width = (sizes[n] for n in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if num_kv_heads is not None and num_heads % num_kv_heads:
        sentence = f"its {num_heads} query heads cannot share {num_kv_heads} key-value heads evenly"
        yield fields["num_key_value_heads"], sentence
    if sizes["head_dim"] is None and width < num_heads:
        sentence = f"its {num_heads} heads share a width of {width}, which leaves nothing for some"
        yield fields["num_attention_heads"], sentence


def quoted(value: object) -> str:
    """Show a value of a config, the start of it where it is long."""
    shown = repr(value)
    return shown if len(shown) <= MAX_QUOTED else f"{shown[:MAX_QUOTED]}..."


def _faults(sizes: Mapping[str, object], fields: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, largest in LARGEST_SIZES.items():
        size, field = sizes[name], fields[name]
        if size is None or (name == "intermediate_size" and isinstance(size, list | tuple)):  # one a layer
            continue
        if type(size) is not int or not 1 <= size <= largest:
            yield field, f"its {field} is {quoted(size)}, not a whole number from 1 to {largest}"
