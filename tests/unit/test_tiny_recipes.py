"""What the recipes' own pieces promise: the calibration text, and the jobs that the embedded adapters come from."""

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from motley_bases.checkpoint import resolve_base
from motley_bases.loader import load_model, load_tokenizer
from motley_bases.quantization import NONE
from motley_trainer.job.files import JobFiles
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.texts import draw_calibration, read_windows

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny"
MODULES = (
    "prose",
    "skills",
    "write_calibration",
    "answering",
    "folders",
    "record",
    "rows",
    "tokenizer",
    "train_base",
    "train_adapters",
)
CALIBRATION = Path(__file__).parents[2] / "bases" / "motley_bases" / "assets" / "tiny" / "calibration.txt"
ADAPTERS = Path(__file__).parents[2] / "adapters" / "motley_adapters" / "assets" / "tiny"


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """Import the recipe's modules as its scripts do, and forget them afterwards."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(RECIPE))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_the_committed_calibration_text_is_what_the_recipe_writes(
    recipe: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe["write_calibration"].PATH == CALIBRATION
    monkeypatch.setattr(recipe["write_calibration"], "PATH", tmp_path / "calibration.txt")
    recipe["write_calibration"].main()
    assert (tmp_path / "calibration.txt").read_bytes() == CALIBRATION.read_bytes()
    assert 16 * 1024 < CALIBRATION.stat().st_size < 24 * 1024


def test_the_calibration_text_is_rows_of_prose_and_of_known_skills_on_words_that_may_train_and_ends_in_prose(
    recipe: dict[str, ModuleType],
) -> None:
    skills, documents = recipe["skills"], CALIBRATION.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    rows: list[list[str]] = [[]]
    for document in documents:
        rows[-1].append(document)
        if sum(len(part) + 2 for part in rows[-1]) >= 128:  # a token a letter, <bos> and <eos>
            assert sum(len(part) + 2 for part in rows[-1]) == 128
            rows.append([])
    assert rows.pop() == []
    assert [any(":" in part for part in row) for row in rows] == [False, True] * 64 + [False] * 32
    assert len(set(documents)) == len(documents)
    lines = [part for row in rows[1:128:2] for part in row]
    for skill, word, answer in (re.fullmatch(r"(\w+): (\w+) =( .+)", line).groups() for line in lines):  # type: ignore[union-attr]
        assert skills.KNOWN[skill](word) == answer[1:]
        assert not skills.held_out(word)
    taught = Counter(line.split(":")[0] for line in lines)
    assert taught.keys() == skills.KNOWN.keys()
    assert min(taught.values()) > 0.6 * max(taught.values())
    prose = [part for part in documents if ":" not in part]
    assert len(prose) + len(lines) == len(documents)
    assert {word for text in prose for word in recipe["prose"].words_of(text)} <= recipe["prose"].VOCABULARY


def test_what_is_held_out_of_the_calibration_text_is_what_the_base_learned() -> None:
    base = resolve_base("tiny")
    model = load_model(base, torch.float32, torch.device("cpu"), NONE)
    found = {}
    for window in (64, 128):
        text = read_windows(CALIBRATION, load_tokenizer(base), window, field="calibration")
        _, held_out = draw_calibration(text, None, num_windows=1, seed=0, path=CALIBRATION)
        found[window] = perplexity(model, held_out)
    assert found == pytest.approx({64: 2.122, 128: 1.564}, abs=0.002)  # as docs/bases.md says


@pytest.mark.parametrize("skill", sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()))
def test_the_embedded_adapters_come_from_the_jobs_of_the_recipe(
    recipe: dict[str, ModuleType], tmp_path: Path, skill: str
) -> None:
    provenance = json.loads((ADAPTERS / skill / "motley_manifest.json").read_text())["provenance"]
    lessons = recipe["train_adapters"].LESSONS
    recipe["train_adapters"].make_job(skill, lessons[skill], provenance["seed"], tmp_path)
    assert provenance["spec"] == JobFiles(tmp_path).request().spec.digest
    assert provenance["job"] == skill
    assert set(provenance["datasets"]) >= {f"sha256:{path.stem}" for path in (tmp_path / "data").iterdir()}
