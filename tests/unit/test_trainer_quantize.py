"""`motley base quantize`: a checkpoint that needs no other, takes the original's adapters, and is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint, edit_json
from held_bytes import held_bytes
from motley_adapters.errors import AdapterMismatchError
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.reader import read_adapter
from motley_bases.base import Base
from motley_bases.base_record import RECORD_FILE
from motley_bases.errors import BaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import load_base, read_parsed_config
from motley_trainer.bases import quantize as module
from motley_trainer.bases.quantize import quantize_base
from motley_trainer.errors import TrainerError
from packed_passes import run_packed
from peft_adapters import make_adapter
from pruned_bases import GROUPED_KEEPS, prune_checkpoint
from quantized_bases import METHODS

CPU = torch.device("cpu")
SEQUENCES = ([5, 9, 2, 7, 11, 3, 8], [4, 4, 6])
CUTS = ((4, 2), (7, 3))
PRUNED = f"sha256:{'d' * 64}"


def build(directory: Path, **settings: object) -> Path:
    return build_checkpoint("llama_tied", directory, dtype=torch.bfloat16, **settings)  # type: ignore[arg-type]


def load(directory: Path, quantize: str = "auto") -> Base:
    return load_base(directory, dtype="auto", device=CPU, quantize=quantize)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_serves_without_the_original_as_it_would_quantized_at_load(tmp_path: Path, method: str) -> None:
    original = build(tmp_path / "base", generation={"do_sample": True, "temperature": 0.7})
    written = quantize_base(original, method, tmp_path / "out")
    on_load = load(original, method)
    shutil.rmtree(original)
    base = load(tmp_path / "out")
    assert base.spec.identity == on_load.spec.identity
    assert base.spec.fingerprint == written.original_fingerprint == on_load.spec.fingerprint
    assert (base.spec.quantization, base.spec.dtype) == (method, "bfloat16")
    assert base.spec.generation == on_load.spec.generation
    assert base.spec.has_chat_template
    for ours, theirs in zip(run_packed(base, SEQUENCES, CUTS), run_packed(on_load, SEQUENCES, CUTS), strict=True):
        assert torch.equal(ours, theirs)
    assert written.stored_fingerprint == fingerprint(tmp_path / "out") != written.original_fingerprint
    assert written.stored_bytes < 0.9 * written.original_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stored", "served"), [("bfloat16", "float32"), ("float16", "auto"), ("float32", "bfloat16")])
def test_the_type_that_is_asked_for_is_computed_in_whatever_the_type_that_was_stored(
    tmp_path: Path, method: str, stored: str, served: str
) -> None:
    original = build_checkpoint("llama", tmp_path / "base", dtype=getattr(torch, stored))
    quantize_base(original, method, tmp_path / "out")
    base = load_base(tmp_path / "out", dtype=served, device=CPU)
    expected = "float32" if served == "auto" else served  # float16 is not computed in on a CPU
    assert (base.spec.dtype, base.dtype) == (expected, getattr(torch, expected))
    floats = {parameter.dtype for parameter in base.model.parameters() if parameter.is_floating_point()}
    assert floats == {base.dtype}
    ledger = make_ledger(read_parsed_config(tmp_path / "out"), Weights(base.dtype, method, CPU))
    assert ledger.weight_bytes == pytest.approx(held_bytes(base.model), rel=0.02)
    if stored == "float32":  # quantized at load, its weights would be rounded first
        return
    on_load = load_base(original, dtype=served, device=CPU, quantize=method)
    for ours, theirs in zip(run_packed(base, SEQUENCES, CUTS), run_packed(on_load, SEQUENCES, CUTS), strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_of_the_original_and_recovered_ones_are_taken_but_not_without_the_record(tmp_path: Path) -> None:
    original = build(tmp_path / "base")
    quantize_base(original, "nf4", tmp_path / "out")
    whole = load(original)
    recovered = make_adapter(original, tmp_path / "recovered", seed=1)
    write_loram_manifest(recovered, whole.spec, trained_on=PRUNED)
    spec = read_adapter(recovered, load(tmp_path / "out").spec).spec
    assert (spec.kind, spec.serves_on, spec.trained_on) == ("loram", whole.spec.fingerprint, PRUNED)
    (tmp_path / "out" / RECORD_FILE).unlink()
    bare = load(tmp_path / "out").spec
    with pytest.raises(AdapterMismatchError) as caught:
        read_adapter(recovered, bare)
    assert whole.spec.fingerprint in caught.value.message
    assert bare.fingerprint in caught.value.message


def test_the_config_keeps_what_the_original_says(tmp_path: Path) -> None:
    original = build(tmp_path / "base")
    edit_json(original / "config.json", transformers_version="4.40.0", dtype=None, torch_dtype="bfloat16")
    before = json.loads((original / "config.json").read_text())
    before["dtype"] = before.pop("torch_dtype")
    quantize_base(original, "int8", tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    assert (quantization["load_in_8bit"], quantization["llm_int8_threshold"]) == (True, 0.0)


def test_a_result_that_does_not_serve_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build(tmp_path / "base")

    def fail(*_: object, **__: object) -> Base:
        raise BaseError("it does not serve", reason="PROBE_DIFFERS")

    monkeypatch.setattr(module, "load_base", fail)
    with pytest.raises(BaseError, match="does not serve"):
        quantize_base(original, "nf4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_quantized_base_a_taken_place_and_an_unknown_method_are_refused(tmp_path: Path) -> None:
    original = build(tmp_path / "base")
    quantize_base(original, "nf4", tmp_path / "out")
    for directory, method, out, reason in (
        (tmp_path / "out", "int8", tmp_path / "twice", "ALREADY_QUANTIZED"),
        (original, "int8", tmp_path / "out", "OUTPUT_EXISTS"),
        (original, "fp4", tmp_path / "other", "METHOD"),
    ):
        with pytest.raises(TrainerError) as caught:
            quantize_base(directory, method, out)
        assert caught.value.reason == reason
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_command_tells_its_stages_and_what_became_of_the_base_and_nothing_else(tmp_path: Path) -> None:
    original = build(tmp_path / "base")
    arguments = [sys.executable, "-c", "from motley_trainer.commands.base import base; base()"]
    arguments += ["quantize", str(original), "--method", "nf4", "--out", str(tmp_path / "out")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environ, cwd=tmp_path, check=True)
    assert run.stdout.endswith(f"serves adapters of {fingerprint(original)}\n")
    stages = ["reading the base", "quantizing to nf4", "writing", "checking what was written"]
    assert run.stderr.splitlines() == stages
    assert load(tmp_path / "out").spec.quantization == "nf4"


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_base_is_quantized_with_its_manifest(tmp_path: Path, method: str) -> None:
    original = build_checkpoint("llama", tmp_path / "base")
    pruned = prune_checkpoint(original, tmp_path / "pruned", GROUPED_KEEPS)
    quantize_base(pruned, method, tmp_path / "out")
    base, on_load = load(tmp_path / "out"), load(pruned, method)
    assert base.spec.fingerprint == fingerprint(pruned)
    assert base.spec.pruned_from == fingerprint(original)
    assert (base.spec.quantization, base.spec.linears) == (method, on_load.spec.linears)
    for ours, theirs in zip(run_packed(base, SEQUENCES, CUTS), run_packed(on_load, SEQUENCES, CUTS), strict=True):
        assert torch.equal(ours, theirs)
