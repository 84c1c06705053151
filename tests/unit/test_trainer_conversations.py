"""Conversations become what all their beginnings say, rendered and encoded, in a time that grows with them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from architectures import CHAT_TEMPLATE, make_tokenizer
from motley_trainer.data import samples
from motley_trainer.data.conversations import TemplateMisfitError
from motley_trainer.data.lines import Passage, _chat
from motley_trainer.data.samples import encode
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]

TEMPLATES = {
    "marked": CHAT_TEMPLATE,
    "trimmed": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ bos_token + m.content | trim }}{% endif %}{% endfor %}",
    "unmarked": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "system in the first turn": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[Q] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}({{ messages[0].content }}) {% endif %}"
    "{{ m.content }} [/Q]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "a preamble": "{% if messages[0].role != 'system' %}<|system|>be good</s>{% endif %}" + CHAT_TEMPLATE,
    "numbered": "{% for m in messages %}{{ loop.index }}. {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }}. {% endif %}",
    "in turns": "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "forgets thoughts": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('!')[-1] }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "the last alone": "{% for m in messages[-2:] %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "by length": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '</s>' if messages | length < 7 else '.' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
PIECES = (
    "the fox",
    " ",
    "\n",
    "a dog",
    "!",
    "x",
    "</s>",
    "<|user|>",
    "zwölf 三只",
    "  two",
    "### ",
    "one base, many coats",
    "",
)


def conversation(draw: random.Random) -> Messages:
    """Make one: with a system turn or without, turns mostly in their order, contents that are hard to tell apart."""
    turns: list[str] = ["system"] if draw.random() < 0.4 else []
    for _ in range(draw.randrange(1, 6)):
        turns += draw.choice([["user", "assistant"]] * 6 + [["user", "user", "assistant"], ["assistant"]])
    turns += ["user"] * (draw.random() < 0.2)
    turns += ["assistant"] * ("assistant" not in turns)
    return [{"role": role, "content": "".join(draw.choices(PIECES, k=draw.randrange(4)))} for role in turns]


def rendered(tokenizer: PreTrainedTokenizerFast, turns: Messages, is_answer_next: bool) -> str:
    """Render turns, as an unfit conversation where the template refuses them."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_answer_next))
    except Exception as error:
        raise TemplateMisfitError from error


def spans_by_definition(tokenizer: PreTrainedTokenizerFast, turns: Messages) -> Iterator[tuple[int, int]]:
    """Yield where answers stand: by what every beginning of the conversation is rendered as."""
    text = rendered(tokenizer, turns, False)
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            asked, answered = rendered(tokenizer, turns[:place], True), rendered(tokenizer, turns[: place + 1], False)
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise TemplateMisfitError
            yield len(asked), len(answered)


def tokens_by_definition(
    tokenizer: PreTrainedTokenizerFast, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens and learned ones: of the whole text if all its beginnings are beginnings of that, else of parts."""

    def tokens_of(part: str) -> list[int]:
        return list(tokenizer.encode(part, add_special_tokens=False))

    whole, borders = tokens_of(text), sorted({border for span in spans for border in span})
    beginnings = {border: tokens_of(text[:border]) for border in borders}
    if all(whole[: len(beginning)] == beginning for beginning in beginnings.values()):
        return whole, [(len(beginnings[start]), len(beginnings[end])) for start, end in spans]
    tokens, places = tokens_of(text[: borders[0]]), {}
    for start, end in zip(borders, [*borders[1:], len(text)], strict=True):
        places[start] = len(tokens)
        tokens += tokens_of(text[start:end])
    places[len(text)] = len(tokens)
    return tokens, [(places[start], places[end]) for start, end in spans]


def tokenizer_of(kind: str, template: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer; `first_marked` marks the first word of a text, and no other that a special token precedes."""
    if kind != "first_marked":
        return make_tokenizer(kind, template)
    tokenizer = copy.deepcopy(make_tokenizer("metaspace", template))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "first_marked"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_all_its_beginnings_say(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[name])
    draw = random.Random(f"{name} {kind}")
    num_refused = 0
    for number in range(25):
        turns = conversation(draw)
        try:
            spans = list(spans_by_definition(tokenizer, turns))
        except TemplateMisfitError:
            with pytest.raises(TemplateMisfitError):
                _chat(number, turns, tokenizer)
            num_refused += 1
            continue
        passage = _chat(number, turns, tokenizer)
        assert (passage.text, list(passage.learned)) == (rendered(tokenizer, turns, False), spans), turns
        tokens, learned = tokens_by_definition(tokenizer, passage.text, spans)
        sample = encode(passage, tokenizer)
        assert (sample.tokens.tolist(), list(sample.learned)) == (tokens, learned), turns
    assert num_refused < (25 if name in ("forgets thoughts", "the last alone", "by length", "in turns") else 8)
    assert num_refused > 0 or name not in ("forgets thoughts", "the last alone", "by length", "in turns")


class Counted:
    """Counts what a tokenizer is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
        self.num_turns = self.num_letters = 0
        render, tokens_of = tokenizer.apply_chat_template, tokenizer.encode

        def rendering(turns: Messages, **keywords: Any) -> Any:
            self.num_turns += len(turns)
            return render(turns, **keywords)

        def encoding(text: str, **keywords: Any) -> Any:
            self.num_letters += len(text)
            return tokens_of(text, **keywords)

        monkeypatch.setattr(tokenizer, "apply_chat_template", rendering)
        monkeypatch.setattr(tokenizer, "encode", encoding)


@pytest.mark.parametrize("name", ["marked", "trimmed", "system in the first turn", "a preamble", "in turns"])
def test_a_conversation_of_many_turns_costs_no_more_a_turn_than_one_of_few(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer("byte_level", TEMPLATES[name])
    turns = [{"role": "system", "content": "be brief"}]
    for number in range(100):
        turns += [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"it is {number}"}]
    counted = Counted(monkeypatch, tokenizer)
    passage = _chat(1, turns, tokenizer)
    encode(passage, tokenizer)
    assert len(passage.learned) == 100
    assert counted.num_turns < 15 * len(turns), "and not its square"
    assert counted.num_letters < 4 * len(passage.text)


def test_a_tokenizer_that_shows_no_places_is_asked_for_every_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("byte_level", CHAT_TEMPLATE)
    text = "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>d</s>"
    passage = Passage(1, text, ((26, 31), (57, 62)), has_special_tokens=False, ends=False)
    fast = encode(passage, tokenizer)
    monkeypatch.setattr(samples, "_cuts", lambda *arguments: [])
    assert encode(passage, tokenizer).content == fast.content
