"""Measuring by samples that were not trained on: their loss, and how many of their answers are exactly right.

Runs on the thread that owns the model, and changes nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motley_trainer.data.batches import summed_loss
from motley_trainer.data.samples import Sample
from motley_trainer.data.training_data import batches_of
from motley_trainer.errors import DataError, DivergedError
from motley_trainer.spec.settings import GateSettings

MAX_ANSWERED = 100  # held-out samples that are answered; the loss is of all
MAX_BATCH_SIZE = 16
SPARE_TOKENS = 4  # that an answer may take more than the right one, to say the same in other tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model makes of the held-out samples.

    Semantics: `loss` is the mean over all learned tokens; `exact_match` the share of answers that are exactly right,
    None where no sample has one.
    """

    loss: float
    exact_match: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out samples on the base, without the adapter and with it."""

    num_samples: int
    loss_before: float
    loss_after: float
    exact_match_before: float | None
    exact_match_after: float | None

    def to_json(self) -> dict[str, object]:
        """Return the wire's Evaluation, in which what is not there is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a gate is passed, and why not."""

    passed: bool
    reason: str = ""
    message: str = ""


def answered(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose answers are compared: the first that have one."""
    return [sample for sample in samples if sample.answer_start is not None][:MAX_ANSWERED]


def check_gate(gate: GateSettings, held_out: Sequence[Sample]) -> None:
    """Refuse a gate that asks for what these samples cannot tell.

    Raises: DataError with reason NO_ANSWERS.
    """
    if gate.min_exact_match is not None and not answered(held_out):
        message = "gate.min_exact_match asks for exact answers, and no held-out sample has one to compare with"
        raise DataError(message, reason="NO_ANSWERS", field="gate.min_exact_match")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    eos_token_ids: Collection[int],
    *,
    batch_size: int = MAX_BATCH_SIZE,
    on_batch: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure a model as it is now, in batches of at most `batch_size`, calling `on_batch` before each.

    Raises: DivergedError with reason LOSS_NOT_FINITE.
    """
    batch_size = min(batch_size, MAX_BATCH_SIZE)
    loss = mean_loss(model, samples, batch_size=batch_size, on_batch=on_batch)
    if not math.isfinite(loss):
        message = f"the loss of the held-out samples is {loss}"
        raise DivergedError(message, reason="LOSS_NOT_FINITE", field="optimizer.learning_rate")
    asked = answered(samples)
    if not asked:
        return Measured(loss, None)
    match = exact_match(model, tokenizer, asked, eos_token_ids, batch_size=batch_size, on_batch=on_batch)
    return Measured(loss, match)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = MAX_BATCH_SIZE,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean cross-entropy over all learned tokens of the samples."""
    total, num_learned = 0.0, 0
    for batch in batches_of(sorted(samples, key=lambda sample: len(sample.tokens)), batch_size):
        on_batch()
        total += float(summed_loss(model, batch.to(model.device)))
        num_learned += batch.num_learned
    return total / num_learned


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    eos_token_ids: Collection[int],
    *,
    batch_size: int = MAX_BATCH_SIZE,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the share of samples whose answer a greedy one equals, as text and to its end."""
    ends = frozenset(eos_token_ids)
    num_right = 0
    ordered = sorted(samples, key=lambda sample: sample.answer_start or 0)
    for start in range(0, len(ordered), batch_size):
        on_batch()
        part = ordered[start : start + batch_size]
        prompts = [sample.tokens[: sample.answer_start].tolist() for sample in part]
        wanted = [until_end(sample.tokens[sample.answer_start :].tolist(), ends) for sample in part]
        given = greedy(model, prompts, max(len(answer) for answer in wanted) + SPARE_TOKENS, ends)
        for right, answer in zip(wanted, given, strict=True):
            # An answer that has no end of its own is compared as far as it goes.
            said = until_end(answer, ends) if right[-1] in ends else answer[: len(right)]
            num_right += tokenizer.decode(right) == tokenizer.decode(said)
    return num_right / len(samples)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return tokens up to the first that ends an answer, that one included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """Return what a model says to prompts if it always says the likeliest token, the first of equals.

    Semantics: prompts are padded on the left, and the padding is not attended to. What a checkpoint asks generation to
    do otherwise (penalties, forced tokens) is not done: this measures the model. It stops when all have ended; what one
    says after its end means nothing.
    """
    longest = max(len(prompt) for prompt in prompts)
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor(seen, device=model.device)
    stops = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)
    has_ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    said: list[Tensor] = []
    cache = None
    forward = cast(Any, model)
    while len(said) < max_new_tokens and not bool(has_ended.all()):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = forward(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        has_ended |= torch.isin(ids[:, 0], stops)
        said.append(ids)
    return torch.cat(said, 1).tolist()


def judge(gate: GateSettings, evaluation: Evaluation) -> Verdict:
    """Hold an evaluation against a gate."""
    bound = gate.max_loss_ratio * evaluation.loss_before
    if not evaluation.loss_after <= bound:
        after, before, most = _told_apart(evaluation.loss_after, evaluation.loss_before, bound)
        message = (
            f"the held-out loss is {after} after training and was {before} before; gate.max_loss_ratio "
            f"{gate.max_loss_ratio!r} asks for {most} at most"
        )
        return Verdict(False, "GATE_NOT_PASSED", message)
    wanted, found = gate.min_exact_match, evaluation.exact_match_after
    if wanted is not None and (found is None or found < wanted):
        message = f"{found} of the held-out answers are exactly right, and gate.min_exact_match asks for {wanted:g}"
        return Verdict(False, "GATE_NOT_PASSED", message)
    return Verdict(True)


def _told_apart(after: float, *others: float) -> list[str]:
    """Return numbers in as few digits, four at least, as show that the first is none of the others."""
    for digits in range(4, 18):  # 17 tell any two apart
        first, *rest = (f"{number:.{digits}g}" for number in (after, *others))
        if all(shown != first or other == after for shown, other in zip(rest, others, strict=True)):
            break
    return [first, *rest]
