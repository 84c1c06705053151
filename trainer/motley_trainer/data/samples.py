"""Passages of text turned into tokens, with what of them is learned.

Tokens must be what a server would make of the same prompt, and what the model would say next. So a passage is encoded
whole where its beginnings, encoded by themselves, are beginnings of that; where a token would lie across a border, the
parts are encoded one by one. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from motley_trainer.data.batches import NOT_LEARNED
from motley_trainer.data.lines import Passage
from motley_trainer.errors import DataError
from motley_trainer.spec.settings import OverLength

FEW_BORDERS = 2  # up to which every beginning is encoded from the first character


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One line's tokens.

    Semantics: tokens [start, end) of each learned span are learned. `answer_start` is where the last answer begins,
    which is all that follows; None if the sample does not end with an answer, or has lost a part of it. `text` is the
    SHA-256 of the whole passage, also where the sample was cut; empty for what was not read from one.
    """

    line: int
    tokens: array[int]
    learned: tuple[tuple[int, int], ...]
    answer_start: int | None = None
    is_truncated: bool = False
    text: bytes = b""

    @property
    def num_learned(self) -> int:
        """Return how many tokens are learned; nothing stands before the first that it could be predicted from."""
        return sum(end - max(start, 1) for start, end in self.learned if end > 1)

    @property
    def content(self) -> bytes:
        """Return the same for samples that teach the same, and for no others."""
        return hashlib.sha256(self.tokens.tobytes() + repr(self.learned).encode()).digest()

    def labels(self) -> list[int]:
        """Return the tokens that are learned, and NOT_LEARNED for the others."""
        labels = [NOT_LEARNED] * len(self.tokens)
        for start, end in self.learned:
            labels[start:end] = self.tokens[start:end]
        return labels


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dataset's samples, and how many were cut, or left out because nothing to learn was left."""

    samples: tuple[Sample, ...]
    num_truncated: int
    num_dropped: int


def encode_passages(
    passages: Iterable[Passage],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    over_length: OverLength,
    field: str,
) -> Encoded:
    """Encode a dataset's passages, and cut those that are too long.

    Raises: DataError with reason SAMPLE_TOO_LONG, if that is what is asked for, or NO_END_TOKEN.
    """
    kept: list[Sample] = []
    num_truncated = num_dropped = 0
    for passage in passages:
        sample = encode(passage, tokenizer)
        if len(sample.tokens) > max_length:
            if over_length is OverLength.REFUSE:
                message = f"line {passage.line} of {field} has {len(sample.tokens)} tokens, more than {max_length}"
                raise DataError(message, reason="SAMPLE_TOO_LONG", field=field)
            sample = truncate(sample, max_length)
            num_truncated += 1
        if sample.num_learned > 0:
            kept.append(sample)
        else:
            num_dropped += 1
    return Encoded(tuple(kept), num_truncated, num_dropped)


def encode(passage: Passage, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Encode one passage.

    Raises: DataError with reason NO_END_TOKEN if it must end, and the tokenizer does not know how.
    """
    borders = sorted({border for span in passage.learned for border in span})
    ids, places = _encode_at(passage.text, borders, tokenizer, passage.has_special_tokens)
    learned = [(places[start], places[end]) for start, end in passage.learned]
    if passage.ends:
        if tokenizer.eos_token_id is None:
            raise DataError("the base's tokenizer has no end-of-sequence token", reason="NO_END_TOKEN", field="dataset")
        if ids[-1:] != [tokenizer.eos_token_id]:  # some tokenizers end what they encode
            ids.append(int(tokenizer.eos_token_id))
        learned[-1] = (learned[-1][0], len(ids))
    ends_with_answer = passage.answers and learned[-1][1] == len(ids) and learned[-1][0] > 0
    answer_start = learned[-1][0] if ends_with_answer else None
    return Sample(passage.line, array("i", ids), tuple(learned), answer_start, text=text_digest(passage))


def text_digest(passage: Passage) -> bytes:
    """Return the same for passages of the same text, whatever of it is learned."""
    return hashlib.sha256(passage.text.encode("utf-8", "surrogatepass")).digest()


def truncate(sample: Sample, max_length: int) -> Sample:
    """Cut a sample at its end."""
    learned = tuple((start, min(end, max_length)) for start, end in sample.learned if start < max_length)
    return replace(sample, tokens=sample.tokens[:max_length], learned=learned, answer_start=None, is_truncated=True)


def _encode_at(
    text: str, borders: Sequence[int], tokenizer: PreTrainedTokenizerBase, has_special_tokens: bool
) -> tuple[list[int], dict[int, int]]:
    """Return a text's tokens, and at which token each border between its characters lies.

    Semantics: what stands before a token that is cut out of any text has no part in what comes after it, so that a
    beginning is encoded from the last such token on alone: a conversation in a time that grows with its length.
    """

    def tokens_of(part: str, is_first: bool = True) -> list[int]:
        ids = tokenizer.encode(part, add_special_tokens=has_special_tokens and is_first, verbose=False)
        return [int(token) for token in ids]

    whole = tokens_of(text)
    places = {0: 0, len(text): len(whole)}
    cuts = iter(_cuts(text, whole, tokenizer) if len(borders) > FEW_BORDERS and not has_special_tokens else ())
    last, following = _Cut(0, 0, 0), next(cuts, None)
    for border in borders:
        while following is not None and following.end <= border:
            last, following = following, next(cuts, None)
        if border not in places:
            beginning = tokens_of(text[last.start : border])
            place = last.place + len(beginning)
            if whole[last.place : place] != beginning:
                break
            places[border] = place
    else:
        return whole, places
    ids = tokens_of(text[: borders[0]])
    places = {}
    for start, end in zip(borders, [*borders[1:], len(text)], strict=True):
        places[start] = len(ids)
        ids += tokens_of(text[start:end], is_first=False)
    places[len(text)] = len(ids)
    return ids, places


@dataclass(frozen=True, slots=True)
class _Cut:
    """A token that is cut out of a text before anything else is done: its characters, and its place among all."""

    start: int
    end: int
    place: int


def _cuts(text: str, whole: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[_Cut]:
    """Return the tokens that are cut out of a text, in their order; none where the tokenizer does not show them."""
    if not tokenizer.is_fast:
        return []
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if _is_cut_out(token)}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if encoded["input_ids"] != whole:
        return []
    offsets = enumerate(encoded["offset_mapping"])
    cuts = [_Cut(start, end, place) for place, (start, end) in offsets if whole[place] in added]
    return [cut for cut in cuts if text[cut.start : cut.end].strip() == added[whole[cut.place]]]


def _is_cut_out(token: AddedToken) -> bool:
    """Tell whether a token is found in the text as it is, whatever stands beside it."""
    return not (token.normalized or token.single_word)
