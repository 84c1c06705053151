"""What docs/quality.md tells of GOAT follows its figures, and what is measured is what it tells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from motley_trainer.methods.goat_linear import GoatLinear
from motley_trainer.methods.goat_start import scale_of
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import GoatSegments, GoatSettings, LoraSettings
from quality_scripts import imported, row

MODULES = ("cells", "embedded", "goat", "goat_mixture", "goat_plan", "goat_section", "jobs", "readings")
DATASETS = {"dataset": f"sha256:{'0' * 64}", "gate": {"dataset": f"sha256:{'1' * 64}"}}


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    with imported(*MODULES) as modules:
        yield modules


# --- the section -----------------------------------------------------------------------------------------------------


@pytest.fixture
def content(quality: SimpleNamespace) -> dict[str, Any]:
    """Make up a result file: all ways alike, and each at its best at a rate near 0.004."""
    plan, seeds = quality.goat_plan, list(quality.cells.SEEDS)
    figures = {
        "parameters": 147456,
        "router_parameters": 81920,
        "loss": 0.5,
        "right": 0.25,
        "least": 0.05,
        "greatest": 0.2,
        "least_of_all": 0.01,
        "greatest_of_all": 0.4,
        "effective": 7.0,
        "idle": 3,
    }
    return {
        "machine": {"cores": 2, "cpu": "machine", "processes": 2, "torch": "2"},
        "seeds": seeds,
        "setting": {"steps": 100, "rows": 16, "asked": 48, "layers": 8, "sides": [192, 512]},
        "trials": [
            {"way": cell.way, "rate": cell.rate, "loss": [abs(math.log(cell.rate / 4e-3))]}
            for cell in plan.list_trials()
        ],
        "cells": [
            {"way": cell.way, "rate": cell.rate} | {name: [value] * len(seeds) for name, value in figures.items()}
            for cell in plan.list_cells()
        ],
    }


def render(quality: SimpleNamespace, content: dict[str, Any]) -> str:
    section: str = quality.goat_section.goat_section(quality.readings.Reading("quality_goat", content))
    return section


def told(section: str, claim: str) -> tuple[str, str]:
    """Return what was measured of a claim, and its word."""
    cells = next(line for line in section.splitlines() if line.startswith(f"| {claim} |")).split(" | ")
    return cells[2], cells[3].removesuffix(" |")


def test_the_section_names_its_command_and_what_was_trained(quality: SimpleNamespace, content: dict[str, Any]) -> None:
    text = render(quality, content).replace("\n", " ")
    assert "`python benchmarks/quality/goat.py`" in text
    assert "That is 147,456 numbers in A and B" in text
    assert "the routers' 81,920 come on top" in text
    assert "24.0 where it has 192 and 39.2 where it has 512" in text
    assert "an even one is 12.5%" in text
    assert "less than 1.25% of the tokens; there are 320 in all" in text


CLAIMS = (
    ("GOAT answers more than LoRA, with as many numbers in A and B", {"way": "LoRA"}, "right", "100.0%"),
    ("GOAT has less held-out loss than LoRA, with as many numbers in A and B", {"way": "LoRA"}, "loss", "1.000"),
    (
        "GOAT has less held-out loss than a LoRA that has as many numbers as its routers too",
        {"way": "LoRA of rank 13"},
        "loss",
        "1.000",
    ),
    (
        "GOAT has less held-out loss than a mixture from zero, with the theoretical scale",
        {"way": "a mixture from zero"},
        "loss",
        "1.000",
    ),
    (
        "GOAT has less held-out loss than GOAT with the plain scale",
        {"way": "GOAT with the plain scale", "rate": 3e-3},
        "loss",
        "1.000",
    ),
    (
        "GOAT has less held-out loss than GOAT without the balance loss",
        {"way": "GOAT without the balance loss"},
        "loss",
        "1.000",
    ),
    (
        "with the balance loss, an expert's greatest share is smaller",
        {"way": "GOAT without the balance loss"},
        "greatest",
        "100.0%",
    ),
    ("segments: `head` fits better than `minor`", {"way": "minor"}, "loss", "1.000"),
)


@pytest.mark.parametrize(("claim", "other", "figure", "one"), CLAIMS, ids=[claim for claim, *_ in CLAIMS])
def test_the_word_of_a_claim_follows_both_sides(
    quality: SimpleNamespace, content: dict[str, Any], claim: str, other: dict[str, Any], figure: str, one: str
) -> None:
    assert told(render(quality, content), claim)[1] == "undecided"
    row(content, other)[figure] = [1.0] * 5
    found, after = told(render(quality, content), claim)
    assert found.endswith(f"against {one}, {0 if figure == 'right' else 5} of 5 seeds")
    row(content, other)[figure] = [0.001] * 5
    before = told(render(quality, content), claim)[1]
    words = "held", "reversed"
    assert (before, after) == (words if figure == "right" else words[::-1])


def test_what_was_swept_is_told_at_the_rate_that_was_chosen(quality: SimpleNamespace, content: dict[str, Any]) -> None:
    claim = "GOAT has less held-out loss than LoRA, with as many numbers in A and B"
    row(content, {"way": "GOAT", "rate": 9e-3})["loss"] = [0.1, 0.1, 0.1, 0.1, 0.6]
    assert told(render(quality, content), claim)[1] == "undecided"
    row(content, {"way": "GOAT", "rate": 9e-3}, "trials")["loss"] = [-1.0]
    assert told(render(quality, content), claim) == ("`next`: 0.200 against 0.500, 4 of 5 seeds", "held")


def test_scales_are_compared_at_every_rate(quality: SimpleNamespace, content: dict[str, Any]) -> None:
    row(content, {"way": "GOAT", "rate": 1e-3})["loss"] = [0.1] * 5
    row(content, {"way": "GOAT", "rate": 2.7e-2})["loss"] = [0.9] * 5
    claim = "at one learning rate, the theoretical scale has less loss than the plain one"
    found, words = told(render(quality, content), claim)
    assert words == "held<br>undecided<br>undecided<br>reversed"
    assert found.startswith("0.001: 0.100 against 0.500, 5 of 5 seeds<br>0.003: ")


def test_a_choice_at_the_end_of_what_was_tried_is_said_to_be(quality: SimpleNamespace, content: dict[str, Any]) -> None:
    def choice() -> str:
        text = render(quality, content).replace("\n", " ")
        return text.partition("the choice for ")[2].partition(".")[0]

    whole = choice()
    row(content, {"way": "LoRA", "rate": 2e-3}, "trials")["loss"] = [-1.0]
    assert "LoRA" not in whole
    assert "LoRA" in choice()


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("cells", {"way": "LoRA"}),
        ("cells", {"way": "GOAT", "rate": 1e-3}),
        ("cells", {"way": "minor"}),
        ("trials", {"way": "LoRA", "rate": 2e-3}),
    ],
)
def test_a_row_that_is_not_there_is_refused(
    quality: SimpleNamespace, content: dict[str, Any], part: str, wanted: dict[str, Any]
) -> None:
    content[part].remove(row(content, wanted, part))
    with pytest.raises(quality.readings.IncompleteResultError, match=r"^quality_goat has 0 rows of Cell"):
        render(quality, content)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_no_goat_cell_is_measured_twice(quality: SimpleNamespace) -> None:
    for cells in (quality.goat_plan.list_cells(), quality.goat_plan.list_trials()):
        assert len(cells) == len(set(cells))


def test_ways_differ_in_what_they_are_named_for_alone(quality: SimpleNamespace) -> None:
    plan = quality.goat_plan
    settings = {
        cell.way: read_spec(quality.goat.make_spec(cell.way, 1e-3, 1) | DATASETS).settings for cell in plan.list_cells()
    }
    like = dict.fromkeys(settings, settings[plan.GOAT])
    assert settings[plan.MIXTURE] == like[plan.MIXTURE]
    assert settings[plan.MIXTURE_PLAIN] == settings[plan.GOAT_PLAIN]
    changed = {way: _differences(settings[way], like[way]) for way in (plan.GOAT_PLAIN, plan.UNBALANCED, "minor")}
    assert changed[plan.UNBALANCED] == {"balance_loss"}
    assert changed["minor"] == {"segments"}
    assert changed[plan.GOAT_PLAIN] == {"scale", "alpha"}
    assert settings["minor"].segments is GoatSegments.MINOR
    lora, plain, theoretical = (settings[way] for way in (plan.LORA, plan.GOAT_PLAIN, plan.GOAT))
    assert isinstance(lora, LoraSettings)
    assert scale_of(plain, 192) == lora.alpha / lora.rank == 2
    assert scale_of(theoretical, 192) == 24
    assert lora.target_modules == theoretical.target_modules


def _differences(one: GoatSettings, other: GoatSettings) -> set[str]:
    return {name for name in GoatSettings.__dataclass_fields__ if getattr(one, name) != getattr(other, name)}


def test_an_uneven_spread_is_told(quality: SimpleNamespace) -> None:
    even, uneven = [0.25] * 4, [0.5, 0.48, 0.02, 0.0]
    found = quality.goat.spread_of([even, uneven])
    assert (found["least"], found["greatest"]) == (0.125, 0.375)
    assert (found["least_of_all"], found["greatest_of_all"], found["idle"]) == (0.0, 0.5, 2)
    assert found["effective"] == pytest.approx((4 + 1 / (0.25 + 0.2304 + 0.0004)) / 2, abs=1e-3)


def test_a_mixture_from_zero_is_a_job_but_for_its_start(quality: SimpleNamespace, tmp_path: Path) -> None:
    spec = quality.goat.make_spec("GOAT", 5e-3, 3) | {"steps": 2, "batch_size": 4}
    spec["goat"] = spec["goat"] | {"target_modules": ["k_proj"]}
    learned, asked = quality.embedded.draw_lines(3, "next", 8), quality.embedded.draw_asked(3, "next", 4)
    starts: list[float] = []

    def begin(model: torch.nn.Module, seed: int) -> None:
        ids = torch.tensor([[5, 6, 7, 8]])
        experts = [module for module in model.modules() if isinstance(module, GoatLinear)]
        with torch.no_grad():
            first = model(ids).logits
            quality.goat_mixture.begin_as_lora(model, seed)
            second = model(ids).logits
            for module in experts:
                module.is_enabled = False
            base = model(ids).logits
        for module in experts:
            module.is_enabled = True
            assert 0.9 / math.sqrt(192) < module.goat_a.abs().max() < 1 / math.sqrt(192)
        starts.extend(float((found - base).abs().max()) for found in (first, second))

    as_job = quality.jobs.run_job(spec, learned, asked, tmp_path / "job").evaluation
    same = quality.goat_mixture.train_from(lambda *_: None, spec, learned, asked, tmp_path / "same")
    other = quality.goat_mixture.train_from(begin, spec, learned, asked, tmp_path / "other")
    assert same == as_job
    assert other.loss_before == as_job.loss_before
    assert other.loss_after != as_job.loss_after
    assert starts[0] > 0
    assert starts[1] == 0
    assert quality.goat.read_sizes(tmp_path / "other")["router_parameters"] == 8 * 192 * 8
