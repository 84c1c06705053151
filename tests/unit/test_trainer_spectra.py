"""Spectra that jobs keep for each other: none is taken twice, whatever else differs; a broken one is taken again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import spec_of
from motley_adapters.reader import inspect_adapter
from motley_trainer.methods import spectra
from motley_trainer.methods.spectra import Spectra
from motley_trainer.spec.settings import GoatScale, GoatSegments, GoatSettings
from small_goats import SETTINGS, attach, goats, small_model

RESIDUAL = "goat_residual.safetensors"
WEIGHT = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
DIRECTIONS = torch.tensor([[0], [3]])


@pytest.fixture
def num_taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what tells how many spectra were taken since it was asked last."""
    taken: list[int] = []
    svd = torch.linalg.svd

    def counted(*arguments: Any, **keywords: Any) -> Any:
        taken.append(1)
        return svd(*arguments, **keywords)

    def count() -> int:
        found = len(taken)
        taken.clear()
        return found

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return count


def residual_of(folder: Path, kept: Path, settings: GoatSettings, *, dtype: torch.dtype, seed: int = 0) -> bytes:
    model = small_model().to(torch.bfloat16).to(dtype)  # as of a checkpoint that is stored in bfloat16
    attach(model, settings, seed=seed, spectra=kept).write(folder, {})
    return (folder / RESIDUAL).read_bytes()


def test_a_second_job_takes_no_spectrum_and_writes_the_same_residual(
    tmp_path: Path, num_taken: Callable[[], int]
) -> None:
    settings, float32 = replace(SETTINGS, target_modules=("q_proj", "down_proj")), torch.float32
    kept = tmp_path / "worker" / "spectra"
    wanted = residual_of(tmp_path / "first", kept, settings, dtype=float32)
    assert num_taken() == 6
    scaled = replace(settings, scale=GoatScale.ALPHA, alpha=3.0, top_k=1)
    assert residual_of(tmp_path / "scale", kept, scaled, dtype=float32, seed=4) == wanted
    assert residual_of(tmp_path / "dtype", kept, settings, dtype=torch.bfloat16) == wanted
    fewer = replace(settings, target_modules=("down_proj",))
    residual_of(tmp_path / "fewer", kept, fewer, dtype=float32)
    assert num_taken() == 0
    assert inspect_adapter(tmp_path / "dtype", spec_of(small_model()))
    residual_of(tmp_path / "geometry", kept, replace(settings, segments=GoatSegments.MINI), dtype=float32)
    assert num_taken() == 6


def test_another_weight_has_another_spectrum_and_random_segments_are_their_seeds(
    tmp_path: Path, num_taken: Callable[[], int]
) -> None:
    for place, seed in enumerate((1, 1, 2)):
        settings = replace(SETTINGS, segments=GoatSegments.RANDOM, target_modules=("q_proj",))
        residual_of(tmp_path / str(place), tmp_path / "kept", settings, dtype=torch.float32, seed=seed)
        assert num_taken() == (3, 0, 3)[place]
    keeps = Spectra(tmp_path)
    first, second = (keeps.slices(weight, DIRECTIONS) for weight in (WEIGHT, WEIGHT.nextafter(WEIGHT + 1)))
    assert num_taken() == 2
    assert not torch.equal(first.left, second.left)


def test_experts_begin_the_same_from_what_was_kept(tmp_path: Path) -> None:
    models = [small_model() for _ in range(3)]
    for model, kept in zip(models, (None, tmp_path, tmp_path), strict=True):
        attach(model, replace(SETTINGS, target_modules=("q_proj",)), spectra=kept)
    for path, goat in goats(models[0]).items():
        for other in models[1:]:
            assert torch.equal(goat.goat_a, goats(other)[path].goat_a)
            assert torch.equal(goat.residual_b, goats(other)[path].residual_b)


@pytest.mark.parametrize("place", [3, -1], ids=["the header", "a number"])
def test_what_is_broken_is_taken_again_and_mended(tmp_path: Path, num_taken: Callable[[], int], place: int) -> None:
    wanted = Spectra(tmp_path).slices(WEIGHT, DIRECTIONS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[place] ^= 1
    file.write_bytes(broken)
    assert num_taken() == 1
    for taken in (1, 0):
        found = Spectra(tmp_path).slices(WEIGHT, DIRECTIONS)
        assert num_taken() == taken
        assert torch.equal(found.right, wanted.right)
    assert file.read_bytes() == whole


def test_a_place_that_takes_nothing_costs_the_time_alone(tmp_path: Path, num_taken: Callable[[], int]) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        Spectra(tmp_path / "file" / "spectra").slices(WEIGHT, DIRECTIONS)
    assert num_taken() == 2


def test_what_was_not_read_for_longest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = Spectra(tmp_path)
    keeps.slices(WEIGHT, DIRECTIONS)
    (first,) = tmp_path.iterdir()
    monkeypatch.setattr(spectra, "MAX_BYTES", 2 * first.stat().st_size)
    keeps.slices(WEIGHT + 1, DIRECTIONS)
    (second,) = set(tmp_path.iterdir()) - {first}
    keeps.slices(WEIGHT, DIRECTIONS)  # so that the second is older
    keeps.slices(WEIGHT + 2, DIRECTIONS)
    left = set(tmp_path.iterdir())
    assert len(left) == 2
    assert first in left
    assert second not in left
