"""The sampler against a plain definition of it, one row and one token at a time in Python's own numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.distribution import draw, first_argmax, ranked
from motley_server.engine.philox import philox4x32, token_uniform
from motley_server.engine.sampler import SampledToken, Sampler, score_rows
from motley_server.engine.types import SamplingParams
from motley_server.errors import InternalError
from sampler_definition import (
    GREEDY,
    SAMPLED,
    Candidate,
    assert_close,
    logits_of,
    logprobs_by_definition,
    params_strategy,
    row_of,
    token_by_definition,
    token_ids,
)
from torch import Tensor


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[Candidate]]:
    vocab_size = draw(st.sampled_from([7, 65, 513, 1500]))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=6)
    row = st.builds(Candidate, params_strategy(vocab_size), st.integers(0, 3), tokens, tokens)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    logits = logits_of(len(rows), vocab_size, draw(st.integers(0, 2**32)), draw(st.sampled_from([0.1, 2.0, 6.0])))
    if draw(st.booleans()):
        logits = logits.round()  # ties everywhere
    return logits, rows


@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_every_token_is_the_one_of_the_definition(batch: tuple[Tensor, list[Candidate]]) -> None:
    logits, rows = batch
    before = logits.clone()
    tokens = Sampler().sample(logits, [row.row for row in rows])
    for values, row, token in zip(logits.tolist(), rows, tokens, strict=True):
        assert token.error is None
        assert token.token_id == token_by_definition(values, row)
        if row.params.logprobs is None:
            assert token.logprobs is None
        else:
            assert token.logprobs is not None
            assert_close(token.logprobs, logprobs_by_definition(values, token.token_id, row.params.logprobs))
    assert torch.equal(logits, before)


@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_neighbours_change_nothing(batch: tuple[Tensor, list[Candidate]], data: st.DataObject) -> None:
    logits, rows = batch[0], [candidate.row for candidate in batch[1]]
    together = Sampler().sample(logits, rows)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = Sampler().sample(logits[order], [rows[index] for index in order])
    assert [shuffled[order.index(index)] for index in range(len(rows))] == together
    assert [Sampler().sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)] == together


@pytest.mark.parametrize("params", [SAMPLED, replace(SAMPLED, top_p=0.9), replace(SAMPLED, top_k=2000, min_p=0.001)])
def test_a_real_vocabulary_in_many_chunks_agrees_with_the_definition(params: SamplingParams) -> None:
    logits = logits_of(20, 40_000, scale=2.0)
    rows = [Candidate(replace(params, seed=seed), 0, (), ()) for seed in range(20)]
    assert token_ids(logits, [row.row for row in rows]) == [
        token_by_definition(values, row) for values, row in zip(logits.tolist(), rows, strict=True)
    ]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(3, 3000)
    logits[1, [2999, 700, 1800]] = 1.0
    logits[2, 2999] = 1.0
    assert token_ids(logits, [row_of(GREEDY)] * 3) == [0, 700, 2999]


@pytest.mark.parametrize("width", [1, 3, 64, 511, 512, 700])
def test_ranking_is_a_stable_sort(width: int) -> None:
    values = logits_of(4, 600).round()
    values[3] = 0.0
    expected = values.sort(dim=-1, descending=True, stable=True)
    kept, ids = ranked(values, width)
    assert torch.equal(ids, expected.indices[:, :width])
    assert torch.equal(kept, expected.values[:, :width])


@pytest.mark.parametrize("vocab_size", [1, 511, 512, 513, 1024, 1500])
def test_the_maximum_by_blocks_is_the_maximum(vocab_size: int) -> None:
    values = logits_of(5, vocab_size).round()
    maximum, index = first_argmax(values)
    assert torch.equal(maximum, values.amax(-1))
    assert index.tolist() == [line.index(max(line)) for line in values.tolist()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_seed_candidate_and_position_each_name_another_number() -> None:
    names = [(seed, 0, 0) for seed in (0, 1, 2**32, 2**63)] + [(0, 1, 0), (0, 0, 1), (0, 2, 3), (0, 3, 2)]
    numbers = {token_uniform(*name) for name in names}
    assert len(numbers) == len(names)
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert token_uniform(-1, 0, 0) == token_uniform(2**64 - 1, 0, 0)


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def test_uniform_numbers_are_uniform() -> None:
    num_draws, num_bins = 20_000, 50
    for numbers in (
        [token_uniform(1, 0, position) for position in range(num_draws)],
        [token_uniform(seed, 0, 0) for seed in range(num_draws)],
    ):
        counts = Counter(int(number * num_bins) for number in numbers)
        statistic = chi_square([counts[index] for index in range(num_bins)], [num_draws / num_bins] * num_bins)
        assert statistic < 100  # 49 degrees of freedom: above 100 once in 30,000


def distribution_of(params: SamplingParams, logits: Tensor, num_draws: int) -> Counter[int]:
    rows = [row_of(replace(params, seed=seed), output=(0,) * (seed % 5)) for seed in range(num_draws)]
    return Counter(token_ids(logits.expand(num_draws, -1), rows))


@pytest.mark.parametrize(
    ("params", "shares"),
    [
        (replace(SAMPLED, temperature=1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (replace(SAMPLED, temperature=0.5), [0.5614, 0.3158, 0.0789, 0.0351, 0.0088]),
        (replace(SAMPLED, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (replace(SAMPLED, top_p=0.8), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        (replace(SAMPLED, min_p=0.2), [0.4 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.1 / 0.95, 0]),
        (replace(SAMPLED, top_k=3, top_p=0.8), [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(params: SamplingParams, shares: list[float]) -> None:
    num_draws = 4000
    counts = distribution_of(params, torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log(), num_draws)
    possible = [token_id for token_id, share in enumerate(shares) if share > 0]
    assert set(counts) == set(possible)
    expected = [shares[token_id] * num_draws for token_id in possible]
    assert (
        chi_square([counts[token_id] for token_id in possible], expected) < 25
    )  # 4 degrees of freedom: once in 20,000


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    assert set(distribution_of(replace(SAMPLED, top_p=0.5), logits, 60)) == {1}
    assert set(distribution_of(replace(SAMPLED, top_p=0.51), logits, 60)) == {0, 1}  # of equals, the lowest id
    assert set(distribution_of(replace(SAMPLED, top_p=0.76), logits, 60)) == {0, 1, 2}


def test_top_p_that_reaches_beyond_the_first_ranks_is_exact() -> None:
    logits = torch.zeros(5000)
    drawn = distribution_of(replace(SAMPLED, top_p=0.5), logits, 300)
    assert max(drawn) < 2500
    assert max(drawn) > 2300
    assert min(drawn) < 200


@pytest.mark.parametrize("params", [SAMPLED, replace(SAMPLED, top_p=0.999999)])
def test_a_number_on_the_border_of_two_tokens_takes_the_second(params: SamplingParams) -> None:
    equals = torch.zeros(3, 1024)
    assert draw(equals[:, :2], [SAMPLED] * 2, [0.0, 0.5]).tolist() == [0, 1]
    assert draw(equals[:, :4], [replace(SAMPLED, top_k=2)] * 2, [0.0, 0.5]).tolist() == [0, 1]
    assert draw(equals, [SAMPLED] * 3, [0.5 - 2**-40, 0.5, 0.5 + 2**-40]).tolist() == [511, 512, 512]
    assert draw(equals[:1], [params], [1 - 2**-53]).tolist() == [1023]


@pytest.mark.parametrize("params", [SAMPLED, replace(SAMPLED, top_k=2)])
def test_a_share_too_small_to_count_is_none(params: SamplingParams) -> None:
    assert draw(torch.tensor([[0.0, -20.0]]), [params], [1 - 2**-53]).tolist() == [1]
    assert draw(torch.tensor([[0.0, -30.0]]), [params], [1 - 2**-53]).tolist() == [0]


def test_nan_and_infinity_fail_their_own_rows_only() -> None:
    logits = logits_of(8, 700)
    rows = [row_of(replace(GREEDY if index % 2 else SAMPLED, logprobs=1, top_k=5 * (index == 2))) for index in range(8)]
    healthy = Sampler().sample(logits, rows)
    for index, value in ((1, math.nan), (2, math.nan), (4, math.inf), (5, math.inf)):
        logits[index, 650] = value
    logits[6] = -math.inf
    tokens = Sampler().sample(logits, rows)
    assert [index for index, token in enumerate(tokens) if token.error] == [1, 2, 4, 5, 6]
    assert [tokens[index] for index in (0, 3, 7)] == [healthy[index] for index in (0, 3, 7)]
    assert all(token.logprobs is None for token in tokens if token.error)


def test_a_request_that_forbids_every_token_fails_alone() -> None:
    every_token = replace(SAMPLED, min_new_tokens=1, stop_token_ids=(0, 1, 2))
    tokens = Sampler().sample(torch.zeros(2, 3), [row_of(every_token), row_of(GREEDY)])
    assert tokens[0].error is not None
    assert tokens[1] == SampledToken(0)


def test_a_masked_token_is_never_drawn_and_costs_its_row_nothing() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert set(distribution_of(SAMPLED, logits, 40)) == {1, 3}
    assert set(distribution_of(replace(SAMPLED, top_k=3), logits, 40)) == {1, 3}


def test_ids_outside_the_vocabulary_mean_nothing() -> None:
    params = replace(
        GREEDY, logit_bias=((4, 9.0), (-1, 9.0)), repetition_penalty=2.0, min_new_tokens=1, eos_token_ids=(4, -1)
    )
    logits = torch.tensor([[0.0, 1.0, 0.5, 0.9]])
    assert token_ids(logits, [row_of(params, prompt=(1, 4))]) == [3]


def test_an_end_is_forbidden_until_the_output_is_long_enough() -> None:
    params = replace(GREEDY, min_new_tokens=2, eos_token_ids=(0,), stop_token_ids=(1,))
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    assert token_ids(logits, [row_of(params, output=(2,))]) == [2]
    assert token_ids(logits, [row_of(params, output=(2, 2))]) == [0]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    assert token_ids(logits, [row_of(replace(GREEDY, repetition_penalty=1.5), prompt=(0,))]) == [1]
    negative = torch.tensor([[-0.5, -0.6]])
    assert token_ids(negative, [row_of(replace(GREEDY, repetition_penalty=1.5), prompt=(0,))]) == [1]
    assert token_ids(logits, [row_of(replace(GREEDY, presence_penalty=1.5), prompt=(0,))]) == [0]
    assert token_ids(logits, [row_of(replace(GREEDY, presence_penalty=1.5), output=(0,))]) == [1]


def test_no_step_without_logprobs_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("nobody asked for log-probabilities")

    monkeypatch.setattr(Tensor, "log_softmax", refuse)
    assert token_ids(torch.eye(3), [row_of(GREEDY)] * 3) == [0, 1, 2]
    with pytest.raises(AssertionError, match="nobody asked"):
        Sampler().sample(torch.eye(3), [row_of(replace(GREEDY, logprobs=0))] * 3)


@pytest.mark.parametrize("num_top", [0, 1, 5, 400])
def test_scores_are_those_of_the_raw_distribution(num_top: int) -> None:
    logits = logits_of(30, 300).round()
    wanted = list(range(100, 130))
    for values, token_id, score in zip(logits.tolist(), wanted, score_rows(logits, wanted, num_top), strict=True):
        assert_close(score, logprobs_by_definition(values, token_id, num_top))
    assert score_rows(logits[:0], [], num_top) == []


def test_scoring_a_row_with_nan_is_a_typed_error() -> None:
    logits = logits_of(3, 50)
    logits[1, 7] = math.nan
    with pytest.raises(InternalError) as caught:
        score_rows(logits, [0, 1, 2], 0)
    assert caught.value.reason == "BAD_LOGITS"
