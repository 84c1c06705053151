"""Sizes in a config that no model has: refused by the field's name, before anything is built of them or read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VARIANTS, build_checkpoint, edit_json
from motley_bases.admission import check_config, check_stored_config
from motley_bases.errors import BaseError, UnreadableBaseError
from motley_bases.loader import load_base
from motley_bases.stored_spec import read_spec
from motley_trainer.bases.plan import Question, make_plan
from transformers import AutoConfig

SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
GPT2_SIZES = ("n_layer", "n_embd", "n_head", "n_positions")


def check(fields: Mapping[str, Any], architecture: str) -> None:
    """Check a small config with some fields changed, as it is stored and then as it is parsed."""
    stored = {**(ARCHITECTURES | VARIANTS)[architecture], **fields}
    check_stored_config(stored)
    check_config(AutoConfig.for_model(**json.loads(json.dumps(stored))))


def refusal(fields: Mapping[str, Any], architecture: str) -> BaseError:
    with pytest.raises(BaseError) as caught:
        check(fields, architecture)
    return caught.value


@pytest.mark.parametrize("value", [0, -1, -(10**30), 10**30, 2.5, float("nan"), "64", "", True, {}])
@pytest.mark.parametrize(
    ("architecture", "name"), [*(("llama", name) for name in SIZES), *(("gpt2", name) for name in GPT2_SIZES)]
)
def test_what_is_no_size_is_refused_by_its_name(architecture: str, name: str, value: object) -> None:
    error = refusal({name: value}, architecture)
    assert isinstance(error, UnreadableBaseError)
    assert (error.reason, error.field) == ("BROKEN_CONFIG", name)
    assert name in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("architecture", "fields", "field"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("gpt2", {"n_embd": 3}, "n_head"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": -(10**30)}, "sliding_window"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(architecture: str, fields: dict[str, Any], field: str) -> None:
    error = refusal(fields, architecture)
    assert (error.reason, error.field) == ("BROKEN_CONFIG", field)


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", float("inf")), ("factor", float("nan")), ("factor", 0.0), ("factor", 1e300),
     ("original_max_position_embeddings", -4), ("original_max_position_embeddings", 10**30)],
)  # fmt: skip
def test_positions_stretched_beyond_counting_are_refused(name: str, value: float) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model(**ARCHITECTURES["llama"])
    config.rope_parameters = {**yarn, name: value}
    with pytest.raises(UnreadableBaseError) as caught:
        check_config(config)
    assert (caught.value.reason, caught.value.field) == ("BROKEN_CONFIG", f"rope_parameters.{name}")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama3_rope", "mixtral", "gpt2"])
def test_sizes_of_models_that_are_served_pass(architecture: str) -> None:
    check({}, architecture)


def test_serving_planning_and_describing_refuse_alike(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "base")
    edit_json(directory / "config.json", num_hidden_layers=0)
    refusals = []
    for attempt in (
        lambda: load_base(directory, dtype="float32", device=torch.device("cpu")),
        lambda: make_plan(Question(str(directory), 2**20)),
        lambda: read_spec(directory),
    ):
        with pytest.raises(UnreadableBaseError) as caught:
            attempt()
        refusals.append((caught.value.reason, caught.value.field))
    assert refusals == [("BROKEN_CONFIG", "num_hidden_layers")] * 3
