"""Stop strings found in text that arrives in pieces, whatever the pieces.

Knows text only. Runs on the engine thread, one object a candidate.
"""

from __future__ import annotations


class StopMatcher:
    """Let text through up to the first stop string.

    Semantics: the stop string that is complete first ends the text; of several complete at the same character, the
    longest. Text that may be the beginning of one is held back. One automaton a stop string (Knuth, Morris, Pratt,
    1977), so the cost is linear and the result does not depend on how the text was cut.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._borders = tuple(_borders(text) for text in stop)
        self._matched = [0] * len(stop)  # how much of each stop string the text so far ends with
        self._held = ""
        self.stopped = False

    @property
    def has_stops(self) -> bool:
        """Tell whether there is anything to look for."""
        return bool(self._stop)

    def push(self, text: str) -> str:
        """Take text and return what can no longer be part of a stop string."""
        if self.stopped:
            return ""
        matched, cut = self._scan(text)
        whole = self._held + text
        self._matched = matched
        self.stopped = cut is not None
        end = cut if cut is not None else len(whole) - max(matched, default=0)
        self._held = "" if self.stopped else whole[end:]
        return whole[:end]

    def push_if_final(self, text: str) -> str:
        """Take text only if a stop string ends in it, else leave everything as it was."""
        return self.push(text) if not self.stopped and self._scan(text)[1] is not None else ""

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    def _scan(self, text: str) -> tuple[list[int], int | None]:
        """Return the automata's states after `text`, and where held and new text are to be cut, if anywhere."""
        matched = list(self._matched)
        if not matched:
            return matched, None
        for position, character in enumerate(text, start=len(self._held) + 1):
            for index, (stop, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
                matched[index] = _advance(stop, borders, matched[index], character)
            complete = [size for size, stop in zip(matched, self._stop, strict=True) if size == len(stop)]
            if complete:
                return matched, position - max(complete)
        return matched, None


def _borders(text: str) -> tuple[int, ...]:
    """Return, for each prefix, the length of the longest shorter prefix that also ends it."""
    borders = [0] * len(text)
    for end in range(1, len(text)):
        borders[end] = _advance(text, borders, borders[end - 1], text[end])
    return tuple(borders)


def _advance(stop: str, borders: tuple[int, ...] | list[int], size: int, character: str) -> int:
    while size and stop[size] != character:
        size = borders[size - 1]
    return size + 1 if stop[size] == character else 0
