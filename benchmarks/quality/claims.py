"""A paper's claim beside what was found: the rule that says whether it held, and the table that shows it.

Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tables import table

RULE = (
    "*Held* means that the mean over the seeds is ordered as the claim says, and so is each of at least four seeds in "
    "five, where both sides had the same texts; *reversed*, that the same is true of the opposite order; *undecided*, "
    "that neither is. The words are worked out from the numbers."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The two sides of a claim in one place, seed by seed."""

    where: str
    first: Sequence[float]
    second: Sequence[float]


@dataclass(frozen=True, slots=True)
class Claim:
    """That one thing is below another, or above it.

    Semantics: `paper` is what the paper found, in its own setting; `form` writes a figure of ours.
    """

    says: str
    paper: str
    findings: Sequence[Finding]
    form: Callable[[float], str]
    is_below: bool = True


def verdict(finding: Finding, *, is_below: bool = True) -> str:
    """Say whether what a claim says of two sides held."""
    low, high = (finding.first, finding.second) if is_below else (finding.second, finding.first)
    for word, less, more in (("held", low, high), ("reversed", high, low)):
        if fmean(less) < fmean(more) and 5 * _num_below(less, more) >= 4 * len(less):
            return word
    return "undecided"


def claims_table(claims: Sequence[Claim]) -> str:
    """Write the table of claims: a line in a cell for each place where one was looked at."""
    return table(
        ("claim", "paper", "measured", "held?"),
        [
            (
                claim.says,
                claim.paper,
                "<br>".join(_measured(claim, finding) for finding in claim.findings),
                "<br>".join(verdict(finding, is_below=claim.is_below) for finding in claim.findings),
            )
            for claim in claims
        ],
    )


def _measured(claim: Claim, finding: Finding) -> str:
    low, high = (finding.first, finding.second) if claim.is_below else (finding.second, finding.first)
    sides = f"{claim.form(fmean(finding.first))} against {claim.form(fmean(finding.second))}"
    return f"{finding.where}: {sides}, {_num_below(low, high)} of {len(low)} seeds"


def _num_below(low: Sequence[float], high: Sequence[float]) -> int:
    return sum(one < other for one, other in zip(low, high, strict=True))
