"""Held-out samples are measured as a server would answer them, and a gate asks what it says."""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import replace

import pytest
import torch
from architectures import EOS_ID, build_model, make_tokenizer
from motley_trainer.data.samples import Sample
from motley_trainer.data.training_data import batches_of
from motley_trainer.errors import DataError, DivergedError
from motley_trainer.job.evaluation import (
    MAX_ANSWERED,
    Evaluation,
    Verdict,
    answered,
    check_gate,
    exact_match,
    greedy,
    judge,
    mean_loss,
    measure,
    until_end,
)
from motley_trainer.spec.settings import GateSettings
from small_trainings import VOCABULARY, random_data
from transformers import PreTrainedModel

TOKENIZER = make_tokenizer("byte_level")
PROMPTS = [[5, 9, 30, 7, 8, 9, 10, 11, 12, 13], [20, 21], [40, 3, 9, 50, 33]]


def model(family: str = "llama") -> PreTrainedModel:
    return build_model(family, vocab_size=len(TOKENIZER))


def says(asked: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Generate by transformers, for one prompt alone."""
    given = asked.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=count,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = given[0, len(prompt) :].tolist()
    return tokens


def sample(prompt: list[int], answer: list[int]) -> Sample:
    tokens = array("i", [*prompt, *answer])
    return Sample(1, tokens, ((len(prompt), len(tokens)),), len(prompt))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_greedy_answers_are_transformers_own_whatever_shares_the_batch(family: str) -> None:
    asked = model(family)
    assert greedy(asked, PROMPTS, 9, {-1}) == [says(asked, prompt, 9) for prompt in PROMPTS]


def test_answers_are_not_gone_on_with_once_all_have_ended() -> None:
    asked = model()
    first = [says(asked, prompt, 1)[0] for prompt in PROMPTS]
    assert [answer[0] for answer in greedy(asked, PROMPTS, 9, set(first))] == first
    assert len(greedy(asked, PROMPTS, 9, set(first))[0]) == 1
    assert len(greedy(asked, PROMPTS, 9, {first[0]})[0]) > 1


def test_an_answer_is_right_if_it_is_the_text_and_then_ends() -> None:
    asked = model()
    spoken = [says(asked, prompt, 5) for prompt in PROMPTS]
    ends = {spoken[0][2]}  # what the model happens to say is declared to end an answer
    right = sample(PROMPTS[0], until_end(spoken[0], ends))
    assert exact_match(asked, TOKENIZER, [right], ends) == 1.0
    wrong = sample(PROMPTS[0], [spoken[0][0], (spoken[0][1] + 1) % 50 + 5, *ends])
    assert exact_match(asked, TOKENIZER, [right, wrong], ends) == 0.5
    unended = sample(PROMPTS[0], [*spoken[0][:2], EOS_ID])  # the model goes on where this ends
    assert exact_match(asked, TOKENIZER, [unended], {EOS_ID}) == 0.0


def test_an_answer_without_an_end_of_its_own_is_compared_as_far_as_it_goes() -> None:
    asked = model()
    spoken = says(asked, PROMPTS[1], 4)
    assert exact_match(asked, TOKENIZER, [sample(PROMPTS[1], spoken)], {EOS_ID}) == 1.0
    assert exact_match(asked, TOKENIZER, [sample(PROMPTS[1], [*spoken[:-1], spoken[-1] + 1])], {EOS_ID}) == 0.0


def test_the_loss_is_the_mean_over_all_learned_tokens_however_they_are_batched() -> None:
    asked = build_model("llama", vocab_size=VOCABULARY)
    samples = random_data(40).held_out
    total, count = 0.0, 0
    for one in samples:
        (batch,) = batches_of([one], 1)
        with torch.no_grad():
            loss = asked(input_ids=batch.input_ids, labels=batch.labels).loss
        total, count = total + float(loss) * batch.num_learned, count + batch.num_learned
    assert mean_loss(asked, samples) == pytest.approx(total / count, rel=1e-5)


def test_measuring_looks_whether_to_go_on_and_leaves_the_model_as_it_was() -> None:
    asked, looks = model(), []
    samples = [sample(prompt, [7, EOS_ID]) for prompt in PROMPTS] * 7
    measured = measure(asked, TOKENIZER, samples, {EOS_ID}, on_batch=lambda: looks.append(None))
    assert len(looks) == 4  # two batches of losses, two of answers
    assert measured.exact_match == 0.0
    assert not asked.training
    by_one = measure(asked, TOKENIZER, samples, {EOS_ID}, batch_size=1, on_batch=lambda: looks.append(None))
    assert len(looks) == 4 + 2 * len(samples)
    assert by_one.loss == pytest.approx(measured.loss, rel=1e-5)
    assert measure(asked, TOKENIZER, [replace(one, answer_start=None) for one in samples], {EOS_ID}).exact_match is None


def test_a_loss_that_is_no_number_is_told() -> None:
    asked = model()
    with torch.no_grad():
        asked.model.norm.weight.fill_(math.nan)
    with pytest.raises(DivergedError) as ended:
        measure(asked, TOKENIZER, [sample([5, 6], [7])], {EOS_ID})
    assert ended.value.reason == "LOSS_NOT_FINITE"


def test_a_hundred_answers_are_compared_at_most() -> None:
    samples = [sample([5], [6])] * 150
    assert len(answered(samples)) == MAX_ANSWERED == 100
    assert answered([replace(samples[0], answer_start=None), samples[1]]) == [samples[1]]


# --- The gate


def test_a_gate_that_asks_for_answers_where_there_are_none_is_refused() -> None:
    without = replace(sample([5], [6]), answer_start=None)
    check_gate(GateSettings(), [without])
    check_gate(GateSettings(min_exact_match=0.5), [without, sample([5], [6])])
    with pytest.raises(DataError) as refused:
        check_gate(GateSettings(min_exact_match=0.0), [without])
    assert (refused.value.reason, refused.value.field) == ("NO_ANSWERS", "gate.min_exact_match")


@pytest.mark.parametrize(
    ("gate", "after", "match", "passed"),
    [
        (GateSettings(), 2.0, 0.0, True),
        (GateSettings(), 2.001, 1.0, False),
        (GateSettings(max_loss_ratio=0.5), 1.0, None, True),
        (GateSettings(max_loss_ratio=0.5), 1.001, None, False),
        (GateSettings(max_loss_ratio=2.0), 4.0, None, True),
        (GateSettings(min_exact_match=0.5), 1.0, 0.5, True),
        (GateSettings(min_exact_match=0.5), 1.0, 0.49, False),
        (GateSettings(min_exact_match=0.5), 1.0, None, False),
    ],
)
def test_a_gate_is_passed_by_what_it_asks_for(
    gate: GateSettings, after: float, match: float | None, passed: bool
) -> None:
    verdict = judge(gate, Evaluation(10, 2.0, after, match, match))
    assert verdict.passed is passed
    assert verdict == Verdict(True) or (verdict.reason == "GATE_NOT_PASSED" and "gate." in verdict.message)


@pytest.mark.parametrize(
    ("after", "before", "figures"),
    [
        (11.330004, 11.330001, "is 11.330004 after training and was 11.330001 before; .* asks for 11.330001 at most"),
        (2.5, 2.0, "is 2.5 after training and was 2 before; .* asks for 2 at most"),
        (math.nextafter(2.0, 3.0), 2.0, r"is 2\.0000000000000004 after training and was 2 before"),
        (11.33, 11.33, "is 11.33 after training and was 11.33 before; .* asks for 5.665 at most"),
    ],
)
def test_a_refusal_shows_as_many_digits_as_its_figures_differ_in(after: float, before: float, figures: str) -> None:
    ratio = 0.5 if after == before else 1.0
    verdict = judge(GateSettings(max_loss_ratio=ratio), Evaluation(10, before, after, None, None))
    assert re.search(figures, verdict.message), verdict.message


def test_what_was_not_measured_is_left_out_on_the_wire() -> None:
    assert Evaluation(3, 2.0, 1.0, None, None).to_json() == {"num_samples": 3, "loss_before": 2.0, "loss_after": 1.0}
    assert Evaluation(3, 2.0, 1.0, 0.0, 0.5).to_json()["exact_match_before"] == 0.0
