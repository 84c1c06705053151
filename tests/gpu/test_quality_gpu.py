"""A base is trained on a GPU as the larger one of docs/quality.md is, and every script's cells are measured there."""

from __future__ import annotations

from pathlib import Path

import pytest
from larger_bases import MODULES, measure_one_of_each, use_larger
from quality_scripts import imported

pytest.importorskip("bitsandbytes", reason="LoQT's weights are held by it")


def test_every_script_finds_on_the_gpu_what_it_finds_on_the_cpu(tmp_path: Path) -> None:
    with imported(*MODULES) as quality:
        options = use_larger(quality, tmp_path, "cuda")
        found = {}
        for device in ("cuda", "cpu"):
            quality.subject.use(quality.subject.Subject("larger", options.subject.directory, device))
            (folder := tmp_path / device).mkdir()
            found[device] = measure_one_of_each(quality, folder)
            assert quality.jobs.open_base().model.device.type == device
    for name, row in found["cpu"].items():
        assert found["cuda"][name].keys() == row.keys()
        assert found["cuda"][name]["loss"] == pytest.approx(row["loss"], rel=0.02), name
