"""The facts of a base without its weights: what loading it would have told, and nothing of what it cannot know."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from motley_bases import stored_spec
from motley_bases.checkpoint import resolve_base
from motley_bases.errors import BaseError
from motley_bases.loader import load_base
from motley_bases.stored_spec import read_spec
from motley_trainer.bases.quantize import quantize_base
from pruned_bases import GROUPED_KEEPS, prune_checkpoint


def loaded(directory: Path) -> object:
    return load_base(directory, dtype="auto", device=torch.device("cpu")).spec


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3"])
def test_it_is_what_loading_tells_of_every_family_whole_and_pruned(tmp_path: Path, family: str) -> None:
    whole = build_checkpoint(family, tmp_path / "whole", generation={"do_sample": True, "top_p": 0.5})
    pruned = prune_checkpoint(whole, tmp_path / "pruned", GROUPED_KEEPS)
    for directory in (whole, pruned):
        assert read_spec(directory) == loaded(directory)
    assert read_spec(pruned).pruned_from == read_spec(whole).fingerprint


def test_it_is_what_loading_tells_of_the_embedded_base() -> None:
    assert read_spec(resolve_base("tiny")) == loaded(resolve_base("tiny"))


def test_it_is_what_loading_tells_of_a_pruned_base_that_was_quantized(tmp_path: Path) -> None:
    whole = build_checkpoint("llama", tmp_path / "whole", dtype=torch.bfloat16)
    pruned = prune_checkpoint(whole, tmp_path / "pruned", GROUPED_KEEPS)
    quantize_base(pruned, "nf4", tmp_path / "nf4")
    assert read_spec(tmp_path / "nf4") == loaded(tmp_path / "nf4")
    assert read_spec(tmp_path / "nf4").fingerprint == read_spec(pruned).fingerprint


def test_no_weight_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Module] = []
    describe = stored_spec.describe

    def watch(model: torch.nn.Module, *rest: object, **more: object) -> object:
        seen.append(model)
        return describe(model, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_spec, "describe", watch)
    read_spec(build_checkpoint("llama", tmp_path))
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}


def test_what_it_cannot_know_is_refused(tmp_path: Path) -> None:
    whole = build_checkpoint("llama", tmp_path / "whole")
    pruned = prune_checkpoint(whole, tmp_path / "pruned", GROUPED_KEEPS)
    shutil.copy(whole / "model.safetensors", pruned)
    for directory, reason in (
        (build_checkpoint("gemma2", tmp_path / "gemma"), "NOT_PRUNABLE"),
        (pruned, "OTHER_MANIFEST"),
    ):
        with pytest.raises(BaseError) as caught:
            read_spec(directory)
        assert caught.value.reason == reason
