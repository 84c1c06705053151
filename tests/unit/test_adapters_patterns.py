"""Module expressions mean what PEFT means by them, and none of them can hold the server up."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_adapters.errors import AdapterError, AdapterFormatError
from motley_adapters.module_patterns import MATCHING_BUDGET_SECONDS, PatternMatcher
from motley_adapters.peft_config import PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

PATHS = [
    "lm_head",
    "model.embed_tokens",
    *(
        f"model.layers.{layer}.{module}"
        for layer in (0, 1, 11)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.3.up_proj")
    ),
]


def config_of(targets: str | tuple[str, ...], **fields: Any) -> PeftLoraConfig:
    plain: dict[str, Any] = {"rank": 1, "lora_alpha": 1.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    selection: dict[str, Any] = {"exclude_modules": (), "layers_to_transform": (), "layers_pattern": ()}
    return PeftLoraConfig(target_modules=targets, **(plain | selection | fields))


def check_selection(config: PeftLoraConfig) -> None:
    """Hold what we select against what PEFT selects."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    values = {name: getattr(config, name) for name in fields}
    peft_config = SimpleNamespace(**{n: list(v) if isinstance(v, tuple) else v for n, v in values.items()})
    matcher = PatternMatcher()
    actual = [matcher.selects(path, config) for path in PATHS]
    excluded = "_ExcludedModule"
    expected = [check_target_module_exists(peft_config, path) for path in PATHS]
    assert actual == [bool(found) and type(found).__name__ != excluded for found in expected]


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj",),
        ("proj",),
        ("self_attn.q_proj", "lm_head"),
        ("model.layers.1.mlp.gate_proj",),
        ("layers.1.mlp.gate_proj", "embed_tokens"),
        r".*\.(q_proj|k_proj)",
        r"model\.layers\.[01]\..*proj",
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:gate_proj))",
        r"model\.layers\.(?!1\.).*q_proj",
        r"q_proj",
        r".*\.\d{2}\..*",
        r".*\.\d{,1}\.self_attn.*",
    ],
)
def test_targets_mean_what_peft_means(targets: str | tuple[str, ...]) -> None:
    check_selection(config_of(targets))


@pytest.mark.parametrize("excluded", [("k_proj",), ("mlp.experts.3.up_proj", "lm_head"), r".*\.11\..*", (), ""])
def test_exclusions_mean_what_peft_means(excluded: str | tuple[str, ...]) -> None:
    check_selection(config_of(("q_proj", "k_proj", "up_proj", "lm_head"), exclude_modules=excluded))


@pytest.mark.parametrize(
    "keys",
    [
        ("q_proj", "self_attn.q_proj"),
        ("self_attn.q_proj", "q_proj"),
        ("proj",),
        ("model.layers.1.mlp.gate_proj",),
        ("model.layers.1.mlp.gate.proj", "model_layers_1"),  # a plain dot stands for any character
        ("^model.layers.1.mlp.gate_proj", ".*k_proj"),
        (r"layers\.\d+\.self_attn\.(q|k)_proj",),
        ("q_proj|k_proj",),
        (r"(\w+)_proj",),
        ("layers.1.*",),
        ("",),
    ],
)
def test_rank_and_alpha_keys_mean_what_peft_means(keys: tuple[str, ...]) -> None:
    matcher = PatternMatcher()
    expected = [get_pattern_key(keys, path) for path in PATHS]
    actual = [matcher.first_key(path, keys, "f") for path in PATHS]
    assert [path if key is None else key for path, key in zip(PATHS, actual, strict=True)] == expected


@pytest.mark.parametrize(
    "patterns", [(), ("layers",), ("blocks", "layers"), ("model.layers",), ("h|layers",), ("l.*s",)]
)
@pytest.mark.parametrize("layers", [(0,), (1, 11), (3,)])
def test_layer_numbers_mean_what_peft_means(patterns: tuple[str, ...], layers: tuple[int, ...]) -> None:
    targets = ("q_proj", "up_proj", "lm_head", "model.layers.0.mlp.gate_proj")
    check_selection(config_of(targets, layers_to_transform=layers, layers_pattern=patterns))


PIECES = st.sampled_from(
    [
        "model",
        r"\.",
        ".",
        ".*",
        "layers",
        "1",
        r"\d",
        "+",
        "?",
        "(",
        ")",
        "|",
        "[",
        "]",
        "^",
        "$",
        "{1,2}",
        "q_proj",
        "\\w",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=10).map("".join))
def test_whatever_is_matched_is_matched_as_peft_would(pattern: str) -> None:
    matcher = PatternMatcher()
    try:
        actual: list[Any] = [matcher.selects(path, config_of(pattern)) for path in PATHS]
        keys = [matcher.first_key(path, [pattern], "f") for path in PATHS]
    except AdapterError:
        return
    assert actual == [re.fullmatch(pattern, path) is not None for path in PATHS]
    assert [path if key is None else key for path, key in zip(PATHS, keys, strict=True)] == [
        get_pattern_key([pattern], path) for path in PATHS
    ]


@pytest.mark.parametrize("pattern", [r"(\w|\w\w|\.)+\d", r"(\w|\w\w|\.)+[^a-z]", r"(?:\w|\w\w|\.)+\B"])
def test_an_expression_that_would_run_for_years_is_stopped_in_time(pattern: str) -> None:
    matcher = PatternMatcher(budget_seconds=0.1)
    begin = time.monotonic()
    with pytest.raises(AdapterFormatError) as caught:
        matcher.selects("model.layers.0.self_attn.q_proj" * 4, config_of(pattern))
    assert (caught.value.reason, caught.value.field) == ("PATTERN_TOO_SLOW", "adapter_config.target_modules")
    assert time.monotonic() - begin < 10  # the engine's clock is that of the processor: a busy machine stretches it


def test_the_budget_is_one_for_all_expressions_of_a_config() -> None:
    matcher = PatternMatcher(budget_seconds=0.05)
    with pytest.raises(AdapterFormatError) as caught:
        [matcher.selects("model.layers.0.q_proj", config_of(f".*{number}.*")) for number in range(100_000)]
    assert caught.value.reason == "PATTERN_TOO_SLOW"


def test_a_thousand_plain_keys_cost_no_budget() -> None:
    matcher = PatternMatcher(budget_seconds=0)
    keys = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(1000)]
    assert matcher.first_key("model.layers.999.self_attn.q_proj", keys, "f") == keys[-1]


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*",
        "x" * 5000,
        "(?:" * 2000 + ")" * 2000,
        r"\p{L}",
        "(?e)x",
        "(?:x){e<=1}",
        "x{s}",
        "[[a]]",
        "[a[b]",
        "[a--b]",
        "[a&&b]",
        "(a?){60000}",
        "(((a?){99}){99}){99}",
        "a{99999999999999999999}",
    ],
)
def test_an_expression_that_is_broken_or_dear_to_compile_is_refused(pattern: str) -> None:
    begin = time.monotonic()
    with pytest.raises(AdapterFormatError) as caught:
        PatternMatcher().selects("model", config_of(pattern))
    assert (caught.value.reason, caught.value.field) == ("BAD_PATTERN", "adapter_config.target_modules")
    assert time.monotonic() - begin < MATCHING_BUDGET_SECONDS


def test_the_key_at_fault_is_named() -> None:
    with pytest.raises(AdapterFormatError) as caught:
        PatternMatcher().first_key("model", ["plain", "(("], "rank_pattern")
    assert caught.value.field == 'adapter_config.rank_pattern["(("]'
