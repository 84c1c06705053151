"""The claims of LLM-Pruner that can be looked at here, each with the paper's figures and ours.

Source: LLM-Pruner, arXiv:2305.11627, and the results that its repository lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from claims import Claim, Finding
from pruning_plan import CUTS, ENDS_WHOLE, LOCAL, MAIN, Cell
from pruning_tables import gone, shares_unlike, title
from readings import Reading
from tables import percent, perplexity, times

FEWER = 0.01  # of the groups that go
OTHER_CUTS = tuple(cut for cut in CUTS if cut not in ENDS_WHOLE)


def list_claims(reading: Reading) -> list[Claim]:
    """List the claims, ready to be judged, where the paper looked: with the ends whole, unless they say otherwise."""
    return [
        *_order_claims(reading, ENDS_WHOLE),
        _mixed_claim(reading),
        *_task_claims(reading, ENDS_WHOLE),
        *_place_claims(reading),
        *_recovery_claims(reading),
    ]  # fmt: skip


def list_claims_elsewhere(reading: Reading) -> list[Claim]:
    """List the claims that one criterion is better than another, at all cuts where the paper did not look."""
    return [*_order_claims(reading, OTHER_CUTS), *_task_claims(reading, OTHER_CUTS)]


def _order_claims(reading: Reading, cuts: Sequence[str]) -> list[Claim]:
    orders = (
        ("param_first", "random", "19.09 against 27.51"),
        ("random", "l2", "27.51 against 582.41"),
        ("param_first", "l2", "19.09 against 582.41"),
        ("param_first", "vector", "19.09 against 22.28"),
        ("param_first", "param_second", "19.09 against 19.77"),
        ("param_first", "l1", "no figure"),
    )
    return [
        Claim(f"`{one}` costs less than `{other}`", paper, _sides(reading, cuts, one, other, "perplexity"), perplexity)
        for one, other, paper in orders
    ]


def _mixed_claim(reading: Reading) -> Claim:
    mixed = [
        Finding(gone(reading, cut), shares := shares_unlike(reading, Cell(cut, "param_mix")), [FEWER] * len(shares))
        for cut in ENDS_WHOLE
    ]
    said = f"`param_mix` takes what `param_first` takes, but for less than {FEWER:.0%}"
    return Claim(said, "reported of its code", mixed, percent)


def _task_claims(reading: Reading, cuts: Sequence[str]) -> list[Claim]:
    orders = (("param_first", "random", "56.69 against 52.69"), ("random", "l2", "52.69 against 42.65"))
    return [
        Claim(
            f"`{one}` answers more than `{other}`",
            paper,
            _sides(reading, cuts, one, other, "skills"),
            percent,
            is_below=False,
        )
        for one, other, paper in orders
    ]


def _place_claims(reading: Reading) -> list[Claim]:
    ends = []
    for is_recovered, told in ((False, ""), (True, " and recovered")):
        for cut in ("quarter", "half"):
            cells = (Cell(name, "param_first", recovered=is_recovered) for name in (f"{cut}_ends_whole", cut))
            lost = [reading.figures(cell, "perplexity") for cell in cells]
            ends.append(Finding(f"{gone(reading, cut)}{told}", *lost))
    quarter, half = (gone(reading, cut) for cut in ENDS_WHOLE)
    sizes = [
        Finding(f"`{name}`", *(reading.figures(Cell(cut, name), "perplexity") for cut in ENDS_WHOLE)) for name in MAIN
    ]
    return [
        Claim("whole ends cost less than a cut in every layer", "the ends matter most", ends, perplexity),
        Claim(f"{quarter} gone cost less than {half}", "a sharp drop at 50%", sizes, perplexity),
    ]


def _recovery_claims(reading: Reading) -> list[Claim]:
    base = reading.figures(Cell(), "perplexity")
    trained = reading.figures(Cell(recovered=True), "perplexity")
    lost = {(cut, name): reading.figures(Cell(cut, name), "perplexity") for cut in ENDS_WHOLE for name in MAIN}
    regained = {
        (cut, name): reading.figures(Cell(cut, name, recovered=True), "perplexity")
        for cut in ENDS_WHOLE
        for name in MAIN
    }
    papers = {"param_first": "17.58 against 19.09"}
    claims = [
        Claim(
            f"recovery makes `{name}` cost less, beside a whole base trained alike",
            papers.get(name, "no figure"),
            [
                Finding(gone(reading, cut), _over(regained[cut, name], trained), _over(lost[cut, name], base))
                for cut in ENDS_WHOLE
            ],
            times,
        )
        for name in MAIN
    ]
    gaps = [
        Finding(
            gone(reading, cut),
            *(_apart(of[cut, "param_first"], of[cut, "random"]) for of in (regained, lost)),
        )
        for cut in ENDS_WHOLE
    ]
    said = "recovery narrows what lies between `param_first` and `random`"
    return [*claims, Claim(said, "1.26 against 3.19, to `vector`", gaps, perplexity)]


def _sides(reading: Reading, cuts: Sequence[str], one: str, other: str, figure: str) -> list[Finding]:
    """Return both sides at those of the cuts where both were measured."""
    both = [cut for cut in cuts if cut in LOCAL or {one, other} <= set(MAIN)]
    return [
        Finding(
            gone(reading, cut) if cut in ENDS_WHOLE else title(reading, cut),
            *(reading.figures(Cell(cut, name), figure) for name in (one, other)),
        )
        for cut in both
    ]


def _over(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value / whole for value, whole in zip(values, base, strict=True)]


def _apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(one, other, strict=True)]
