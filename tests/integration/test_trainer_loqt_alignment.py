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
from motley_trainer.errors import SettingsError
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run
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


def test_a_rank_above_the_pruned_copys_sides_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")  # k_proj of a pruned layer has 16 outputs
    folder = loram_job(tmp_path / "job", base, align={"loqt": {"rank": 17}})
    with pytest.raises(SettingsError) as refused:
        run(folder, lambda event: None)
    assert (refused.value.reason, refused.value.field) == ("RANK_TOO_LARGE", "loram.alignment.loqt.rank")
