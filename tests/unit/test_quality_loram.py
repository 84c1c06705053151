"""The sections on LoRAM say what a result file says, and a copy is measured with the factors that its job trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from motley_adapters.reader import read_adapter
from motley_bases.kept_channels import kept_by_path
from motley_trainer.job.evaluation import measure
from quality_scripts import imported, row

MODULES = (
    "jobs",
    "loram",
    "loram_claims",
    "loram_job",
    "loram_memory_plan",
    "loram_memory_section",
    "loram_plan",
    "loram_section",
    "loram_tables",
    "readings",
    "training_memory",
    "training_memory_plan",
    "wearing",
)
MACHINE = {"cpu": "a machine", "cores": 2, "processes": 2, "torch": "2"}
HALF = {"way": "structured", "ratio": "1/2", "alignment": None, "quantization": "none"}


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    with imported(*MODULES) as modules:
        yield modules


def five(value: float) -> list[float]:
    return [value + 0.01 * place for place in range(5)]


def lesson_row(quality: SimpleNamespace, lesson: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {"loss": five(1.0), "right": [0.5] * 5}
    if lesson.way == quality.loram_plan.BASE:
        figures |= {"loss": five(9.0), "right": [0.0] * 5, "prose_loss": five(0.5), "base_parameters": [1000] * 5}
    elif lesson.is_cut:
        figures |= {"trained": [60] * 5, "prose_loss": five(0.7), "base_parameters": [600] * 5}
        figures |= {"copy_loss": five(2.0), "copy_right": [0.25] * 5}
    else:
        figures |= {"loss": five(0.5), "right": [0.75] * 5, "trained": [100] * 5}
    return asdict(lesson) | figures


@pytest.fixture
def lessons(quality: SimpleNamespace) -> dict[str, Any]:
    """Make up a result file in which recovery pays, and of the rates tried the one between is the best."""
    plan = quality.loram_plan
    aligned = [
        asdict(trial) | {"loss": [abs(trial.alignment_rate - 3e-4) + 1], "copy_loss": [0.5]}
        for trial in plan.list_alignment_trials()
    ]
    trials = [
        asdict(trial) | {"loss": [abs(trial.rate - plan.RATES[1]) + 1], "copy_loss": [0.5]}
        for trial in plan.list_trials(aligned)
    ]
    alignment = {"steps": 6, "rows": 8, "window": 128, "letters": 6000}
    setting = {"steps": 16, "rows": 8, "asked": 64, "alignment": alignment}
    return {
        "machine": MACHINE,
        "seeds": [1, 2, 3, 4, 5],
        "setting": setting | {"layers": 8, "kv_heads": 2, "ffn_channels": 512},
        "aligned": aligned,
        "trials": trials,
        "cells": [lesson_row(quality, lesson) for lesson in (plan.Lesson(plan.BASE), *plan.list_lessons())],
    }


@pytest.fixture
def memory(quality: SimpleNamespace) -> dict[str, Any]:
    """Make up a result file of what the formulas say."""
    plan, cells = quality.loram_memory_plan, []
    for cell in plan.CELLS:
        formulas = {
            "weights": plan.weight_bytes(cell),
            "scales": 0,
            "trained": plan.num_trained(cell),
            "state": plan.state_bytes(cell),
            "kept": 2 * plan.kept_bytes(cell),
            "kept_by_linears": plan.kept_bytes(cell),
        }
        resident = [formulas["weights"] + formulas["state"] + formulas["kept"] + place for place in range(5)]
        cells.append(asdict(cell) | {name: [value] * 5 for name, value in formulas.items()} | {"resident": resident})
    setting = {"rows": 4, "length": 128, "steps": 3, "layers": 12, "hidden": 512}
    return {"machine": MACHINE, "seeds": [1, 2, 3, 4, 5], "setting": setting, "cells": cells}


def render(quality: SimpleNamespace, content: dict[str, Any]) -> str:
    text: str = quality.loram_section.loram_section(quality.readings.Reading("quality_loram", content))
    return text


def render_memory(quality: SimpleNamespace, content: dict[str, Any]) -> str:
    reading = quality.readings.Reading("quality_loram_memory", content)
    text: str = quality.loram_memory_section.loram_memory_section(reading)
    return text


def verdicts(page: str, claim: str) -> dict[str, str]:
    """Return the words of a claim, by where it was looked at."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {claim} |"))
    _, _, measured, held = line.strip("| ").split(" | ")
    places = (finding.partition(": ")[0] for finding in measured.split("<br>"))
    return dict(zip(places, held.split("<br>"), strict=True))


# --- the section -----------------------------------------------------------------------------------------------------


def test_every_claim_is_judged_wherever_a_copy_was_trained_on(
    quality: SimpleNamespace, lessons: dict[str, Any]
) -> None:
    page = render(quality, lessons)
    for claim in (
        "recovered, it answers more than the untuned base",
        "recovered, it has less loss than the untuned base",
        "on the base it has less loss than on the copy",
        "on the base it answers more than on the copy",
        "a LoRA on the base has less loss than what was recovered",
        "a LoRA on the base answers more than what was recovered",
    ):
        found = verdicts(page, claim)
        assert len(found) == len(quality.loram_plan.list_cuts())
        assert set(found.values()) == {"held"}
    assert set(verdicts(page, "random has less loss than structured, recovered").values()) == {"undecided"}


@pytest.mark.parametrize(
    ("figure", "values", "claim"),
    [
        ("loss", [10.0] * 5, "recovered, it has less loss than the untuned base"),
        ("copy_loss", [0.1] * 5, "on the base it has less loss than on the copy"),
        ("copy_right", [1.0] * 5, "on the base it answers more than on the copy"),
        ("loss", [0.1] * 5, "a LoRA on the base has less loss than what was recovered"),
        ("right", [1.0] * 5, "a LoRA on the base answers more than what was recovered"),
    ],
)
def test_the_word_of_a_claim_follows_the_numbers_of_its_own_cell(
    quality: SimpleNamespace, lessons: dict[str, Any], figure: str, values: list[float], claim: str
) -> None:
    row(lessons, HALF)[figure] = values
    found = verdicts(render(quality, lessons), claim)
    assert found.pop("structured, 1/2") == "reversed"
    assert set(found.values()) == {"held"}


def test_alignment_is_held_beside_the_same_cut_without_it(quality: SimpleNamespace, lessons: dict[str, Any]) -> None:
    row(lessons, HALF | {"alignment": "plain"})["loss"] = [0.9] * 5
    row(lessons, HALF | {"alignment": "plain", "ratio": "3/4"})["loss"] = [1.2] * 5
    found = verdicts(
        render(quality, lessons), "with plain alignment the loss of what is recovered is less than without"
    )
    assert found == {"structured, 1/4": "undecided", "structured, 1/2": "held", "structured, 3/4": "reversed"}


def test_the_rate_with_the_least_loss_on_the_base_is_the_chosen_one(
    quality: SimpleNamespace, lessons: dict[str, Any]
) -> None:
    plan = quality.loram_plan
    nf4 = {"way": "structured", "quantization": "nf4", "rate": plan.RATES[2]}
    row(lessons, nf4, part="trials")["loss"] = [0.5]
    page = render(quality, lessons)
    assert "0.500 / **0.500" not in page
    assert f"**0.500 / 0.500 at {plan.RATES[2]:g}**" in page
    assert "lies the choice for structured, 1/2, NF4." in page.replace("\n", " ")
    assert plan.chosen_rate(lessons["trials"], plan.QLORAM) == plan.RATES[2]
    assert plan.chosen_rate(lessons["trials"], plan.Lesson("structured", "3/4")) == plan.RATES[1]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a row": lambda content: content["cells"].remove(row(content, HALF)),
    "a seed of a row": lambda content: row(content, HALF)["copy_loss"].pop(),
    "the trials": lambda content: content.pop("trials"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_result_file_that_lacks_something_is_refused(
    quality: SimpleNamespace, lessons: dict[str, Any], edit: Callable[[dict[str, Any]], object]
) -> None:
    edit(lessons)
    with pytest.raises(quality.readings.IncompleteResultError, match=r"^quality_loram has "):
        render(quality, lessons)


def test_alignment_by_loqt_is_asked_of_the_job(quality: SimpleNamespace) -> None:
    plan = quality.loram_plan
    lesson = plan.Lesson("structured", "1/2", "LoQT")
    assert lesson in plan.list_lessons()
    spec = quality.loram.make_spec(lesson, 1e-3, 1, {"dataset": "sha256:0", "learning_rate": 1e-4})
    assert spec["loram"]["alignment"]["loqt"] == {"merge_interval": 15}


def test_no_cell_is_measured_twice(quality: SimpleNamespace) -> None:
    plan = quality.loram_plan
    trials = plan.list_trials([asdict(one) | {"loss": [1.0]} for one in plan.list_alignment_trials()])
    for cells in (plan.list_lessons(), plan.list_alignment_trials(), trials):
        assert len(cells) == len(set(cells))


# --- what is measured ------------------------------------------------------------------------------------------------


def test_what_is_measured_on_the_copy_are_the_factors_that_were_recovered(
    quality: SimpleNamespace, tmp_path: Path
) -> None:
    plan = quality.loram_plan
    lines = quality.loram.draw_lines(1, plan.SKILL, 4)
    spec = quality.loram.make_spec(plan.Lesson("random", "1/2"), 0.1, 1, None)
    spec |= {"steps": 1, "batch_size": 2, "checkpoint_steps": 1}
    quality.loram_job.run_in(tmp_path, spec, lines, lines[2:])
    base = quality.jobs.open_base()
    samples = quality.jobs.read_samples(lines[2:], base.tokenizer)
    found = quality.loram_job.measure_copy(tmp_path, samples, samples)

    copy = quality.loram_job.open_copy(tmp_path)
    manifest = copy.manifest()
    assert manifest is not None
    held = quality.loram_job.load_job_base(
        copy.directory, name="copy", dtype="float32", device=torch.device("cpu"), quantization="none"
    )
    alone = measure(held.model, held.tokenizer, samples, [])
    kept = kept_by_path(manifest, base.spec)
    (part,) = read_adapter(tmp_path / "adapter", base.spec).parts
    num_trained = 0
    with torch.no_grad():
        for path, unit in part.units.items():
            weight = held.model.get_submodule(path).weight
            delta = torch.zeros(base.spec.linears[path][::-1])
            delta[:] = quality.wearing.delta(unit, torch.eye(delta.shape[1]), delta.shape[0]).T
            of = kept.get(path)
            rows = slice(None) if of is None or of.outputs is None else list(of.outputs)
            columns = slice(None) if of is None or of.inputs is None else list(of.inputs)
            weight += delta[rows][:, columns]
            num_trained += plan.RANK * sum(weight.shape)
    adapted = measure(held.model, held.tokenizer, samples, [])
    assert found.num_trained == num_trained
    assert found.prose_loss == pytest.approx(alone.loss, rel=1e-5)
    assert found.adapted.loss == pytest.approx(adapted.loss, rel=1e-4)
    assert abs(adapted.loss - alone.loss) > 0.01 * alone.loss


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_formulas_of_the_base_are_those_of_the_memory_of_training(quality: SimpleNamespace) -> None:
    plan, training = quality.loram_memory_plan, quality.training_memory_plan
    for cell in plan.CELLS:
        if not cell.is_copy:
            assert plan.num_trained(cell) == training.num_trained(cell.training)
            assert plan.kept_bytes(cell) == training.kept_bytes(cell.training)
            full = training.Cell(training.FULL, cell.dtype)
            assert plan.num_parameters(cell) == training.num_trained(full)
    whole, copy = (
        sum(i * o for i, o in plan.linears(cell)) for cell in (plan.Cell(is_copy=False), plan.Cell(is_copy=True))
    )
    assert whole == 2 * copy


def test_memory_is_told_beside_its_formulas_and_its_claims_follow(
    quality: SimpleNamespace, memory: dict[str, Any]
) -> None:
    page = render_memory(quality, memory)
    assert "(1.0000)" in page
    claim = "LoRAM takes less than a LoRA on the base"
    assert set(verdicts(page, claim).values()) == {"held"}
    row(memory, {"is_copy": True, "dtype": "float32"})["resident"] = [10**12] * 5
    found = verdicts(render_memory(quality, memory), claim)
    assert found.pop("resident, float32") == "reversed"
    assert set(found.values()) == {"held"}


def test_what_scales_take_is_counted_to_the_weights(quality: SimpleNamespace, memory: dict[str, Any]) -> None:
    def told(page: str) -> str:
        return next(line for line in page.splitlines() if line.startswith("| QLoRAM | nf4")).split(" | ")[3]

    weights = quality.loram_memory_plan.weight_bytes(quality.loram_memory_section.QLORAM)
    row(memory, {"quantization": "nf4"})["scales"] = [weights] * 5
    assert told(render_memory(quality, memory)).endswith("(2.0000)")
