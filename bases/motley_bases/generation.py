"""What a checkpoint says of generating: read as it is stored, and refused unless a request could have asked for it.

The ranges are those that inference.proto gives to requests, since these values stand in for what a request leaves
unset. Knows JSON and token ids, not models. Runs once, on the thread that starts the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from motley_bases.checkpoint import read_config, read_generation_config
from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.spec import GenerationDefaults


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """The fields of generation_config.json, or of config.json where older checkpoints keep them; checked."""

    fields: Mapping[str, object]
    prefix: str

    def number(self, name: str) -> float | None:
        """Return a stored number, None where the checkpoint is silent.

        Raises: UnreadableBaseError if it is none.
        """
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unreadable(name, "a number")
        return value

    def whole_number(self, name: str) -> int | None:
        """Return a stored int, None where the checkpoint is silent.

        Raises: UnreadableBaseError if it is none.
        """
        value = self.number(name)
        if isinstance(value, float):
            raise self.unreadable(name, "a whole number")
        return value

    def flag(self, name: str) -> bool | None:
        """Return a stored bool, None where the checkpoint is silent.

        Raises: UnreadableBaseError if it is none.
        """
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.unreadable(name, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...] | None:
        """Return one stored token id or a list of them, None where the checkpoint is silent.

        Raises: UnreadableBaseError if it is neither.
        """
        value = self.fields.get(name)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
            raise self.unreadable(name, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def unreadable(self, name: str, wanted: str) -> UnreadableBaseError:
        """Make the refusal of a value that is of another type than its name asks for."""
        message = f"{name} is {self.fields[name]!r}, not {wanted}"
        return UnreadableBaseError(message, reason="BROKEN_GENERATION_CONFIG", field=self.prefix + name)


def read_generation(directory: Path) -> StoredGeneration:
    """Read and check what a checkpoint stores of generating, but for the vocabulary that its token ids must be in.

    Semantics: a temperature counts only with do_sample, as `generation_defaults` follows it only then.
    Raises: UnreadableBaseError for a value of another type; UnsupportedBaseError for one out of range.
    """
    fields = read_generation_config(directory)
    if fields is None:
        stored = StoredGeneration(read_config(directory), "")
    else:
        stored = StoredGeneration(fields, "generation_config.")
    do_sample, temperature = stored.flag("do_sample"), stored.number("temperature")
    _check(stored, "temperature", temperature if do_sample else None, lambda v: 0 <= v <= 100, "in [0, 100]")
    _check(stored, "top_p", stored.number("top_p"), lambda v: 0 < v <= 1, "in (0, 1]")
    _check(stored, "top_k", stored.whole_number("top_k"), lambda v: v >= 0, "at least 0")
    _check(stored, "min_p", stored.number("min_p"), lambda v: 0 <= v <= 1, "in [0, 1]")
    penalty = stored.number("repetition_penalty")
    _check(stored, "repetition_penalty", penalty, lambda v: 0.01 <= v <= 100, "in [0.01, 100]")
    _check(stored, "max_new_tokens", stored.whole_number("max_new_tokens"), lambda v: v >= 1, "at least 1")
    stored.token_ids("eos_token_id")
    return stored


def generation_defaults(
    stored: StoredGeneration, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> GenerationDefaults:
    """Follow what a checkpoint stores of generating as transformers' own generate would.

    Semantics: without do_sample, generate is greedy whatever temperature is stored, hence 0; with it, an unstored
    temperature means 1. The other fields are kept where stored, for requests that do sample. Where no end of sequence
    is stored, config.json's counts, and then the tokenizer's.
    Raises: UnsupportedBaseError if an end-of-sequence id is outside the vocabulary.
    """
    do_sample, temperature = stored.flag("do_sample"), stored.number("temperature")
    if do_sample:
        temperature = 1.0 if temperature is None else float(temperature)
    elif do_sample is False or temperature is not None:
        temperature = 0.0
    return GenerationDefaults(
        eos_token_ids=_eos_token_ids(stored, config, tokenizer, vocab_size),
        temperature=temperature,
        top_p=stored.number("top_p"),
        top_k=stored.whole_number("top_k"),
        min_p=stored.number("min_p"),
        repetition_penalty=stored.number("repetition_penalty"),
        max_new_tokens=stored.whole_number("max_new_tokens"),
    )


def _eos_token_ids(
    stored: StoredGeneration, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[int, ...]:
    name = "eos_token_id"
    sources = (
        stored,
        StoredGeneration({name: getattr(config, name, None)}, ""),
        StoredGeneration({name: tokenizer.eos_token_id}, "tokenizer."),
    )
    for source in sources:
        ids = source.token_ids(name)
        if ids is None:
            continue
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                message = f"the end-of-sequence id {token_id} is outside the vocabulary of {vocab_size} tokens"
                raise UnsupportedBaseError(message, reason="GENERATION_CONFIG", field=source.prefix + name)
        return ids
    return ()


def _check(
    stored: StoredGeneration, name: str, value: float | None, is_allowed: Callable[[float], bool], wanted: str
) -> None:
    # NaN fails every comparison, and so every range.
    if value is not None and not is_allowed(value):
        raise UnsupportedBaseError(
            f"{name} is {value}, and requests that name none would get it: it must be {wanted}",
            reason="GENERATION_CONFIG",
            field=stored.prefix + name,
        )
