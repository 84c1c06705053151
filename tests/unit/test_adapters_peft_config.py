"""Every field of PEFT's LoRA config is read, harmless, or refused by name when it changes the function."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import peft
import pytest
from motley_adapters.errors import AdapterFormatError
from motley_adapters.peft_config import HARMLESS_FIELDS, REFUSED_FIELDS, SUPPORTED_FIELDS, parse_lora_config

PEFT_FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}

# A value with which each refused field does change the function.
CHANGED: dict[str, Any] = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [],
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {},
    "ensure_weight_tying": True,
}


def refusal_of(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(AdapterFormatError) as caught:
        parse_lora_config(PLAIN | fields)
    return caught.value.reason, caught.value.field


def test_every_field_of_the_installed_peft_has_exactly_one_policy() -> None:
    tables = (SUPPORTED_FIELDS, HARMLESS_FIELDS.keys(), REFUSED_FIELDS.keys())
    assert set().union(*tables) == PEFT_FIELDS
    assert sum(len(table) for table in tables) == len(PEFT_FIELDS)


def test_every_refused_field_has_a_changed_value_below() -> None:
    assert CHANGED.keys() == REFUSED_FIELDS.keys()


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_a_refused_field_that_is_set_is_refused_by_name(name: str) -> None:
    assert refusal_of(**{name: CHANGED[name]}) == ("UNSUPPORTED_FIELD", f"adapter_config.{name}")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, refusal in REFUSED_FIELDS.items() for value in refusal.inactive]
)
def test_a_refused_field_that_is_off_is_accepted(name: str, value: Any) -> None:
    assert parse_lora_config(PLAIN | {name: value}).rank == 8


def test_zero_does_not_pass_for_false() -> None:
    assert refusal_of(use_dora=0) == ("UNSUPPORTED_FIELD", "adapter_config.use_dora")


@pytest.mark.parametrize("name", sorted(HARMLESS_FIELDS))
def test_a_harmless_field_changes_nothing_whatever_it_holds(name: str) -> None:
    assert parse_lora_config(PLAIN | {name: {"any": ["thing"]}}) == parse_lora_config(PLAIN)


def test_what_the_installed_peft_writes_by_default_is_accepted() -> None:
    written = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=6, target_modules="q_proj").to_dict()))
    config = parse_lora_config(written)
    assert (config.rank, config.lora_alpha, config.target_modules) == (4, 6.0, "q_proj")


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 3])
def test_an_initialization_that_changes_the_base_is_refused_with_the_way_out(value: Any) -> None:
    with pytest.raises(AdapterFormatError, match="path_initial_model_for_weight_conversion") as caught:
        parse_lora_config(PLAIN | {"init_lora_weights": value})
    assert (caught.value.reason, caught.value.field) == ("UNSUPPORTED_FIELD", "adapter_config.init_lora_weights")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialization_that_leaves_the_base_alone_is_accepted(value: Any) -> None:
    assert parse_lora_config(PLAIN | {"init_lora_weights": value}).rank == 8


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
@pytest.mark.parametrize("is_null", [True, False])
def test_a_missing_field_is_named(name: str, is_null: bool) -> None:
    fields = PLAIN | {name: None}
    if not is_null:
        del fields[name]
    with pytest.raises(AdapterFormatError) as caught:
        parse_lora_config(fields)
    assert (caught.value.reason, caught.value.field) == ("MISSING_FIELD", f"adapter_config.{name}")


@pytest.mark.parametrize("peft_type", [None, "IA3", "lora", 1])
def test_another_peft_method_is_refused(peft_type: Any) -> None:
    assert refusal_of(peft_type=peft_type) == ("UNSUPPORTED_FIELD", "adapter_config.peft_type")


def test_an_unknown_field_is_refused_by_name() -> None:
    assert refusal_of(use_zora=None) == ("UNKNOWN_FIELD", "adapter_config.use_zora")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 1.0),
        ("r", True),
        ("r", "8"),
        ("r", 10**400),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e39),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("use_rslora", None),
        ("rank_pattern", []),
        ("rank_pattern", {str(i): 1 for i in range(5000)}),
        ("alpha_pattern", "q_proj"),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", [""]),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [str(i) for i in range(5000)]),
        ("exclude_modules", [None]),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [True]),
        ("layers_pattern", [3]),
        ("layers_pattern", "layers"),  # without layers_to_transform
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_refused(name: str, value: Any) -> None:
    assert refusal_of(**{name: value}) == ("INVALID_FIELD", f"adapter_config.{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank_pattern", 0),
        ("rank_pattern", 1.5),
        ("rank_pattern", None),
        ("alpha_pattern", None),
        ("alpha_pattern", "1"),
    ],
)
def test_a_wrong_entry_of_a_pattern_is_named(name: str, value: Any) -> None:
    expected = ("INVALID_FIELD", f'adapter_config.{name}["v_proj"]')
    assert refusal_of(**{name: {"q_proj": 4, "v_proj": value}}) == expected


def test_layers_cannot_go_with_an_expression() -> None:
    refusal = refusal_of(target_modules=".*q_proj", layers_to_transform=[0])
    assert refusal == ("INVALID_FIELD", "adapter_config.layers_to_transform")


def test_patterns_and_layers_are_read() -> None:
    config = parse_lora_config(
        PLAIN
        | {
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 0.5},
            "layers_to_transform": 3,
            "layers_pattern": "layers",
            "exclude_modules": "x",
            "use_rslora": True,
        }
    )
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 2}, {"q_proj": 0.5})
    assert (config.layers_to_transform, config.layers_pattern, config.exclude_modules) == ((3,), ("layers",), "x")
    assert config.scaling(16.0, 4) == 8.0
    assert parse_lora_config(PLAIN).scaling(16.0, 4) == 4.0
