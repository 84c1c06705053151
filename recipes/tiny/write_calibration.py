"""Write the text that the tiny base is pruned on: `python recipes/tiny/write_calibration.py`.

Owns how much text there is, and that half of it is prose and half lines of the skills that the base knows, on words
that are not held out. Knows nothing of tokens or models. What it writes depends on this folder alone.
"""

import random
from itertools import cycle
from pathlib import Path

from prose import document
from skills import KNOWN, answer, draw_word, prompt

PATH = Path(__file__).parents[2] / "bases" / "motley_bases" / "assets" / "tiny" / "calibration.txt"
LETTERS = (
    20_000  # without blank lines; some 260 windows of 64 tokens to draw from, and a quarter as many to evaluate on
)


def main() -> None:
    """Write the text."""
    PATH.write_bytes(calibration_text().encode())
    print(f"{PATH}: {PATH.stat().st_size} bytes")


def calibration_text() -> str:
    """Draw documents, a blank line between two, prose whenever there is less of it than of skill lines.

    Semantics: so neither runs ahead of the other, and the end, which is held out, is like the rest. A skill line is a
    document of its own, as in training; skills take turns.
    """
    rng = random.Random("calibration")
    skills = cycle(KNOWN)
    documents: list[str] = []
    num_prose = num_lines = 0  # letters of each
    while num_prose + num_lines < LETTERS:
        if num_prose <= num_lines:
            documents.append(document(rng))
            num_prose += len(documents[-1])
        else:
            skill, word = next(skills), draw_word(rng, held=False)
            documents.append(prompt(skill, word) + answer(skill, word))
            num_lines += len(documents[-1])
    return "\n\n".join(documents) + "\n"


if __name__ == "__main__":
    main()
