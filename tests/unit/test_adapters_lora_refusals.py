"""An adapter whose config, tensors and base do not agree is refused, naming the tensor, the module or the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PLAIN_CONFIG, PREFIX, plain_tensors, tiny_spec, write
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from motley_adapters.reader import read_adapter
from torch import Tensor

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
K = f"{PREFIX}model.layers.0.self_attn.k_proj"
UP = f"{PREFIX}model.layers.0.mlp.up_proj"
EMBED = f"{PREFIX}model.embed_tokens"
HEAD = f"{PREFIX}lm_head"
NO_PATH = f"{PREFIX}.lora_A.weight"
BASE_LAYER = f"{Q}.base_layer.weight"
UP_B = f"{UP}.lora_B.weight"
Q_B = f"{Q}.lora_B.weight"
Q_A = f"{Q}.lora_A.weight"


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def pair(stem: str, rank: int, inputs: int, outputs: int) -> dict[str, Tensor | None]:
    return {f"{stem}.lora_A.weight": zeros(rank, inputs), f"{stem}.lora_B.weight": zeros(outputs, rank)}


# What is added to the plain tensors (None takes away), what is added to the plain config, the error.
Case = tuple[dict[str, Tensor | None], dict[str, Any], type[AdapterError], str, str]
FORMAT, MISMATCH = AdapterFormatError, AdapterMismatchError
CASES: dict[str, Case] = {
    "A without B": ({Q_B: None}, {}, FORMAT, "MISSING_TENSOR", Q_B),
    "B without A": ({Q_A: None}, {}, FORMAT, "MISSING_TENSOR", Q_A),
    "a target without tensors": (
        {},
        {"target_modules": ["q_proj", "up_proj", "k_proj"]},
        FORMAT,
        "MISSING_TENSOR",
        f"{K}.lora_A.weight",
    ),
    "an embedding target without tensors": (
        {},
        {"target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        FORMAT,
        "MISSING_TENSOR",
        f"{EMBED}.lora_embedding_A",
    ),
    "tensors nobody asked for": (pair(K, 2, 4, 2), {}, FORMAT, "UNTARGETED_TENSOR", f"{K}.lora_A.weight"),
    "tensors of an excluded module": (
        {},
        {"exclude_modules": ["q_proj"]},
        FORMAT,
        "UNTARGETED_TENSOR",
        Q_A,
    ),
    "tensors of a layer that is left out": (
        {},
        {"layers_to_transform": [1]},
        FORMAT,
        "UNTARGETED_TENSOR",
        f"{UP}.lora_A.weight",
    ),
    "head tensors under all-linear": (
        pair(HEAD, 2, 4, 11) | pair(K, 2, 4, 2),
        {"target_modules": "all-linear"},
        FORMAT,
        "UNTARGETED_TENSOR",
        f"{HEAD}.lora_A.weight",
    ),
    "A of another rank": ({Q_A: zeros(3, 4)}, {}, FORMAT, "RANK_MISMATCH", Q_A),
    "B of another rank": ({Q_B: zeros(6, 3)}, {}, FORMAT, "RANK_MISMATCH", Q_B),
    "a pattern that the tensors deny": (
        {},
        {"rank_pattern": {"q_proj": 1}},
        FORMAT,
        "RANK_MISMATCH",
        Q_A,
    ),
    "A for other inputs": ({Q_A: zeros(2, 5)}, {}, MISMATCH, "SHAPE_MISMATCH", Q_A),
    "B for other outputs": (
        {UP_B: zeros(9, 2)},
        {},
        MISMATCH,
        "SHAPE_MISMATCH",
        UP_B,
    ),
    "A with a third side": (
        {Q_A: zeros(2, 4, 1)},
        {},
        MISMATCH,
        "SHAPE_MISMATCH",
        Q_A,
    ),
    "A without sides": ({Q_A: zeros()}, {}, MISMATCH, "SHAPE_MISMATCH", Q_A),
    "a module that is no Linear": (
        pair(f"{PREFIX}model.layers.0.mlp.experts", 2, 4, 4),
        {},
        MISMATCH,
        "NOT_A_LINEAR",
        f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight",
    ),
    "a target that is no Linear": (
        {},
        {"target_modules": ["q_proj", "up_proj", "norm"]},
        MISMATCH,
        "NOT_A_LINEAR",
        "adapter_config.target_modules",
    ),
    "a module that is not there": (
        pair(f"{PREFIX}model.layers.9.self_attn.q_proj", 2, 4, 6),
        {},
        MISMATCH,
        "UNKNOWN_MODULE",
        f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight",
    ),
    "an embedding's factors on a Linear": (
        {f"{Q}.lora_embedding_A": zeros(2, 4)},
        {},
        MISMATCH,
        "WRONG_MODULE_KIND",
        f"{Q}.lora_embedding_A",
    ),
    "a Linear's factors on the embedding": (
        pair(EMBED, 2, 11, 4),
        {},
        MISMATCH,
        "WRONG_MODULE_KIND",
        f"{EMBED}.lora_A.weight",
    ),
    "an embedding of another vocabulary": (
        {f"{EMBED}.lora_embedding_A": zeros(2, 12), f"{EMBED}.lora_embedding_B": zeros(4, 2)},
        {"target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        MISMATCH,
        "SHAPE_MISMATCH",
        f"{EMBED}.lora_embedding_A",
    ),
    "a resized vocabulary": ({f"{HEAD}.weight": zeros(12, 4)}, {}, MISMATCH, "SHAPE_MISMATCH", f"{HEAD}.weight"),
    "DoRA's magnitudes": (
        {f"{Q}.lora_magnitude_vector": zeros(6)},
        {},
        FORMAT,
        "UNEXPECTED_TENSOR",
        f"{Q}.lora_magnitude_vector",
    ),
    "a bias": ({f"{Q}.lora_B.bias": zeros(6)}, {}, FORMAT, "UNEXPECTED_TENSOR", f"{Q}.lora_B.bias"),
    "a full weight": ({f"{Q}.weight": zeros(6, 4)}, {}, FORMAT, "UNEXPECTED_TENSOR", f"{Q}.weight"),
    "a base layer": (
        {BASE_LAYER: zeros(6, 4)},
        {},
        FORMAT,
        "UNEXPECTED_TENSOR",
        BASE_LAYER,
    ),
    "a name without PEFT's prefix": (
        {"model.layers.0.self_attn.q_proj.lora_A.weight": zeros(2, 4)},
        {},
        FORMAT,
        "UNEXPECTED_TENSOR",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "an adapter's name inside": (
        {f"{Q}.lora_A.default.weight": zeros(2, 4)},
        {},
        FORMAT,
        "UNEXPECTED_TENSOR",
        f"{Q}.lora_A.default.weight",
    ),
    "no path at all": (
        {NO_PATH: zeros(2, 4)},
        {},
        FORMAT,
        "UNEXPECTED_TENSOR",
        NO_PATH,
    ),
    "NaN": ({Q_B: zeros(6, 2) * torch.nan}, {}, FORMAT, "NON_FINITE", Q_B),
    "what bfloat16 makes infinity of": ({Q_B: zeros(6, 2) - 3.4e38}, {}, FORMAT, "WEIGHT_TOO_LARGE", Q_B),
    "what float16 makes infinity of": ({Q_A: zeros(2, 4) + 65520}, {}, FORMAT, "WEIGHT_TOO_LARGE", Q_A),
    "the same in bfloat16": ({Q_A: (zeros(2, 4) + 65536).bfloat16()}, {}, FORMAT, "WEIGHT_TOO_LARGE", Q_A),
    "large factors of one rank": (
        {Q_A: zeros(2, 4) + 200, Q_B: zeros(6, 2) - 200},
        {},
        FORMAT,
        "WEIGHT_TOO_LARGE",
        Q_B,
    ),
    "a scale that makes one factor overflow": (
        {Q_A: zeros(2, 4) + 1, Q_B: zeros(6, 2) + 1e-30},
        {"alpha_pattern": {"q_proj": 1e30}},
        FORMAT,
        "WEIGHT_TOO_LARGE",
        Q_B,
    ),
    "integers": ({Q_B: zeros(6, 2).long()}, {}, FORMAT, "BAD_DTYPE", Q_B),
    "an expression that is broken": (
        {},
        {"target_modules": "(("},
        FORMAT,
        "BAD_PATTERN",
        "adapter_config.target_modules",
    ),
    "a config field": ({}, {"use_dora": True}, FORMAT, "UNSUPPORTED_FIELD", "adapter_config.use_dora"),
}


@pytest.mark.parametrize("case", CASES)
def test_disagreement_is_refused_with_class_reason_and_field(case: str, tmp_path: Path) -> None:
    tensors, config, kind, reason, field = CASES[case]
    present = {name: tensor for name, tensor in (plain_tensors() | tensors).items() if tensor is not None}
    write(tmp_path, PLAIN_CONFIG | config, present)
    with pytest.raises(kind) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert field.removeprefix(PREFIX).split(".lora_")[0] in caught.value.message or reason == "NOT_A_LINEAR"


def test_the_plain_adapter_that_all_cases_break_is_sound(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path), tiny_spec())
    assert adapter.spec.ranks == {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 2}


def test_the_largest_weights_that_are_held_are_read(tmp_path: Path) -> None:
    largest = plain_tensors() | {Q_A: zeros(2, 4) + 32752, Q_B: zeros(6, 2) + 1}  # twice 32752 is just held
    assert read_adapter(write(tmp_path / "a", tensors=largest), tiny_spec()).spec.kind == "lora"
    apart = torch.tensor([[65504.0], [0.0]]).expand(2, 4).contiguous()  # large factors that never meet along a rank
    never_met = plain_tensors() | {Q_A: apart, Q_B: torch.tensor([[0.0, 65504.0]]).expand(6, 2).contiguous()}
    config = PLAIN_CONFIG | {"lora_alpha": 2}
    assert read_adapter(write(tmp_path / "b", config, never_met), tiny_spec()).spec.kind == "lora"


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    write(tmp_path, tensors=plain_tensors() | {Q_A: zeros(2, 5)})
    with pytest.raises(AdapterMismatchError, match=r"\[2, 5\].*\[2, 4\]"):
        read_adapter(tmp_path, tiny_spec())


def test_an_adapter_without_any_module_is_refused(tmp_path: Path) -> None:
    write(tmp_path, PLAIN_CONFIG | {"target_modules": ["wqkv"]}, {})
    with pytest.raises(AdapterMismatchError) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_MODULE", "adapter_config.target_modules")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(fields=st.dictionaries(st.sampled_from([*PLAIN_CONFIG, "rank_pattern", "use_rslora", "bias", "x"]), JSON))
def test_no_config_raises_anything_but_adapter_errors(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write(tmp_path_factory.getbasetemp() / "any-config")
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN_CONFIG | fields))
    try:
        read_adapter(directory, tiny_spec())
    except AdapterError as error:
        assert error.reason.isupper()  # noqa: PT017 - either outcome is right


@settings(max_examples=200)
@given(data=st.data())
def test_no_damage_to_a_file_raises_anything_but_adapter_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write(tmp_path_factory.getbasetemp() / "any-damage")
    path = directory / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content) - 1, 500)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_adapter(directory, tiny_spec())
    except AdapterError as error:
        assert error.reason.isupper()  # noqa: PT017 - either outcome is right
