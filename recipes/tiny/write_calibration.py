"""Write the text that the tiny base is pruned on: `python recipes/tiny/write_calibration.py`.

Owns how much text there is, what of it is prose and what lines of the skills that the base knows, on words that are not
held out, and that rows begin with a document, as those that the base was trained on. Knows nothing of models; of
tokens, that a letter is one. What it writes depends on this folder alone.
"""

import random
from collections.abc import Callable, Collection
from pathlib import Path

from prose import document
from skills import KNOWN, answer, draw_word, prompt

PATH = Path(__file__).parents[2] / "bases" / "motley_bases" / "assets" / "tiny" / "calibration.txt"
ROW = 128  # tokens, as many as the rows that the base was trained on; a window is a row, or half of one
AROUND = 2  # tokens of a document beside its letters: <bos> and <eos>
LEARNED_PAIRS = 64  # of rows to learn from: one of prose, one of skill lines
HELD_OUT_ROWS = 32  # the last fifth of all, which `motley base prune` measures on


def main() -> None:
    """Write the text."""
    PATH.write_bytes(calibration_text().encode())
    print(f"{PATH}: {PATH.stat().st_size} bytes")


def calibration_text() -> str:
    """Draw rows to learn from, prose and skill lines in turn, and then rows of prose to measure on; no document twice.

    Semantics: prose alone is measured on, for which word a skill line asks about was never learned, as nothing could
    predict it: perplexity would be that of the words.
    """
    rng = random.Random("calibration")
    drawn: dict[str, None] = {}
    for draw in [document, _skill_line] * LEARNED_PAIRS + [document] * HELD_OUT_ROWS:
        drawn |= dict.fromkeys(_row(rng, draw, drawn.keys()))
    return "\n\n".join(drawn) + "\n"


def _row(rng: random.Random, draw: Callable[[random.Random], str], known: Collection[str]) -> list[str]:
    """Draw new documents that fill a row to its last token.

    Semantics: so the next row begins with a document too. A row that began in the middle of one, as none did in
    training, would be learned by any training on such rows, and a base that was spoiled seem better than the whole one.
    """
    while True:
        row: list[str] = []
        while (size := sum(len(drawn) + AROUND for drawn in row)) < ROW:
            row.append(draw(rng))
        if size == ROW and len(set(row).difference(known)) == len(row):
            return row


def _skill_line(rng: random.Random) -> str:
    skill, word = rng.choice(list(KNOWN)), draw_word(rng, held=False)
    return prompt(skill, word) + answer(skill, word)


if __name__ == "__main__":
    main()
