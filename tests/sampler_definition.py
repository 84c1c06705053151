"""A plain definition of the sampler, one row and one token at a time in Python's own numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from motley_server.engine.logit_edits import edits_of
from motley_server.engine.philox import token_uniform
from motley_server.engine.sampler import Sampler, SamplingRow
from motley_server.engine.types import SamplingParams, TokenLogprobs
from torch import Tensor

GREEDY = SamplingParams(max_new_tokens=8)
SAMPLED = replace(GREEDY, temperature=1.0, seed=7)


@dataclass(frozen=True)
class Candidate:
    """A row as the definition sees it: with all of its tokens."""

    params: SamplingParams
    index: int
    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def row(self) -> SamplingRow:
        return row_of(self.params, self.prompt, self.output, self.index)


def row_of(
    params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = (), candidate: int = 0
) -> SamplingRow:
    edits = edits_of(params, prompt)
    for token_id in output if edits is not None else ():
        edits.add(token_id)
    return SamplingRow(params, candidate, len(output), edits)


def logits_of(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def token_ids(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    tokens = Sampler().sample(logits, rows)
    assert [token.error for token in tokens] == [None] * len(rows)
    return [token.token_id for token in tokens]


def edited_by_definition(logits: list[float], row: Candidate) -> list[float]:
    params, edited = row.params, list(logits)
    for token_id in {*row.prompt, *row.output}:
        value, penalty = np.float32(edited[token_id]), np.float32(params.repetition_penalty)
        edited[token_id] = float(value * penalty if value < 0 else value / penalty)
    bias: dict[int, float] = {}
    for token_id, count in Counter(row.output).items():
        bias[token_id] = -(params.presence_penalty + params.frequency_penalty * count)
    for token_id, added in params.logit_bias:
        bias[token_id] = bias.get(token_id, 0.0) + added
    for token_id, added in bias.items():
        edited[token_id] = float(np.float32(edited[token_id]) + np.float32(added))
    if len(row.output) < params.min_new_tokens:
        for token_id in (*params.eos_token_ids, *params.stop_token_ids):
            edited[token_id] = -math.inf
    return edited


def token_by_definition(logits: list[float], row: Candidate) -> int:
    """Sort everything, keep what the filters keep, walk the vocabulary until the uniform number is used up."""
    params, edited = row.params, edited_by_definition(logits, row)
    order = sorted(range(len(edited)), key=edited.__getitem__, reverse=True)  # stable: of equals, the lowest id first
    if params.temperature == 0.0:
        return order[0]
    peak = edited[order[0]]
    weights = [round(math.exp((value - peak) / params.temperature) * 2**33) for value in edited]
    kept = order[: params.top_k] if params.top_k else order
    if params.top_p < 1.0:
        goal, mass, size = params.top_p * sum(weights[token_id] for token_id in kept), 0, 0
        while mass < goal:
            mass, size = mass + weights[kept[size]], size + 1
        kept = kept[:size]
    kept = [token_id for token_id in kept if weights[token_id] >= params.min_p * 2**33]
    total = sum(weights[token_id] for token_id in kept)
    target = math.floor(token_uniform(params.seed, row.index, len(row.output)) * float(total))
    for token_id in sorted(kept):
        if target < weights[token_id]:
            return token_id
        target -= weights[token_id]
    raise AssertionError("the uniform number is below 1")


def logprobs_by_definition(logits: list[float], token_id: int, count: int) -> TokenLogprobs:
    total = math.log(math.fsum(math.exp(value) for value in logits))
    order = sorted(range(len(logits)), key=lambda other: (-logits[other], other))[:count]
    return TokenLogprobs(token_id, logits[token_id] - total, tuple((other, logits[other] - total) for other in order))


def assert_close(actual: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (actual.token_id, [token_id for token_id, _ in actual.top]) == (
        expected.token_id,
        [token_id for token_id, _ in expected.top],
    )
    values = [actual.logprob, *(value for _, value in actual.top)]
    assert values == pytest.approx([expected.logprob, *(value for _, value in expected.top)], abs=1e-5)


@st.composite
def params_strategy(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    ids = st.integers(0, vocab_size - 1)
    biases = draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 0.25, 3.0]), max_size=3))
    return SamplingParams(
        max_new_tokens=8,
        temperature=draw(st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-6])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 100, 10**6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=tuple(biases.items()),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=2))),
        eos_token_ids=tuple(draw(st.lists(ids, max_size=2))),
        min_new_tokens=draw(st.sampled_from([0, 0, 3])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
