"""What is measured of structural pruning: the cuts, the criteria, and every cell that the page wants to see.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

CRITERIA = ("param_first", "param_second", "param_mix", "vector", "l1", "l2", "random")
MAIN = ("param_first", "random", "l2")
NUM_WINDOWS, MORE_WINDOWS = 10, 64

WINDOW = 128  # tokens, as the paper's perplexities; the base was trained on rows of as many
EVALUATION_WINDOWS = 32
LEARNED_LETTERS = 160 * WINDOW
WORDS_PER_SKILL = 40
RECOVERY_STEPS, RECOVERY_ROWS, RECOVERY_RATE = 80, 4, 3e-3


@dataclass(frozen=True, slots=True)
class Cut:
    """How much goes, and where from, as `motley base prune` takes it."""

    ratio: str
    layers: str
    selection: str
    where: str


# A third of six layers is what a quarter of eight is, but for 2 channels of 1024; likewise 370 of 512 channels and a
# head of six, beside half of eight. Across layers, 3/16 of heads and channels has the parameters of 1/4 of the channels
# alone: in a layer with two key-value heads, a quarter takes none.
CUTS = {
    "quarter": Cut("1/4", ":", "local", "every layer"),
    "quarter_ends_whole": Cut("1/3", "1:7", "local", "ends whole"),
    "quarter_across": Cut("3/16", ":", "global", "across layers"),
    "more_across": Cut("1/4", ":", "global", "across layers"),
    "half": Cut("1/2", ":", "local", "every layer"),
    "half_ends_whole": Cut("185/256", "1:7", "local", "ends whole"),
}
LOCAL = tuple(name for name, cut in CUTS.items() if cut.selection == "local")
ACROSS = tuple(name for name, cut in CUTS.items() if cut.selection == "global")
ENDS_WHOLE = ("quarter_ends_whole", "half_ends_whole")  # as the paper prunes
RECOVERED = (
    *((cut, criterion) for cut in ENDS_WHOLE for criterion in MAIN),
    *((cut, "param_first") for cut in LOCAL if cut not in ENDS_WHOLE),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One base to measure.

    Semantics: without a cut it is the whole base; what is recovered was trained after the cut, or without one.
    """

    cut: str | None = None
    criterion: str | None = None
    windows: int = NUM_WINDOWS
    recovered: bool = False

    @property
    def is_compared(self) -> bool:
        """Tell whether its choice is held beside that of `param_first` on the fewer windows."""
        return self.criterion in ("param_second", "param_mix") or self.windows != NUM_WINDOWS


def list_cells() -> tuple[Cell, ...]:
    """List all cells, those that take longest first."""
    return (
        Cell(recovered=True),
        *(Cell(cut, criterion, recovered=True) for cut, criterion in RECOVERED),
        Cell(),
        *(Cell(cut, criterion) for cut in LOCAL for criterion in CRITERIA),
        *(Cell(cut, criterion) for cut in ACROSS for criterion in MAIN),
        *(Cell(cut, "param_first", MORE_WINDOWS) for cut in ENDS_WHOLE),
    )
