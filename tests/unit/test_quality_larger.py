"""Where torch sees a GPU, a larger base is trained and measured and told apart; elsewhere all is as it was."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from larger_bases import FFN, HIDDEN, LAYERS, MODULES, measure_one_of_each, use_larger
from quality_scripts import HOUSE, RESULTS, imported

FACTS = {"name": "larger", "fingerprint": "f", "parameters": 42e6, "layers": 12, "hidden": 576, "device": "cuda"}


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    with imported(*MODULES, "page", "readings") as modules:
        yield modules


@pytest.fixture(scope="module")
def options(quality: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """Read the command line of a script that measures on a small larger base, which is trained for that."""
    found: Namespace = use_larger(quality, tmp_path_factory.mktemp("bases"), "cpu")
    return found


@pytest.fixture
def fresh(quality: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Have the recipe write a folder in place of a base, and return what it was told; nothing is chosen yet."""
    told: list[list[str]] = []

    def train(arguments: list[str]) -> None:
        told.append(arguments)
        Path(arguments[arguments.index("--out") + 1]).mkdir(parents=True)

    monkeypatch.setattr(import_module("train_base"), "main", train)
    monkeypatch.setattr(quality.subject, "BASES", tmp_path / "bases")
    monkeypatch.setattr(quality.subject, "_used", None)
    return told


# --- what is measured on ---------------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_the_embedded_base_on_the_cpu(quality: SimpleNamespace, fresh: list[list[str]]) -> None:
    chosen = quality.subject.choose()
    assert chosen == quality.subject.current()
    assert (chosen.name, chosen.device, chosen.suffix) == ("tiny", "cpu", "")
    assert chosen.directory == HOUSE / "bases" / "motley_bases" / "assets" / "tiny"
    assert not fresh


def test_with_a_gpu_it_is_the_larger_base_there_unless_told_otherwise(
    quality: SimpleNamespace, fresh: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality.subject, "sees_gpu", lambda: True)
    chosen = quality.subject.choose()
    assert (chosen.name, chosen.device, chosen.suffix) == ("larger", "cuda", "_larger")
    assert chosen.directory.is_dir()
    assert fresh[0][-2:] == ["--device", "cuda"]
    assert fresh[0][:2] == ["--hidden", "576"]
    for asked in ({"device": "cpu"}, {"name": "tiny"}):
        other = quality.subject.choose(**asked)
        assert (other.name, other.device) == ("tiny", "cpu")


def test_the_larger_base_is_trained_once_and_again_for_another_training(
    quality: SimpleNamespace, fresh: list[list[str]]
) -> None:
    first, same, other = (
        quality.subject.choose("larger", "cpu", ("--steps", steps)).directory for steps in ("1", "1", "2")
    )
    assert first == same != other
    assert len(fresh) == 2


def test_a_training_that_did_not_end_leaves_no_base(
    quality: SimpleNamespace, fresh: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(arguments: list[str]) -> None:
        fresh_train(arguments)
        raise KeyboardInterrupt

    fresh_train = import_module("train_base").main
    with monkeypatch.context() as patch:
        patch.setattr(import_module("train_base"), "main", die)
        with pytest.raises(KeyboardInterrupt):
            quality.subject.choose("larger", "cpu")
    assert quality.subject.choose("larger", "cpu").directory.is_dir()
    assert len(fresh) == 2


def test_every_script_measures_on_the_larger_base(quality: SimpleNamespace, options: Namespace, tmp_path: Path) -> None:
    quality.subject.use(options.subject)
    found = measure_one_of_each(quality, tmp_path)
    facts = quality.jobs.subject_facts()
    own = {"name": "larger", "layers": LAYERS, "hidden": HIDDEN, "device": "cpu"}
    assert own.items() <= facts.items()
    # The numbers of S2FT and LoRA come as near to each other as on the embedded base, whatever the width.
    assert found["s2ft"]["parameters"] == LAYERS * (64 + 77) * HIDDEN
    assert found["s2ft LoRA"]["parameters"] / found["s2ft"]["parameters"] == pytest.approx(217_088 / 216_576)
    routed = LAYERS * 8 * (4 * HIDDEN + FFN)
    assert found["goat"]["router_parameters"] == found["goat mixture"]["router_parameters"] == routed
    assert found["loram base"]["base_parameters"] == facts["parameters"]
    cut = (FFN // 2 * 3 + (3 + 1 + 1 + 3) * 16) * HIDDEN  # a key-value head and half of the rest of the layer between
    assert found["loram"]["base_parameters"] == facts["parameters"] - cut
    assert found["loqt"]["loss_before"] != found["loqt full"]["loss_before"]  # of the base, and of drawn weights
    assert all(row["loss"] > 0 for row in found.values())
    quality.subject.use(quality.subject.choose())
    assert quality.loqt.open_base().model.config.hidden_size == 192


def test_jobs_and_bases_are_asked_for_on_the_subjects_device(
    quality: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(quality.jobs, "load_job_base", lambda directory, **more: asked.append(more))
    monkeypatch.setattr(quality.subject, "_used", quality.subject.Subject("larger", tmp_path, "cuda"))
    quality.jobs.load_subject(quality.subject.current())
    quality.jobs.write_job(tmp_path, {}, [], [])
    written = json.loads((tmp_path / "job.json").read_text())
    assert (written["base"], written["base_name"], written["device"]) == (str(tmp_path), "larger", "cuda")
    assert (asked[0]["name"], asked[0]["device"].type) == ("larger", "cuda")


@dataclass(frozen=True)
class Cell:
    """One that says nothing."""


def say_subject(cell: Cell, seed: int) -> dict[str, float]:
    from subject import current

    return {"length": len(current().name)}


def test_processes_measure_on_what_the_command_line_chose(quality: SimpleNamespace, options: Namespace) -> None:
    asked = Namespace(**vars(options) | {"jobs": 1, "seeds": (1,)})
    (row,) = quality.cells.measure_cells([Cell()], say_subject, asked)
    assert row == {"length": [len("larger")]}


# --- result files and the page ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "training", "written"),
    [
        ("tiny", None, {"quality_x.json"}),
        ("larger", None, {"quality_x_larger.json"}),
        ("larger", ["--steps", "1"], set()),
    ],
)
def test_result_files_are_named_by_what_was_measured_on(
    quality: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subject: str, training: Any, written: Any
) -> None:
    monkeypatch.setattr(quality.cells, "RESULTS", tmp_path)
    measured = quality.subject.Subject(subject, tmp_path, "cpu")
    asked = Namespace(seeds=quality.cells.SEEDS, training=training, out=None, subject=measured, jobs=1, began=0.0)
    quality.cells.write("quality_x", {"setting": {}}, asked)
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """Copy the result files, with some as if they had been measured on a larger base, of these facts."""

    def copy(**larger: dict[str, Any] | None) -> Path:
        for path in RESULTS.glob("quality_*.json"):
            (tmp_path / path.name).write_text(path.read_text())
        for name, facts in larger.items():
            content = json.loads((RESULTS / f"quality_{name}.json").read_text())
            content["machine"] |= {"device": "NVIDIA H200", "processes": 4}
            if facts is not None:
                content["setting"]["subject"] = facts
            content["setting"] |= {"heads": 18, "o_heads": 4, "ffn_channels": 1536}
            (tmp_path / f"quality_{name}_larger.json").write_text(json.dumps(content))
        return tmp_path

    return copy


def test_the_page_tells_of_a_larger_base_where_its_files_are_and_nowhere_else(
    quality: SimpleNamespace, results: Callable[..., Path]
) -> None:
    alone = quality.page.render(results())
    page = quality.page.render(results(s2ft=FACTS, goat=FACTS))
    assert "larger base" not in alone
    assert "`quality_goat_larger` " in page.replace("\n", " ")
    whole, _, part = page.partition("\n## On a larger base\n")
    assert whole.count("\n## ") == alone.count("\n## ")
    flowing = part.replace("\n", " ")
    assert "42,000,000 parameters, 12 layers of a hidden size of 576" in flowing
    assert [line for line in part.splitlines() if line.startswith("### ")] == [
        "### S2FT against LoRA",
        "### GOAT against LoRA",
    ]
    assert "on an NVIDIA H200 (4 processes, torch" in flowing
    assert "4 of 18 heads in `o_proj` and 77 of 1536 channels" in flowing
    assert "results/quality_goat_larger.png" in part
    assert "results/quality_goat_larger.png" not in whole
    assert 'Everything but what stands under "On a larger base" was measured' in whole.replace("\n", " ")


@pytest.mark.parametrize(
    ("facts", "told"),
    [(None, "quality_goat_larger does not say which base"), (FACTS | {"fingerprint": "g"}, "measured on another base")],
)
def test_a_larger_base_that_is_not_told_or_not_one_is_refused(
    quality: SimpleNamespace, results: Callable[..., Path], facts: dict[str, Any] | None, told: str
) -> None:
    with pytest.raises(quality.readings.IncompleteResultError, match=told):
        quality.page.render(results(s2ft=FACTS, goat=facts))
