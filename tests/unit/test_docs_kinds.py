"""docs/adapters.md describes the kinds that are served, with the very fields and tensors that our writers write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from adapter_files import spec_of
from architectures import build_model
from kind_adapters import make_goat, make_loram, make_s2ft
from motley_adapters.manifest import _FIELDS
from motley_adapters.reader import KIND_READERS
from safetensors.torch import load_file

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`[^\n]*\n(.*?)(?=^##)", TEXT, re.DOTALL | re.MULTILINE))


def written(kind: str, directory: Path) -> Path:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    if kind == "goat":
        return make_goat(directory, model, base, seed=1)
    return (make_s2ft if kind == "s2ft" else make_loram)(directory, base, seed=1)


def test_the_kinds_are_those_that_are_served() -> None:
    assert SECTIONS.keys() == KIND_READERS.keys()


@pytest.mark.parametrize("kind", ["s2ft", "goat", "loram"])
def test_the_object_of_a_kind_has_the_fields_that_are_written(kind: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```$", SECTIONS[kind], re.DOTALL | re.MULTILINE)
    documented: dict[str, Any] = json.loads(f"{{{block}}}")
    manifest = json.loads((written(kind, tmp_path) / "motley_manifest.json").read_text())
    assert documented[kind].keys() == manifest[kind].keys() - {"eta", "rank_for_scale"}
    assert manifest.keys() == {*_FIELDS, kind}


@pytest.mark.parametrize("kind", ["s2ft", "goat"])
def test_the_tensors_of_a_kind_are_those_that_are_written(kind: str, tmp_path: Path) -> None:
    suffixes = set()
    for file in written(kind, tmp_path).glob("*.safetensors"):
        suffixes |= {name.rpartition(".")[2] for name in load_file(file)}
    assert set(re.findall(r"`PATH\.(\w+)`", SECTIONS[kind])) == suffixes
