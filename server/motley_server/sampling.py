"""From how a caller wants tokens chosen to how they will be: ranges checked, every default filled in.

The ranges are those that inference.proto promises. What is unset takes the checkpoint's generation_config, and where
that is silent the proto's default. Pure functions; any thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from motley_bases.spec import GenerationDefaults

from motley_server.asked import AskedSampling
from motley_server.engine.types import SamplingParams
from motley_server.errors import InvalidArgumentError

MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_LOGIT_BIAS = 100.0
MAX_CANDIDATES = 16
MAX_ITEMS: Mapping[str, int] = MappingProxyType({"stop": 16, "stop_token_ids": 1024, "logit_bias": 1024})
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20

V = TypeVar("V", int, float)


@dataclass(frozen=True, slots=True)
class SamplingFacts:
    """What the base and the server say about sampling."""

    defaults: GenerationDefaults
    vocab_size: int
    default_max_new_tokens: int


def fill_sampling(asked: AskedSampling, facts: SamplingFacts, *, num_free_tokens: int) -> SamplingParams:
    """Check what was asked and fill in what was not; `num_free_tokens` is what the context leaves beside the prompt.

    Raises: InvalidArgumentError naming the field; reason OUT_OF_RANGE, CONTEXT_EXCEEDED or TOKEN_OUT_OF_VOCABULARY.
    """
    _check_ranges(asked)
    defaults = facts.defaults
    max_new_tokens = _max_new_tokens(asked, facts, num_free_tokens)
    stop_token_ids = set(_token_ids(asked.stop_token_ids, "stop_token_ids", facts.vocab_size))
    if not asked.ignore_eos:
        stop_token_ids |= set(defaults.eos_token_ids)
    min_new_tokens = asked.min_new_tokens or 0
    if min_new_tokens > max_new_tokens:
        raise _out_of_range("min_new_tokens", f"{min_new_tokens} is more than max_new_tokens, {max_new_tokens}")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=_first(asked.temperature, defaults.temperature, 0.0),
        top_p=_first(asked.top_p, defaults.top_p, 1.0),
        top_k=_first(asked.top_k, defaults.top_k, 0),
        min_p=_first(asked.min_p, defaults.min_p, 0.0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=_first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(asked, facts.vocab_size),
        seed=secrets.randbits(64) if asked.seed is None else asked.seed,
        n=1 if asked.n is None else asked.n,
        stop=asked.stop,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        min_new_tokens=min_new_tokens,
        eos_token_ids=defaults.eos_token_ids,
        logprobs=asked.logprobs,
    )


def _check_ranges(asked: AskedSampling) -> None:
    _check("max_new_tokens", asked.max_new_tokens, lambda v: v >= 1, "at least 1")
    _check("temperature", asked.temperature, lambda v: 0 <= v <= MAX_TEMPERATURE, f"within 0 and {MAX_TEMPERATURE:g}")
    _check("top_p", asked.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
    _check("top_k", asked.top_k, lambda v: v >= 0, "at least 0")
    _check("min_p", asked.min_p, lambda v: 0 <= v <= 1, "within 0 and 1")
    for name in ("presence_penalty", "frequency_penalty"):
        _check(
            name, getattr(asked, name), lambda v: abs(v) <= MAX_PENALTY, f"within -{MAX_PENALTY:g} and {MAX_PENALTY:g}"
        )
    _check(
        "repetition_penalty",
        asked.repetition_penalty,
        lambda v: MIN_REPETITION_PENALTY <= v <= MAX_REPETITION_PENALTY,
        f"within {MIN_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g}",
    )
    _check("n", asked.n, lambda v: 1 <= v <= MAX_CANDIDATES, f"within 1 and {MAX_CANDIDATES}")
    _check("min_new_tokens", asked.min_new_tokens, lambda v: v >= 0, "at least 0")
    _check("logprobs", asked.logprobs, lambda v: 0 <= v <= MAX_LOGPROBS, f"within 0 and {MAX_LOGPROBS}")
    for name, maximum in MAX_ITEMS.items():
        if len(getattr(asked, name)) > maximum:
            raise _out_of_range(name, f"{len(getattr(asked, name))} items; {maximum} are allowed")
    for index, text in enumerate(asked.stop):
        _check(
            f"stop[{index}]",
            len(text),
            lambda v: 1 <= v <= MAX_STOP_CHARACTERS,
            f"1 to {MAX_STOP_CHARACTERS} characters",
        )


def _check(name: str, value: V | None, holds: Callable[[V], bool], wanted: str) -> None:
    # NaN compares false with everything, so every range refuses it.
    if value is not None and not holds(value):
        raise _out_of_range(name, f"{value} is not {wanted}")


def _out_of_range(name: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="OUT_OF_RANGE", field=f"sampling.{name}")


def _first(asked: V | None, stored: V | None, otherwise: V) -> V:
    return asked if asked is not None else stored if stored is not None else otherwise


def _max_new_tokens(asked: AskedSampling, facts: SamplingFacts, num_free_tokens: int) -> int:
    if asked.max_new_tokens is None:
        return min(facts.defaults.max_new_tokens or facts.default_max_new_tokens, num_free_tokens)
    if asked.max_new_tokens > num_free_tokens:
        message = f"{asked.max_new_tokens} new tokens do not fit: the prompt leaves {num_free_tokens} of the context"
        raise InvalidArgumentError(message, reason="CONTEXT_EXCEEDED", field="sampling.max_new_tokens")
    return asked.max_new_tokens


def _token_ids(ids: tuple[int, ...], name: str, vocab_size: int) -> tuple[int, ...]:
    for index, token_id in enumerate(ids):
        check_token_id(token_id, f"sampling.{name}[{index}]", vocab_size)
    return ids


def _logit_bias(asked: AskedSampling, vocab_size: int) -> tuple[tuple[int, float], ...]:
    for token_id, bias in asked.logit_bias:
        name = f"logit_bias[{token_id}]"
        check_token_id(token_id, f"sampling.{name}", vocab_size)
        _check(name, bias, lambda v: abs(v) <= MAX_LOGIT_BIAS, f"within -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}")
    return tuple(sorted(asked.logit_bias))


def check_token_id(token_id: int, field: str, vocab_size: int) -> None:
    """Refuse an id that the base does not have.

    Raises: InvalidArgumentError (reason=TOKEN_OUT_OF_VOCABULARY).
    """
    if not 0 <= token_id < vocab_size:
        message = f"{token_id} is not a token id of this base, 0 to {vocab_size - 1}"
        raise InvalidArgumentError(message, reason="TOKEN_OUT_OF_VOCABULARY", field=field)
