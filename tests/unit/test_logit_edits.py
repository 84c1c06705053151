"""The account of a candidate's tokens: right at every step of a growing text, and no dearer for its length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.logit_edits import LogitEdits, edits_of
from motley_server.engine.sampler import SamplingRow
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import GenerateRequest
from sampler_definition import GREEDY, SAMPLED, Candidate, logits_of, params_strategy, token_by_definition, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def row_of_sequence(sequence: Sequence) -> SamplingRow:
    return SamplingRow(sequence.params, sequence.index, sequence.num_output_tokens, sequence.logit_edits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_growing_candidates_take_the_tokens_of_the_definition_at_every_step(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([7, 65]))
    prompts = st.lists(st.integers(-1, vocab_size), max_size=6).map(tuple)  # ids that the vocabulary lacks included
    several_params = data.draw(st.lists(params_strategy(vocab_size), min_size=1, max_size=4))
    sequences = [
        Sequence(GenerateRequest("r", "local", data.draw(prompts), params), index, b"")
        for index, params in enumerate(several_params)
    ]
    for step in range(data.draw(st.integers(1, 12))):
        logits = logits_of(len(sequences), vocab_size, seed=step).round()  # few ids, so that most come again
        expected = []
        for values, sequence in zip(logits.tolist(), sequences, strict=True):
            known = [token_id for token_id in sequence.request.prompt_token_ids if 0 <= token_id < vocab_size]
            output = sequence.token_ids[sequence.num_prompt_tokens :]
            expected.append(token_by_definition(values, Candidate(sequence.params, sequence.index, known, output)))
        assert token_ids(logits, [row_of_sequence(sequence) for sequence in sequences]) == expected
        if step == 6:
            sequences[0].forget_computed()  # as after a preemption
        for sequence, token_id in zip(sequences, expected, strict=True):
            sequence.append(token_id)


class PromptReadOnce(tuple[int, ...]):
    """A prompt that counts how often somebody goes through it."""

    num_reads = 0

    def __iter__(self) -> Iterator[int]:
        type(self).num_reads += 1
        return super().__iter__()


class Work(TorchDispatchMode):
    """Note each tensor operation and the number of elements of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.done.append((str(func), result.numel() if isinstance(result, Tensor) else 0))
        return result


def test_a_step_does_the_same_work_however_long_the_text_is() -> None:
    params = replace(
        GREEDY, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.01, logit_bias=((3, 1.0),)
    )
    prompt = PromptReadOnce(list(range(10)) * 500)
    sequence = Sequence(GenerateRequest("r", "local", prompt, params), 0, b"")
    logits, work_of_steps = logits_of(1, 600), []
    PromptReadOnce.num_reads = 0
    for step in range(2000):
        with Work() as work:
            token_ids(logits, [row_of_sequence(sequence)])
        work_of_steps.append(work.done)
        sequence.append(step % 10)
    assert PromptReadOnce.num_reads == 1
    assert work_of_steps[20] == work_of_steps[-1]
    assert max(size for name, size in work_of_steps[-1] if "index_select" in name) == 10


def test_a_step_looks_at_no_token_but_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = LogitEdits._take
    monkeypatch.setattr(LogitEdits, "_take", lambda edits, token_id: (taken.append(token_id), take(edits, token_id)))
    params = replace(GREEDY, frequency_penalty=0.5, repetition_penalty=1.1)
    sequence = Sequence(GenerateRequest("r", "local", (1, 2), params), 0, b"")
    for step in range(30):
        token_ids(logits_of(1, 50), [row_of_sequence(sequence)])
        sequence.append(step)
    assert taken == list(range(29))


def test_only_a_request_that_edits_its_logits_keeps_account_of_its_tokens() -> None:
    for params in (GREEDY, SAMPLED, replace(SAMPLED, top_k=5, stop_token_ids=(1,), eos_token_ids=(1,))):
        assert edits_of(params, (1, 2)) is None
    for change in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": ((1, 1.0),)},
        {"min_new_tokens": 1},
    ):
        assert edits_of(replace(GREEDY, **change), (1, 2)) is not None
