"""What `motley base prune` tells: what was asked against what went, and a recovery by what it really did."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from motley_bases.pruned import LayerShape, PrunedShapes
from motley_trainer.commands import prune as command
from motley_trainer.pruning.prune import PruneReport
from motley_trainer.pruning.recovery import Recovered

MERGED = Recovered(f"sha256:{'d' * 64}", 40, 3.0, 2.0)
NOTHING_MERGED = Recovered(None, 0, 3.0, 3.0)
REPORT = PruneReport(
    directory=Path("out"),
    fingerprint=f"sha256:{'e' * 64}",
    num_parameters_before=1000,
    num_parameters_after=940,
    ratio_asked=Fraction(1, 10),
    ratio_gone=Fraction(60, 800),
    shapes=PrunedShapes((LayerShape(4, 2, 96),)),
    perplexity_before=10.0,
    perplexity_pruned=20.0,
    perplexity_recovered=None,
    num_evaluation_windows=7,
    num_unlike_first_order=None,
    recovered=None,
)


def told(report: PruneReport) -> str:
    return "\n".join(command._lines(report))


def warnings(report: PruneReport) -> list[str]:
    lines = [line.removeprefix("warning: ") for line in command._lines(report) if line.startswith("warning: ")]
    assert command._json(report)["warnings"] == lines
    return lines


def test_what_was_asked_stands_beside_what_went() -> None:
    assert "heads and channels: 10.00% asked to go, 7.50% of their parameters gone\n" in told(REPORT)
    as_json = command._json(REPORT)
    assert (as_json["ratio_asked"], as_json["ratio_gone"]) == (0.1, 0.075)


def test_a_recovery_below_the_whole_base_is_told_without_a_warning() -> None:
    report = replace(REPORT, perplexity_recovered=9.5, recovered=MERGED)
    assert "10.000 before, 20.000 pruned, 9.500 recovered (7 windows)" in told(report)
    assert f"recovery: step 40 merged, {MERGED.digest}" in told(report)
    assert warnings(report) == []


@pytest.mark.parametrize("perplexity", [10.0, 15.0])
def test_a_recovery_that_stops_above_the_whole_base_is_partial(perplexity: float) -> None:
    report = replace(REPORT, perplexity_recovered=perplexity, recovered=MERGED)
    assert f"{perplexity:.3f} recovered" in told(report)
    assert warnings(report) == [
        f"recovery is partial: perplexity is {perplexity:.3f}, not lower than 10.000 before pruning"
    ]


@pytest.mark.parametrize("perplexity", [20.0, 25.0, float("nan")])
def test_what_got_no_better_is_never_called_recovered(perplexity: float) -> None:
    report = replace(REPORT, perplexity_recovered=perplexity, recovered=MERGED)
    assert warnings(report) == [
        f"the recovery steps did not help: perplexity is {perplexity:.3f}, not lower than 20.000 without"
    ]
    assert " recovered" not in told(report)
    assert f"{perplexity:.3f} after the recovery steps (7 windows)" in told(report)


def test_a_recovery_of_which_nothing_was_merged_says_so() -> None:
    report = replace(REPORT, recovered=NOTHING_MERGED)
    assert warnings(report) == ["no recovery step lowered the loss of the validation windows: nothing was merged"]
    assert "recovery: " not in told(report)
    assert "20.000 pruned (7 windows)" in told(report)
    assert command._json(report)["recovery"] is None


def test_without_a_recovery_or_a_text_there_is_nothing_to_warn_of() -> None:
    assert warnings(REPORT) == []
    silent = replace(REPORT, perplexity_before=None, perplexity_pruned=None, num_evaluation_windows=0)
    assert warnings(silent) == []
    assert "perplexity: not measured, as there was no text" in told(silent)
