"""Jobs of LoRAM whose pruned copy is aligned by LoQT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loram_jobs import loram_job, make_base, stages_of
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_base
from motley_trainer.errors import DivergedError, SettingsError
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run
from motley_trainer.methods.loqt_linear import LoqtLinear
from safetensors.torch import load_file

CPU = torch.device("cpu")


def test_loram_is_aligned_by_loqt(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    asked = {"steps": 5, "loqt": {"rank": 4, "merge_interval": 2, "schedule": "LOQT_SCHEDULE_STATIC"}}
    folder = loram_job(tmp_path / "job", base, align=asked)
    events: list[Mapping[str, Any]] = []
    result = run(folder, events.append)
    assert [merge["step"] for event in events if "merges" in event for merge in event["merges"]["merges"]] == [2, 4]
    assert "aligning" in stages_of(events)
    provenance = json.loads((folder / "adapter" / "motley_manifest.json").read_text())["provenance"]
    told = provenance["copy"]["alignment"]
    assert (told["engine"], told["settings"]["rank"], told["steps"]) == ("loqt", 4, 5)
    pruned = load_file(folder / "stages" / "pruned" / "model.safetensors")
    aligned = load_file(folder / "stages" / "aligned" / "model.safetensors")
    assert pruned.keys() == aligned.keys()
    assert [name for name in pruned if torch.equal(pruned[name], aligned[name])] == ["lm_head.weight"]
    served = load_base(base, dtype="float32", device=CPU).spec
    assert read_adapter(folder / "adapter", served).spec.digest == result.digest
    assert result.evaluation.num_samples > 0
    again = loram_job(tmp_path / "again", base, align=asked)
    kept: list[Mapping[str, Any]] = []
    with pytest.raises(JobCancelledError):
        run(again, kept.append, lambda: any("merges" in event for event in kept))
    assert run(again, kept.append).digest == result.digest


@pytest.mark.parametrize("pruning", ["UNSTRUCTURED", "SEMI_STRUCTURED"])
def test_loqt_would_fill_the_zeros_of_single_weights(tmp_path: Path, pruning: str) -> None:
    base = make_base(tmp_path / "base")
    folder = loram_job(tmp_path / "job", base, align={"loqt": {}}, pruning=f"LORAM_PRUNING_{pruning}")
    with pytest.raises(SettingsError) as refused:
        run(folder, lambda event: None)
    assert (refused.value.reason, refused.value.field) == ("LOQT_FILLS_ZEROS", "loram.alignment.loqt")


@pytest.mark.parametrize("interval", [5, 6])
def test_an_interval_that_is_never_over_is_refused_by_its_field(tmp_path: Path, interval: int) -> None:
    asked = {"steps": 5, "loqt": {"merge_interval": interval}}
    folder = loram_job(tmp_path / "job", make_base(tmp_path / "base"), align=asked)
    events: list[Mapping[str, Any]] = []
    with pytest.raises(SettingsError) as refused:
        run(folder, events.append)
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", "loram.alignment.loqt.merge_interval")
    assert stages_of(events) == ["reading data"]


@pytest.mark.parametrize("way", [{}, {"loqt": {"rank": 4}}], ids=["full rank", "loqt"])
def test_no_number_in_an_alignment_names_the_alignments_rate(tmp_path: Path, way: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base")
    folder = loram_job(tmp_path / "job", base, align={"steps": 3, "learning_rate": 1e30, **way})
    with pytest.raises(DivergedError) as ended:
        run(folder, lambda event: None)
    assert (ended.value.reason, ended.value.field) == ("LOSS_NOT_FINITE", "loram.alignment.learning_rate")


def test_a_gradient_that_is_no_number_names_the_alignments_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LoqtLinear.renew
    monkeypatch.setattr(LoqtLinear, "renew", lambda linear, gradient: real(linear, gradient / 0))
    folder = loram_job(tmp_path / "job", make_base(tmp_path / "base"), align={"steps": 3, "loqt": {"rank": 4}})
    with pytest.raises(DivergedError, match=r"lower loram\.alignment\.loqt\.scale") as ended:
        run(folder, lambda event: None)
    assert ended.value.field == "loram.alignment.learning_rate"


def test_an_8_bit_optimizer_that_is_not_there_names_the_alignments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.optim

    def step(self: object) -> None:
        raise NotImplementedError("no such step for CPUs")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", step)
    asked = {"steps": 3, "loqt": {"rank": 4, "optimizer": "LOQT_OPTIMIZER_ADAMW_8BIT"}}
    folder = loram_job(tmp_path / "job", make_base(tmp_path / "base"), align=asked)
    with pytest.raises(SettingsError) as refused:
        run(folder, lambda event: None)
    assert (refused.value.reason, refused.value.field) == ("NO_8BIT_OPTIMIZER", "loram.alignment.loqt.optimizer")


def test_a_rank_above_the_pruned_copys_sides_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")  # k_proj of a pruned layer has 16 outputs
    folder = loram_job(tmp_path / "job", base, align={"loqt": {"rank": 17}})
    with pytest.raises(SettingsError) as refused:
        run(folder, lambda event: None)
    assert (refused.value.reason, refused.value.field) == ("RANK_TOO_LARGE", "loram.alignment.loqt.rank")
