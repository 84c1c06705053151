"""The tables on structural pruning: cuts and what they take, figures by criterion, recovery, choices that differ."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from pruning_plan import CRITERIA, CUTS, ENDS_WHOLE, LOCAL, MAIN, MORE_WINDOWS, RECOVERED, Cell
from readings import Reading
from tables import number, percent, perplexity, spread, table

SIZES = ("parameters", "kv_heads", "ffn_channels")
FORMS: dict[str, Callable[[float], str]] = {"perplexity": perplexity, "skills": percent}


def gone(reading: Reading, cut: str) -> str:
    """Write which share of the parameters a cut takes."""
    costs = reading["costs"]
    return f"{1 - costs[cut]['parameters'] / costs['whole']['parameters']:.0%}"


def title(reading: Reading, cut: str) -> str:
    """Write how much goes, and where."""
    return f"{gone(reading, cut)}, {CUTS[cut].where}"


def shares_unlike(reading: Reading, cell: Cell) -> list[float]:
    """Return, seed by seed, which share of the groups that go `param_first` would have kept."""
    pairs = zip(reading.figures(cell, "unlike"), reading.figures(cell, "gone"), strict=True)
    return [unlike / all_gone for unlike, all_gone in pairs]


def heads_gone(reading: Reading, cell: Cell) -> list[int]:
    """Return, seed by seed, how many key-value heads went: what went in parameters, but for the channels among them."""
    whole, channels, both = (reading["costs"][name] for name in ("whole", "quarter", "half"))
    lost = {name: [whole[name] - cut[name] for cut in (channels, both)] for name in SIZES}
    of_channel = lost["parameters"][0] / lost["ffn_channels"][0]
    of_head = (lost["parameters"][1] - of_channel * lost["ffn_channels"][1]) / lost["kv_heads"][1]
    pairs = zip(reading.figures(cell, "parameters"), reading.figures(cell, "gone"), strict=True)
    return [
        round((whole["parameters"] - left - of_channel * groups) / (of_head - of_channel)) for left, groups in pairs
    ]


def cuts_table(reading: Reading) -> str:
    """Write what each cut leaves, in parameters, heads, channels, bytes and FLOPs."""
    rows = []
    for name, cost in {name: reading["costs"][name] for name in ("whole", *CUTS)}.items():
        counts = [cost[what] for what in SIZES]
        counts += [cost[what][kind] for what in ("bytes", "flops") for kind in ("measured", "predicted")]
        told = ["none", ""] if name == "whole" else [title(reading, name), _flags(name)]
        rows.append([*told, *map(number, counts)])
    tokens = reading["setting"]["window"]
    sizes = ("parameters", "key-value heads", "FFN channels")
    costs = ("bytes, float32", "by the ledger", f"FLOPs of {tokens} tokens", "by the shapes")
    return table(("cut", "`motley base prune`", *sizes, *costs), rows)


def figures_table(reading: Reading, figure: str) -> str:
    """Write one figure by criterion and cut."""
    form = FORMS[figure]
    rows = [["none: the whole base", *[spread(reading.figures(Cell(), figure), form)] * len(CUTS)]]
    for criterion in CRITERIA:
        cells = [Cell(cut, criterion) if cut in LOCAL or criterion in MAIN else None for cut in CUTS]
        told = ["" if cell is None else spread(reading.figures(cell, figure), form) for cell in cells]
        rows.append([f"`{criterion}`", *told])
    return table(("criterion", *(title(reading, cut) for cut in CUTS)), rows)


def recovery_table(reading: Reading) -> str:
    """Write what training gave back, the whole base under the same training first."""
    rows = [["none", "", *_before_and_after(reading, None, None)]]
    rows += [[title(reading, cut), f"`{name}`", *_before_and_after(reading, cut, name)] for cut, name in RECOVERED]
    head = ("cut", "criterion", "perplexity", "recovered", "skills", "recovered")
    return table(head, rows)


def choices_table(reading: Reading) -> str:
    """Write how many choices depend on the order of the estimate, and on how much text it saw."""
    cells = [Cell(cut, criterion) for criterion in ("param_second", "param_mix") for cut in LOCAL]
    cells += [Cell(cut, "param_first", MORE_WINDOWS) for cut in ENDS_WHOLE]
    rows = []
    for cell in cells:
        cut = str(cell.cut)
        rows.append([
            title(reading, cut),
            f"`{cell.criterion}`",
            str(cell.windows),
            number(fmean(reading.figures(cell, "gone"))),
            spread(reading.figures(cell, "unlike"), number),
            percent(fmean(shares_unlike(reading, cell))),
            spread(reading.figures(cell, "perplexity"), perplexity),
            spread(reading.figures(Cell(cut, "param_first"), "perplexity"), perplexity),
        ])  # fmt: skip
    head = ("cut", "criterion", "windows", "groups that go", "others", "share", "perplexity", "of `param_first`")
    return table(head, rows)


def _before_and_after(reading: Reading, cut: str | None, criterion: str | None) -> list[str]:
    cells = (Cell(cut, criterion), Cell(cut, criterion, recovered=True))
    return [spread(reading.figures(cell, figure), form) for figure, form in FORMS.items() for cell in cells]


def _flags(name: str) -> str:
    cut = CUTS[name]
    selection = "" if cut.selection == "local" else f" --selection {cut.selection}"
    return f"`--ratio {cut.ratio} --layers {cut.layers}{selection}`"
