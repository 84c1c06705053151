"""What a checkpoint stores of generating is what a request could have asked for, or the base does not load."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EOS_ID, build_checkpoint, edit_json
from motley_bases.errors import BaseError, UnreadableBaseError, UnsupportedBaseError
from motley_bases.loader import load_base
from motley_bases.spec import GenerationDefaults

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("pristine") / "llama")


@pytest.fixture
def llama(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "llama")


def defaults_of(directory: Path) -> GenerationDefaults:
    return load_base(directory, dtype="float32", device=CPU).spec.generation


def refusal(directory: Path) -> BaseError:
    with pytest.raises(BaseError) as caught:
        load_base(directory, dtype="float32", device=CPU)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 100.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 3),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_k", -5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", 101.0),
        ("repetition_penalty", math.nan),
        ("max_new_tokens", 0),
        ("eos_token_id", -1),
        ("eos_token_id", 10_000),
        ("eos_token_id", [EOS_ID, 10_000]),
    ],
)
def test_a_default_that_no_request_could_ask_for_is_refused(name: str, value: Any, llama: Path) -> None:
    edit_json(llama / "generation_config.json", do_sample=True, **{name: value})
    error = refusal(llama)
    assert isinstance(error, UnsupportedBaseError)
    assert (error.reason, error.field) == ("GENERATION_CONFIG", f"generation_config.{name}")
    assert str(value[-1] if isinstance(value, list) else value) in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", "yes"),
        ("do_sample", 1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", [0.9]),
        ("top_k", 50.0),
        ("top_k", "50"),
        ("min_p", {}),
        ("repetition_penalty", "1"),
        ("max_new_tokens", 1.5),
        ("eos_token_id", "x"),
        ("eos_token_id", True),
        ("eos_token_id", ["</s>"]),
        ("eos_token_id", [[2]]),
        ("eos_token_id", 2.0),
    ],
)
def test_a_default_of_another_type_is_unreadable(name: str, value: Any, llama: Path) -> None:
    edit_json(llama / "generation_config.json", **{name: value})
    error = refusal(llama)
    assert isinstance(error, UnreadableBaseError)
    assert (error.reason, error.field) == ("BROKEN_GENERATION_CONFIG", f"generation_config.{name}")
    assert repr(value) in error.message


@pytest.mark.parametrize(
    "stored",
    [
        {"temperature": 0, "do_sample": True, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 0.01},
        {"temperature": 100, "do_sample": True, "top_p": 1e-9, "min_p": 1, "repetition_penalty": 100},
        {"top_k": 50, "top_p": 1.0, "max_new_tokens": 1, "eos_token_id": [0, EOS_ID]},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(stored: dict[str, Any], llama: Path) -> None:
    edit_json(llama / "generation_config.json", **stored)
    defaults = defaults_of(llama)
    kept = {name: value for name, value in stored.items() if name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    assert {name: getattr(defaults, name) for name in kept} == kept
    assert defaults.temperature == (stored["temperature"] if "do_sample" in stored else None)


def test_the_last_token_of_the_vocabulary_may_end_a_sequence(llama: Path) -> None:
    num_tokens = load_base(llama, dtype="float32", device=CPU).spec.vocab_size
    edit_json(llama / "generation_config.json", eos_token_id=num_tokens - 1)
    assert defaults_of(llama).eos_token_ids == (num_tokens - 1,)
    edit_json(llama / "generation_config.json", eos_token_id=num_tokens)
    assert refusal(llama).field == "generation_config.eos_token_id"


@pytest.mark.parametrize("do_sample", [False, None])
@pytest.mark.parametrize("temperature", [-1, 0, 1000.0, math.nan])
def test_a_temperature_that_is_not_followed_may_be_anything(
    do_sample: bool | None, temperature: float, llama: Path
) -> None:
    edit_json(llama / "generation_config.json", do_sample=do_sample, temperature=temperature)
    assert defaults_of(llama).temperature == 0.0


def test_null_is_as_good_as_absent(llama: Path) -> None:
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    nulls = ", ".join(f'"{name}": null' for name in (*names, "eos_token_id"))
    (llama / "generation_config.json").write_text(f"{{{nulls}}}", encoding="utf-8")
    assert defaults_of(llama) == GenerationDefaults((EOS_ID,))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_generation_config_that_is_no_object_is_not_passed_over(content: bytes, llama: Path) -> None:
    (llama / "generation_config.json").write_bytes(content)
    error = refusal(llama)
    assert error.reason == "BROKEN_JSON"
    assert "generation_config.json" in error.message


def test_without_a_generation_config_config_json_is_read_and_checked_alike(llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    edit_json(llama / "config.json", do_sample=True, temperature=0.5, top_k=7)
    assert defaults_of(llama) == GenerationDefaults((EOS_ID,), temperature=0.5, top_k=7)
    edit_json(llama / "config.json", temperature=-1)
    error = refusal(llama)
    assert (error.reason, error.field) == ("GENERATION_CONFIG", "temperature")


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_an_eos_id_of_the_config_is_checked_alike(has_generation_config: bool, llama: Path) -> None:
    edit_json(llama / "generation_config.json", eos_token_id=None)
    if not has_generation_config:
        (llama / "generation_config.json").unlink()
    edit_json(llama / "config.json", eos_token_id=[EOS_ID, 10_000])
    error = refusal(llama)
    assert (error.reason, error.field) == ("GENERATION_CONFIG", "eos_token_id")


def test_a_field_that_only_transformers_refuses_is_refused_in_its_words(llama: Path) -> None:
    edit_json(llama / "generation_config.json", early_stopping="sometimes")
    error = refusal(llama)
    assert error.reason == "MODEL_CONSTRUCTION"
    assert "sometimes" in error.message
