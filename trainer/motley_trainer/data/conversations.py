"""Conversations in a base's chat template, and where in their text the assistant's answers stand.

What an answer's place is, is said by renderings of every beginning of the conversation, which takes a time that grows
with the square of its turns. Templates write turns one after the other, almost all of them, so a place is found from
short renderings: each answer and what was asked before it, behind a short beginning that stands for all earlier turns.
Only what the whole text confirms, character by character, is taken; otherwise every beginning is rendered. Knows
nothing of files and tokens. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

ASSISTANT = "assistant"
STANDS_FOR = "."  # the content of a turn that stands for one

Turn = Mapping[str, str]
Render = Callable[[Sequence[Turn], bool], str]
"""Takes turns, and whether the next is the assistant's to speak; raises TemplateMisfitError."""


class TemplateMisfitError(Exception):
    """Say why a chat template cannot show what of a conversation is learned, as the rest of a sentence."""


def answers_in(turns: Sequence[Turn], text: str, render: Render) -> tuple[tuple[int, int], ...]:
    """Return where in a conversation's text each answer of the assistant's begins and ends.

    Semantics: an answer begins where the text ends that it is asked for with, and ends where the text with it ends;
    what the template writes to close the turn is learned too. This holds for templates that only ever append; one that
    writes earlier turns otherwise once there are later ones is refused, since it would be learned as it is never asked.
    Raises: TemplateMisfitError.
    """
    places = [place for place, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    found = _by_exchanges(turns, places, text, render) if len(places) > 1 else None
    return tuple(_by_beginning(turns, place, text, render) for place in places) if found is None else found


def _by_beginning(turns: Sequence[Turn], place: int, text: str, render: Render) -> tuple[int, int]:
    """Return where the answer at a place begins and ends, by the two renderings that say so."""
    asked, answered = render(turns[:place], True), render(turns[: place + 1], False)
    if not (answered.startswith(asked) and text.startswith(answered)):
        message = f"cannot be learned: the base's chat template rewrites what stands before or after turn {place + 1}"
        raise TemplateMisfitError(message)
    return len(asked), len(answered)


def _by_exchanges(
    turns: Sequence[Turn], places: Sequence[int], text: str, render: Render
) -> tuple[tuple[int, int], ...] | None:
    """Return the same for a template that writes what was asked and its answer alike wherever they stand.

    Semantics: None if it is not one, or that cannot be told.
    """
    found = [_by_beginning(turns, places[0], text, render)]
    first = places[0]
    stand_for = (*turns[:1], *turns[max(first - 1, 1) : first + 1])
    before = [{**turn, "content": STANDS_FOR} for turn in stand_for]
    try:
        lead = render(before, False)
        for last, place in pairwise(places):
            exchange = turns[last + 1 : place + 1]
            asked, answered = render([*before, *exchange[:-1]], True), render([*before, *exchange], False)
            start, own = found[-1][1], len(answered) - len(lead)
            if not (answered.startswith(asked) and asked.startswith(lead)):
                return None
            if not text.startswith(answered[len(lead) :], start):
                return None
            found.append((start + len(asked) - len(lead), start + own))
    except TemplateMisfitError:  # of turns that stand for others; the conversation's own decide
        return None
    return tuple(found)
