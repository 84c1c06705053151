"""Sampling parameters: what an unset field becomes, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_bases.spec import GenerationDefaults
from motley_server.asked import AskedSampling
from motley_server.errors import InvalidArgumentError
from motley_server.sampling import SamplingFacts, fill_sampling

FACTS = SamplingFacts(GenerationDefaults(eos_token_ids=(2, 7)), vocab_size=100, default_max_new_tokens=20)
SAMPLING_CHECKPOINT = SamplingFacts(
    GenerationDefaults((2,), temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1), 100, 20
)


def test_unset_fields_take_the_protos_defaults() -> None:
    filled = fill_sampling(AskedSampling(seed=3), FACTS, num_free_tokens=50)
    assert filled.max_new_tokens == 20
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.0, 1.0, 0, 0.0)
    assert (filled.repetition_penalty, filled.n, filled.min_new_tokens, filled.logprobs) == (1.0, 1, 0, None)
    assert (filled.stop_token_ids, filled.eos_token_ids, filled.seed) == ((2, 7), (2, 7), 3)


def test_unset_fields_take_the_checkpoints_defaults_first() -> None:
    filled = fill_sampling(AskedSampling(), SAMPLING_CHECKPOINT, num_free_tokens=50)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.7, 0.9, 40, 0.05)
    assert filled.repetition_penalty == 1.1


def test_the_checkpoints_length_comes_before_the_servers() -> None:
    stored = dataclasses.replace(FACTS, defaults=dataclasses.replace(FACTS.defaults, max_new_tokens=9))
    assert fill_sampling(AskedSampling(), stored, num_free_tokens=50).max_new_tokens == 9
    assert fill_sampling(AskedSampling(), stored, num_free_tokens=4).max_new_tokens == 4
    assert fill_sampling(AskedSampling(max_new_tokens=11), stored, num_free_tokens=50).max_new_tokens == 11


def test_set_fields_win_even_when_they_are_zero() -> None:
    asked = AskedSampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=0)
    filled = fill_sampling(asked, SAMPLING_CHECKPOINT, num_free_tokens=50)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.0, 1.0, 0, 0.0)
    assert (filled.repetition_penalty, filled.seed) == (1.0, 0)


def test_stop_ids_are_the_callers_and_the_checkpoints_unless_eos_is_ignored() -> None:
    asked = AskedSampling(stop_token_ids=(9, 2))
    assert fill_sampling(asked, FACTS, num_free_tokens=50).stop_token_ids == (2, 7, 9)
    ignoring = fill_sampling(dataclasses.replace(asked, ignore_eos=True), FACTS, num_free_tokens=50)
    assert (ignoring.stop_token_ids, ignoring.eos_token_ids) == ((2, 9), (2, 7))


def test_the_default_length_is_cut_to_the_context_but_a_wish_is_refused() -> None:
    assert fill_sampling(AskedSampling(), FACTS, num_free_tokens=5).max_new_tokens == 5
    assert fill_sampling(AskedSampling(max_new_tokens=5), FACTS, num_free_tokens=5).max_new_tokens == 5
    with pytest.raises(InvalidArgumentError) as caught:
        fill_sampling(AskedSampling(max_new_tokens=6), FACTS, num_free_tokens=5)
    assert (caught.value.reason, caught.value.field) == ("CONTEXT_EXCEEDED", "sampling.max_new_tokens")


def test_unset_seeds_differ() -> None:
    seeds = {fill_sampling(AskedSampling(), FACTS, num_free_tokens=5).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)


BAD_SAMPLING: list[tuple[AskedSampling, str]] = [
    (AskedSampling(max_new_tokens=0), "max_new_tokens"),
    (AskedSampling(max_new_tokens=-1), "max_new_tokens"),
    *((AskedSampling(temperature=value), "temperature") for value in (-0.01, 100.1, math.nan, math.inf, -math.inf)),
    *((AskedSampling(top_p=value), "top_p") for value in (0.0, -0.1, 1.0001, math.nan)),
    (AskedSampling(top_k=-1), "top_k"),
    *((AskedSampling(min_p=value), "min_p") for value in (-0.1, 1.1, math.nan)),
    *((AskedSampling(presence_penalty=value), "presence_penalty") for value in (-2.1, 2.1, math.nan)),
    *((AskedSampling(frequency_penalty=value), "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
    *((AskedSampling(repetition_penalty=value), "repetition_penalty") for value in (1e-38, 0.0099, 100.1, math.nan)),
    (AskedSampling(n=0), "n"),
    (AskedSampling(n=17), "n"),
    (AskedSampling(stop=("x",) * 17), "stop"),
    (AskedSampling(stop=("x", "")), "stop[1]"),
    (AskedSampling(stop=("x" * 1025,)), "stop[0]"),
    (AskedSampling(stop_token_ids=(3, 100)), "stop_token_ids[1]"),
    (AskedSampling(stop_token_ids=(-1,)), "stop_token_ids[0]"),
    (AskedSampling(stop_token_ids=(3,) * 1025), "stop_token_ids"),
    (AskedSampling(logit_bias=((3, 0.0),) * 1025), "logit_bias"),
    (AskedSampling(min_new_tokens=-1), "min_new_tokens"),
    (AskedSampling(min_new_tokens=21), "min_new_tokens"),
    (AskedSampling(logprobs=-1), "logprobs"),
    (AskedSampling(logprobs=21), "logprobs"),
    (AskedSampling(logit_bias=((100, 0.0),)), "logit_bias[100]"),
    *((AskedSampling(logit_bias=((5, value),)), "logit_bias[5]") for value in (100.1, -100.1, math.nan, math.inf)),
]


@pytest.mark.parametrize(("asked", "field"), BAD_SAMPLING, ids=lambda value: str(value)[-60:])
def test_values_out_of_range_are_refused_by_field(asked: AskedSampling, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        fill_sampling(asked, FACTS, num_free_tokens=50)
    assert caught.value.field == f"sampling.{field}"


@given(
    temperature=st.none() | st.floats(),
    top_p=st.none() | st.floats(),
    min_p=st.none() | st.floats(),
    penalty=st.none() | st.floats(),
    top_k=st.none() | st.integers(-5, 5),
    length=st.none() | st.integers(-5, 60),
)
def test_whatever_passes_is_within_range(
    temperature: float | None, top_p: float | None, min_p: float | None, penalty: float | None, top_k: int | None,
    length: int | None,
) -> None:  # fmt: skip
    asked = AskedSampling(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        top_k=top_k,
        max_new_tokens=length,
    )
    try:
        filled = fill_sampling(asked, FACTS, num_free_tokens=50)
    except InvalidArgumentError:
        return
    assert 0 <= filled.temperature <= 100
    assert 0 < filled.top_p <= 1
    assert 0 <= filled.min_p <= 1
    assert 0.01 <= filled.repetition_penalty <= 100
    assert filled.top_k >= 0
    assert 1 <= filled.max_new_tokens <= 50
