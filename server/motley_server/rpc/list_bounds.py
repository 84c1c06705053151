"""How long the lists of a request may be, read from the message before anything is made of their items.

A message within the wire's bound can hold millions of items, and an object for each would stop the event loop for
seconds; the length of a repeated field is known once it is parsed. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Sized

from motley.v1 import inference_pb2

from motley_server.admission import MAX_CHAT_TURNS, MAX_CONTINUATIONS, AdmissionLimits
from motley_server.errors import InvalidArgumentError
from motley_server.library.sets import MAX_ADAPTERS
from motley_server.sampling import MAX_ITEMS


def check_generation(
    message: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest, limits: AdmissionLimits
) -> None:
    """Refuse a request to generate with too long a list.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, TOO_MANY_ADAPTERS or CONTEXT_EXCEEDED), as the others here.
    """
    check_prompt(message.prompt, limits)
    _check(message.adapters, MAX_ADAPTERS, "adapters", "TOO_MANY_ADAPTERS")
    for name, maximum in MAX_ITEMS.items():
        _check(getattr(message.sampling, name), maximum, f"sampling.{name}")


def check_scoring(message: inference_pb2.ScoreRequest, limits: AdmissionLimits) -> None:
    """Refuse a request to score with too long a list."""
    check_prompt(message.prompt, limits)
    _check(message.adapters, MAX_ADAPTERS, "adapters", "TOO_MANY_ADAPTERS")
    _check(message.continuations, MAX_CONTINUATIONS, "continuations")


def check_prompt(prompt: inference_pb2.Prompt, limits: AdmissionLimits) -> None:
    """Refuse a prompt of too many turns, or of more ids than the context has."""
    _check(prompt.chat.messages, MAX_CHAT_TURNS, "prompt.chat.messages")
    _check(prompt.tokens.ids, limits.context_length, "prompt", "CONTEXT_EXCEEDED")


def check_detokenized(message: inference_pb2.DetokenizeRequest, limits: AdmissionLimits) -> None:
    """Refuse more ids than any text that Tokenize takes could give."""
    _check(message.ids, limits.max_detokenized, "ids")


def _check(items: Sized, maximum: int, field: str, reason: str = "OUT_OF_RANGE") -> None:
    if len(items) > maximum:
        raise InvalidArgumentError(f"{len(items)} items; {maximum} are allowed", reason=reason, field=field)
