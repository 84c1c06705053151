"""What docs/quality.md tells of LoQT follows its figures, and what is measured is what it tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import LoqtSchedule, LoqtSettings, LoqtStart
from quality_scripts import imported, row

MODULES = ("cells", "half_size", "loqt", "loqt_plan", "loqt_section", "readings")
DATASETS = {"dataset": f"sha256:{'0' * 64}", "gate": {"dataset": f"sha256:{'1' * 64}"}}


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture
def content(quality: SimpleNamespace) -> dict[str, Any]:
    """Make up a result file: every way alike."""
    plan, num_seeds = quality.loqt_plan, len(quality.cells.SEEDS)
    figures = {"loss_before": 5.0, "loss": 2.0, "merges": 7}
    return {
        "machine": {"cores": 2, "cpu": "machine", "processes": 2, "torch": "2"},
        "seeds": list(quality.cells.SEEDS),
        "setting": {"steps": plan.STEPS, "rows": 8, "intervals": plan.INTERVALS, "held_out": 160},
        "trials": [asdict(trial) | {"loss": [1.0]} for trial in plan.list_trials()],
        "cells": [
            asdict(one) | {name: [value] * num_seeds for name, value in figures.items()} for one in plan.list_lessons()
        ],
    }


def render(quality: SimpleNamespace, content: dict[str, Any]) -> str:
    section: str = quality.loqt_section.loqt_section(quality.readings.Reading("quality_loqt", content))
    return section


def told(section: str, claim: str) -> list[str]:
    """Return the words on a claim, place by place."""
    cells = next(line for line in section.splitlines() if line.startswith(f"| {claim} |")).split(" | ")
    return cells[3].removesuffix(" |").split("<br>")


@pytest.mark.parametrize(
    ("claim", "first", "second"),
    [
        ("full training ends below LoQT", "full", "LoQT"),
        ("not quantized, LoQT ends below LoQT", "LoQT, not quantized", "LoQT"),
        ("merging ends below one low-rank training", "LoQT", "LoQT, never merged"),
        ("compensated ends below not compensated", "LoQT", "LoQT, not compensated"),
        ("intervals that grow end below static ones", "LoQT", "LoQT, static"),
        ("moments begun anew end below moments kept", "LoQT", "LoQT, moments kept"),
    ],
)
def test_the_word_of_a_claim_follows_the_losses_of_its_own_ways(
    quality: SimpleNamespace, content: dict[str, Any], claim: str, first: str, second: str
) -> None:
    assert set(told(render(quality, content), claim)) == {"undecided"}
    row(content, {"start": "scratch", "way": first})["loss"] = [1.0] * 5
    row(content, {"start": "scratch", "way": second})["loss"] = [1.5] * 5
    assert told(render(quality, content), claim)[0] == "held"
    row(content, {"start": "scratch", "way": first})["loss"] = [3.0] * 5
    assert told(render(quality, content), claim)[0] == "reversed"


def test_the_rate_with_the_least_loss_is_the_chosen_one_for_every_kind_of_loqt(
    quality: SimpleNamespace, content: dict[str, Any]
) -> None:
    plan = quality.loqt_plan
    row(content, {"start": "scratch", "way": "LoQT", "rate": 0.02}, "trials")["loss"] = [0.5]
    assert plan.chosen_rate(content["trials"], "scratch", "LoQT, static") == 0.02
    assert "**0.500 at 0.02**" in render(quality, content)
    assert "lies the choice for" in render(quality, content).replace("\n", " ")


def test_a_result_file_that_lacks_something_is_refused(quality: SimpleNamespace, content: dict[str, Any]) -> None:
    row(content, {"start": "continued", "way": "full"})["loss"].pop()
    with pytest.raises(quality.readings.IncompleteResultError, match=r"^quality_loqt has 4 of 5"):
        render(quality, content)


@pytest.mark.parametrize("way", ["LoQT", "LoQT, not quantized", "LoQT, static", "LoQT, never merged"])
def test_a_job_is_asked_for_what_the_page_tells(quality: SimpleNamespace, way: str) -> None:
    spec = read_spec(quality.loqt.make_spec("scratch", way, 1e-3, 1, 300, 24) | DATASETS)
    assert isinstance(spec.settings, LoqtSettings)
    assert spec.settings.start is LoqtStart.SCRATCH
    assert spec.settings.rank == 24
    assert spec.quantization == ("none" if way == "LoQT, not quantized" else "nf4")
    schedules = {"LoQT, static": LoqtSchedule.STATIC, "LoQT, never merged": LoqtSchedule.NEVER}
    assert spec.settings.schedule is schedules.get(way, LoqtSchedule.EXPONENTIAL)


@pytest.mark.parametrize("way", ["full", "LoQT"])
def test_a_base_of_half_the_size_is_trained_from_nothing(
    quality: SimpleNamespace, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = quality.loqt_plan
    monkeypatch.setitem(plan.INTERVALS, plan.SCRATCH, 2)
    monkeypatch.setattr(plan, "NUM_HELD_OUT", 4)
    quality.loqt.open_texts.cache_clear()
    found = quality.loqt.train(plan.SCRATCH, way, 4e-3, 1, steps=4)
    quality.loqt.open_texts.cache_clear()
    assert found["loss"] < found["loss_before"]
    assert found["merges"] == (1 if way == "LoQT" else 0)


def test_half_the_size_is_half_of_every_side(quality: SimpleNamespace, tmp_path: Path) -> None:
    assert quality.half_size.write_half_size(tmp_path) == 96
