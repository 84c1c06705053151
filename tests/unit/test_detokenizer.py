"""The detokenizer against the full decode, over tokenizers of every kind that bases come with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from motley_server.engine.detokenizer import IncrementalDetokenizer
from motley_server.engine.stop_strings import StopMatcher
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the cat sat on the mat. Stop here, please! déjà vu naïve 日本語 сад 😀👩‍👩‍👧 ok\n\n  two  spaces"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>", "<unk>"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def _pieces() -> list[str]:
    letters = sorted({"▁" if character.isspace() else character for character in TEXT if ord(character) < 0x500})
    return [*letters, "▁the", "▁cat", "at", "op", "▁St", "▁▁", REPLACEMENT, "▁" + REPLACEMENT]


def _unigram() -> Tokenizer:
    vocabulary = [(piece, -1.0) for piece in [*SPECIAL, *BYTES]] + [(piece, -2.0) for piece in _pieces()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _bpe_with_byte_fallback(*, is_stripping: bool) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *BYTES, *_pieces()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    to_marks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_marks]) if is_stripping else to_marks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if is_stripping else steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _word_piece() -> Tokenizer:
    pieces = [*SPECIAL, "the", "cat", "##s", "##at", ".", "do", "n't", "!", "日", "##語", "a", "##a"]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "unigram": _unigram,
    "llama-like": lambda: _bpe_with_byte_fallback(is_stripping=True),
    "gemma-like": lambda: _bpe_with_byte_fallback(is_stripping=False),
    "word-piece": _word_piece,
}
every_kind = pytest.mark.parametrize("kind", MAKERS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return _fast(MAKERS[kind]())


def ids_of(kind: str, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer_of(kind).get_vocab()
    return [vocabulary[token] for token in tokens]


def full_text(kind: str, prompt: Sequence[int], output: Sequence[int], *, skip: bool = True) -> str:
    """The definition: what the output adds to the text of the prompt."""
    tokenizer = tokenizer_of(kind)
    before = tokenizer.decode(list(prompt), skip_special_tokens=skip)
    both = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    shared = 0
    while shared < min(len(before), len(both)) and before[shared] == both[shared]:
        shared += 1
    text = both[shared:]
    assert isinstance(text, str)
    return text


def stream(kind: str, prompt: Sequence[int], chunks: Sequence[Sequence[int]], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer_of(kind), prompt, stop)
    return [*(detokenizer.append(chunk).text for chunk in chunks), detokenizer.finish()]


def one_by_one(output: Sequence[int]) -> list[list[int]]:
    return [[token_id] for token_id in output]


@st.composite
def token_lists(draw: st.DrawFn, kind: str, max_size: int) -> list[int]:
    """Any tokens at all, with bytes of real characters and real text mixed in."""
    tokenizer = tokenizer_of(kind)
    anything = st.integers(0, len(tokenizer) + 1).map(lambda token_id: [token_id])
    words = st.sampled_from(["the cat", " déjà", "日本語", "😀👩‍👩‍👧", "\n", " ", "€", "Stop"])
    real = words.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    special = st.sampled_from(SPECIAL).map(lambda token: ids_of(kind, [token]))
    parts = draw(st.lists(st.one_of(anything, real, special), max_size=max_size))
    return [token_id for part in parts for token_id in part]


@every_kind
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_full_decode(kind: str, data: st.DataObject) -> None:
    prompt, output = data.draw(token_lists(kind, 30)), data.draw(token_lists(kind, 40))
    assert "".join(stream(kind, prompt, one_by_one(output))) == full_text(kind, prompt, output)


@every_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_special_tokens_are_shown_when_asked_for(kind: str, data: st.DataObject) -> None:
    prompt, output = data.draw(token_lists(kind, 10)), data.draw(token_lists(kind, 30))
    detokenizer = IncrementalDetokenizer(tokenizer_of(kind), prompt, skip_special_tokens=False)
    text = detokenizer.append(output).text + detokenizer.finish()
    assert text == full_text(kind, prompt, output, skip=False)


@every_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_of_the_tokens_gives_the_same_text_and_the_same_stop(kind: str, data: st.DataObject) -> None:
    output = data.draw(token_lists(kind, 30))
    stop = tuple(data.draw(st.lists(st.text("at o\n.é", min_size=1, max_size=3), max_size=3)))
    borders = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=6)))
    chunks = [output[start:end] for start, end in zip([0, *borders], [*borders, len(output)], strict=True)]
    assert "".join(stream(kind, (), chunks, stop)) == "".join(stream(kind, (), one_by_one(output), stop))


@every_kind
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_ends_before_the_stop_string_that_is_complete_first(kind: str, data: st.DataObject) -> None:
    prompt, output = data.draw(token_lists(kind, 5)), data.draw(token_lists(kind, 30))
    stop = tuple(data.draw(st.lists(st.text("at heo\n.é", min_size=1, max_size=4), min_size=1, max_size=3)))
    text = full_text(kind, prompt, output)
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    detokenizer = IncrementalDetokenizer(tokenizer_of(kind), prompt, stop)
    deltas = [detokenizer.append([token_id]) for token_id in output]
    streamed = "".join(delta.text for delta in deltas) + detokenizer.finish()
    stopped = any(delta.stopped for delta in deltas)
    if REPLACEMENT not in text:  # a byte run that turns out invalid may have been a stop string when it was read
        assert streamed == (text[: min(ends)[1]] if ends else text)
        assert stopped == bool(ends)
    assert not any(word in streamed for word in stop)


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "llama-like", "gemma-like"])
def test_nothing_that_was_sent_holds_half_a_character(kind: str) -> None:
    output = tokenizer_of(kind).encode("a 👩‍👩‍👧 日本語 é a", add_special_tokens=False)
    assert len(output) > len("a 👩‍👩‍👧 日本語 é a")
    deltas = stream(kind, (), one_by_one(output))
    assert "".join(deltas) == "a 👩‍👩‍👧 日本語 é a"
    assert not any(REPLACEMENT in delta for delta in deltas)


def test_a_character_is_sent_with_its_last_byte_and_not_before() -> None:
    output = tokenizer_of("byte-level").encode("😀", add_special_tokens=False)
    assert stream("byte-level", (), one_by_one(output)) == ["", "", "😀", ""]


def test_an_open_character_comes_out_as_a_replacement_at_the_end() -> None:
    output = tokenizer_of("byte-level").encode("a😀", add_special_tokens=False)[:-1]
    assert stream("byte-level", (), one_by_one(output)) == ["a", "", "", REPLACEMENT]


def test_a_character_that_the_prompt_left_open_belongs_to_the_output() -> None:
    first, second, third = tokenizer_of("byte-level").encode("😀", add_special_tokens=False)
    assert stream("byte-level", [first], [[second], [third]]) == ["", "😀", ""]
    assert stream("byte-level", [first], [[second]]) == ["", ""]  # the prompt's replacement is not the output's
    specials = ids_of("byte-level", ["</s>"] * 3)
    assert stream("byte-level", [*ids_of("byte-level", ["a"]), first, *specials, second], [[third]]) == ["😀", ""]


def test_a_run_of_bytes_at_the_very_beginning_keeps_the_space_after_it() -> None:
    output = ids_of("llama-like", ["<0x61>"] * 64 + ["▁the"])
    assert "".join(stream("llama-like", (), one_by_one(output))) == "a" * 64 + " the"


def test_a_space_is_kept_after_a_prompt_and_dropped_at_the_very_beginning() -> None:
    the = ids_of("llama-like", ["▁the"])
    assert "".join(stream("llama-like", ids_of("llama-like", ["<s>", "▁cat"]), [the])) == " the"
    assert "".join(stream("llama-like", ids_of("llama-like", ["<s>"]), [the])) == "the"
    assert "".join(stream("llama-like", ids_of("llama-like", ["▁cat"] + ["</s>"] * 50), [the])) == " the"


def test_a_skipped_special_token_does_not_end_a_run_of_bytes() -> None:
    output = ids_of("llama-like", ["<0xE2>", "<0x82>", "</s>", "<0xAC>", "a"])
    assert "".join(stream("llama-like", (), one_by_one(output))) == "€a"


def test_one_wrong_byte_makes_its_whole_run_replacements_as_the_decoder_does() -> None:
    output = ids_of("llama-like", ["a", "<0xC3>", "<0xA9>", "<0xFF>", "a"])
    assert "".join(stream("llama-like", (), one_by_one(output))) == "a" + REPLACEMENT * 3 + "a"


def test_text_all_in_bytes_streams_before_it_ends() -> None:
    prompt, text = ids_of("llama-like", ["▁the"]), "日本語" * 40
    output = ids_of("llama-like", [f"<0x{byte:02X}>" for byte in text.encode()])
    deltas = stream("llama-like", prompt, one_by_one(output))
    assert "".join(deltas) == text
    assert sum(bool(delta) for delta in deltas[:-1]) == len(output) // 64


def test_a_stop_string_in_a_byte_token_stops_at_once() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of("llama-like"), (), ("\n",))
    assert detokenizer.append(ids_of("llama-like", ["a"])).text == "a"
    delta = detokenizer.append(ids_of("llama-like", ["<0x0A>"]))
    assert (delta.text, delta.stopped, detokenizer.finish()) == ("", True, "")


def test_stop_strings_are_not_looked_for_in_the_prompt() -> None:
    prompt = ids_of("byte-level", ["a", "b"])
    assert "".join(stream("byte-level", prompt, [ids_of("byte-level", ["c", "a"])], ("bc", "ab"))) == "ca"


def test_a_stop_string_may_be_the_whole_output() -> None:
    output = tokenizer_of("byte-level").encode("Stop", add_special_tokens=False)
    assert "".join(stream("byte-level", (), one_by_one(output), ("Stop",))) == ""


def test_tokens_after_a_stop_string_are_ignored() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of("byte-level"), (), ("b",))
    assert detokenizer.append(ids_of("byte-level", ["a", "b", "c"])).text == "a"
    later = detokenizer.append(ids_of("byte-level", ["c"]))
    assert (later.text, later.stopped, detokenizer.finish()) == ("", True, "")


def test_what_looked_like_a_stop_string_comes_out_when_it_is_none() -> None:
    output = ids_of("byte-level", list("abab"))
    assert stream("byte-level", (), one_by_one(output), ("abac",)) == ["", "", "", "ab", "ab"]
    output = ids_of("byte-level", list("ababx"))
    assert stream("byte-level", (), one_by_one(output), ("abac",)) == ["", "", "", "ab", "abx", ""]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), data=st.data()
)
@example(text="abc", stop=["abc", "b"], data=None)
@example(text="aab", stop=["ab", "aab"], data=None)
def test_matcher_agrees_with_a_search_of_the_whole_text(text: str, stop: list[str], data: st.DataObject | None) -> None:
    matcher = StopMatcher(tuple(stop))
    pieces = [matcher.push(character) for character in text]
    prefixes = [text[:end] for end in range(len(text) + 1)]
    done = next((prefix for prefix in prefixes if any(prefix.endswith(word) for word in stop)), None)
    expected = text if done is None else min((done.removesuffix(word) for word in stop), key=len)
    for end in range(len(pieces) + 1):  # held back is exactly what could still become a stop string
        if done is None or end < len(done):
            sent, seen = "".join(pieces[:end]), text[:end]
            possible = [size for size in range(end + 1) if any(word.startswith(seen[end - size :]) for word in stop)]
            assert len(seen) - len(sent) == max(possible, default=0)
    assert "".join(pieces) + matcher.flush() == expected
    assert matcher.stopped == (done is not None)


class CountingTokenizer:
    """Counts the tokens it is given to decode."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner, self.num_decoded = inner, 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: bool) -> str:
        self.num_decoded += len(token_ids)
        text = self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        assert isinstance(text, str)
        return text

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        token = self.inner.convert_ids_to_tokens(ids)
        assert token is None or isinstance(token, str)
        return token


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("byte-level", ["a"]),
        ("byte-level", ["Ã"]),  # the byte C3, which is never complete
        ("llama-like", ["▁the"]),
        ("llama-like", ["<0xC3>"]),
        ("llama-like", ["<0xC3>", "<0xA9>"]),
        ("llama-like", ["</s>"]),
    ],
)
def test_cost_is_linear_whatever_the_tokens(kind: str, tokens: list[str]) -> None:
    prompt = ids_of(kind, ["a"] * 5)
    counts = []
    for size in (600, 1200):
        counting = CountingTokenizer(tokenizer_of(kind))
        detokenizer = IncrementalDetokenizer(counting, prompt, ("never",))
        for token_id in ids_of(kind, tokens * (size // len(tokens))):
            detokenizer.append([token_id])
        detokenizer.finish()
        counts.append(counting.num_decoded)
    assert counts[1] < 2.2 * counts[0]
    assert counts[1] < 1200 * 48
