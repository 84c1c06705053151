"""LoRAM's factors on the copy and on the original, the way there and back, and what cannot be asked for."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import tiny_spec
from architectures import build_model
from motley_adapters.errors import AdapterError
from motley_adapters.formats import CUT_FILE, MAX_CUT_BYTES, max_bytes_of
from motley_adapters.kinds.loram import write_cut
from motley_adapters.kinds.loram_recovery import recover
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import inspect_adapter, read_adapter
from motley_bases.errors import BaseError
from motley_bases.prune_manifest import LayerKeep, read_prune_manifest, write_prune_manifest
from motley_bases.pruned_geometry import DecoderShape, KeptChannels, kept_channels
from motley_client.adapter_files import find_files
from motley_server.registry.bundle_files import BundleFile, checked_files
from motley_trainer.errors import TrainerError
from motley_trainer.methods.loram_linear import RecoveredLinear
from motley_trainer.pruning.loram_checks import check_copy, needs_calibration, takes_copy
from motley_trainer.spec.settings import LoramAlignment, LoramPruning, LoramSettings
from pruned_bases import make_manifest
from torch import Tensor, nn

OTHER = f"sha256:{'e' * 64}"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- On the original


def geometries() -> list[tuple[str, KeptChannels, int, int]]:
    """Return Linears of layers with several query heads to a key-value head, and heads of several sizes."""
    found = []
    for group, head_dim in ((1, 16), (4, 64), (8, 128)):
        shape = DecoderShape(1, 24, 30, 4 * group, 4, head_dim, 10)
        sizes = {"q": 4 * group * head_dim, "k": 4 * head_dim, "o": 24, "down": 24}
        inputs = {"q": 24, "k": 24, "o": 4 * group * head_dim, "down": 30}
        kept = kept_channels(shape, kv_heads=[0, 2], ffn_channels=[1, 3, 4, 29])
        found += [(f"{name}-{group}-{head_dim}", kept[f"{name}_proj"], inputs[name], sizes[name]) for name in sizes]
    return found


@pytest.mark.parametrize(
    ("kept", "inputs", "outputs"), [case[1:] for case in geometries()], ids=[case[0] for case in geometries()]
)
@torch.no_grad()
def test_kept_channels_zeros_and_a_merged_weight_are_one_function(
    kept: KeptChannels, inputs: int, outputs: int
) -> None:
    base = nn.Linear(inputs, outputs)
    linear = RecoveredLinear(base, kept, rank=2, scaling=1.5)
    assert linear.lora_a.shape == (2, inputs if kept.inputs is None else len(kept.inputs))
    assert linear.lora_b.shape == (outputs if kept.outputs is None else len(kept.outputs), 2)
    linear.lora_a.copy_(random(*linear.lora_a.shape))
    linear.lora_b.copy_(random(*linear.lora_b.shape, seed=1))
    filled = recover(LoraPair(linear.lora_a, linear.lora_b, 1.5), kept, inputs, outputs)
    x = random(3, 5, inputs, seed=2)
    found = linear(x)
    torch.testing.assert_close(found, base(x) + 1.5 * (x @ filled.a.T) @ filled.b.T, rtol=1e-5, atol=1e-4)
    linear.is_enabled = False
    assert torch.equal(linear(x), base(x))
    torch.testing.assert_close(linear.merged()(x), found, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_sum_in_bfloat16_is_rounded_once() -> None:
    base = nn.Linear(6, 4, bias=False).to(torch.bfloat16)
    linear = RecoveredLinear(base, KeptChannels(outputs=(1, 3)), rank=2, scaling=1.0)
    linear.lora_a.copy_(random(2, 6))
    linear.lora_b.copy_(random(2, 2, seed=1))
    x = random(5, 6, seed=2).to(torch.bfloat16)
    wanted = base(x).float()
    wanted[:, [1, 3]] += x.float() @ linear.lora_a.T @ linear.lora_b.T
    assert torch.equal(linear(x), wanted.to(torch.bfloat16))


# --- The prune manifest in an adapter's directory

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Write a recovered adapter of the paper base, and beside it what the copy kept."""
    copy, directory = tmp_path / "copy", tmp_path / "adapter"
    copy.mkdir()
    manifest = write_prune_manifest(copy, make_manifest(tiny_spec().fingerprint, [LayerKeep((1, 3), (0,))]))
    write_peft_lora(directory, {UP: LoraPair(random(2, 4), random(8, 2))})
    digest = write_cut(directory, manifest)
    assert digest == manifest.digest
    declare(directory, digest)
    return directory


def declare(directory: Path, digest: str | None, kind: str = "loram") -> None:
    of_kind = {"loram": {"recovered": True, "prune_manifest": digest}} if kind == "loram" else {}
    manifest = {
        "schema_version": 1,
        "kind": kind,
        "trained_on": OTHER if kind == "loram" else "undeclared",
        "serves_on": tiny_spec().fingerprint,
    }
    (directory / "motley_manifest.json").write_text(json.dumps(manifest | of_kind))


def test_a_cut_travels_with_its_adapter_and_is_bound_to_it(adapter: Path, tmp_path: Path) -> None:
    assert read_prune_manifest(adapter) == read_prune_manifest(tmp_path / "copy")
    assert inspect_adapter(adapter, tiny_spec()).spec.kind == "loram"
    content = (adapter / CUT_FILE).read_bytes()
    declared = json.loads((adapter / "motley_manifest.json").read_text())["loram"]["prune_manifest"]
    assert declared == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_cut_is_uploaded_with_the_adapter(adapter: Path) -> None:
    files = find_files(adapter)
    assert CUT_FILE in [path.name for path in files]
    announced = [BundleFile(path.name, path.stat().st_size, "0" * 64) for path in files]
    assert len(checked_files(announced)) == 4
    assert max_bytes_of(CUT_FILE) == MAX_CUT_BYTES > max_bytes_of("motley_manifest.json")


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ("bytes", "DIGEST_MISMATCH", "motley_manifest.loram.prune_manifest"),
        ("undeclared", "UNEXPECTED_FILE", CUT_FILE),
        ("link", "SYMLINK_REFUSED", CUT_FILE),
    ],
)
def test_a_cut_that_is_not_the_declared_one_is_refused(
    adapter: Path, tmp_path: Path, change: str, reason: str, field: str
) -> None:
    if change == "bytes":
        (adapter / CUT_FILE).write_bytes((adapter / CUT_FILE).read_bytes().replace(b"[1,3]", b"[1,2]"))
    elif change == "undeclared":
        declare(adapter, None)
    else:
        (adapter / CUT_FILE).rename(tmp_path / "elsewhere")
        (adapter / CUT_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError) as caught:
        read_adapter(adapter, tiny_spec())
    assert (caught.value.reason, caught.value.field) == (reason, field)


# --- What cannot be


def config(architecture: str = "llama", **fields: Any) -> Any:
    return build_model(architecture, vocab_size=50, **fields).config


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "layers that the base does not have": ({"layers": (2, 9)}, "LAYER_RANGE", "loram.layers"),
    "no layer between the whole ends": ({"layers": None}, "LAYER_RANGE", "loram.layers"),
    "a ratio that leaves no channel": ({"ratio": Fraction(99, 100)}, "EMPTY_LAYER", "loram.ratio"),
    "a pattern that rows cannot have": (
        {"pruning": LoramPruning.SEMI_STRUCTURED, "pattern": (3, 7)},
        "BAD_SPEC",
        "loram.pattern",
    ),
    "alignment of what is whole": (
        {"ratio": Fraction(0), "alignment": LoramAlignment(OTHER)},
        "BAD_SPEC",
        "loram.alignment",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_copy_can_be_is_refused_by_the_protos_names(case: str) -> None:
    fields, reason, field = REFUSED[case]
    with pytest.raises(TrainerError) as caught:
        check_copy(LoramSettings(**{"layers": (1, 2), **fields}), config())
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_heads_are_counted_by_the_rule_before_anything_is_read() -> None:
    grouped, one_to_one = config(), config(num_key_value_heads=4)
    asked = LoramSettings(layers=(0, 3), ratio=Fraction(4, 5))
    check_copy(asked, grouped)  # of 2 key-value heads 1.6 go, rounded down
    with pytest.raises(TrainerError) as caught:
        check_copy(asked, one_to_one)  # of 4 heads 0.8 stay, rounded down
    assert (caught.value.reason, caught.value.field) == ("EMPTY_LAYER", "loram.ratio")


def test_bases_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(BaseError) as foreign:
        check_copy(LoramSettings(layers=(0, 1)), config("gemma2"))
    assert foreign.value.reason == "NOT_PRUNABLE"
    quantized = config()
    quantized.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(TrainerError) as caught:
        check_copy(LoramSettings(layers=(0, 1)), quantized)
    assert caught.value.reason == "ALREADY_QUANTIZED"
    check_copy(LoramSettings(layers=(7, 9), ratio=Fraction(0)), config("gemma2"))  # a LoRA of the base itself


def test_a_copy_is_made_where_something_goes_and_samples_are_read_where_they_count() -> None:
    whole = LoramSettings(ratio=Fraction(0))
    assert not takes_copy(whole)
    assert takes_copy(LoramSettings(ratio=Fraction(0), same_cut_as="a"))
    assert takes_copy(LoramSettings(ratio=Fraction(0), pruning=LoramPruning.SEMI_STRUCTURED, pattern=(4, 8)))
    needed = {pruning: needs_calibration(LoramSettings(pruning=pruning)) for pruning in LoramPruning}
    assert [pruning for pruning, is_needed in needed.items() if not is_needed] == [LoramPruning.RANDOM]
    assert not needs_calibration(LoramSettings(same_cut_as="a"))
