"""`motley base restrict` and `motley base recover`: from names to a directory that serves, or to nothing at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from motley_adapters.errors import AdapterError
from motley_adapters.reader import read_adapter
from motley_bases.errors import BaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.prune_manifest import LayerKeep, read_prune_manifest, write_prune_manifest
from motley_bases.stored_spec import read_spec
from motley_trainer.bases.carry import recover_directory, restrict_directory
from motley_trainer.bases.quantize import quantize_base
from motley_trainer.commands.base import base as base_command
from motley_trainer.errors import OutputError, UnsuitableBaseError
from peft_adapters import make_adapter
from pruned_bases import GROUPED_KEEPS, prune_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two bases, a pruned copy of the first, and a LoRA of either."""
    root = tmp_path_factory.mktemp("house")
    original = build_checkpoint("llama", root / "original")
    build_checkpoint("llama", root / "other", seed=1)
    pruned = prune_checkpoint(original, root / "pruned", GROUPED_KEEPS)
    make_adapter(original, root / "of-the-original", seed=2)
    make_adapter(pruned, root / "of-the-copy", seed=3)
    return root


@pytest.mark.parametrize(
    ("command", "adapter", "serves", "kind"),
    [("restrict", "of-the-original", "pruned", "lora"), ("recover", "of-the-copy", "original", "loram")],
)
def test_a_command_writes_an_adapter_of_the_other_base_and_says_so_in_one_line(
    house: Path, tmp_path: Path, command: str, adapter: str, serves: str, kind: str
) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(
        base_command,
        [command, str(house / adapter), "--original", str(house / "original"), "--pruned", str(house / "pruned"),
         "--out", str(out)],
    )  # fmt: skip
    base = read_spec(house / serves)
    spec = read_adapter(out, base).spec
    assert spec.kind == kind
    assert ran.output == f"{out}: {spec.digest}, serves on {serves} ({base.fingerprint})\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("adapter", "original", "pruned", "reason"),
    [
        ("of-the-original", "other", "pruned", "OTHER_ORIGINAL"),
        ("of-the-original", "pruned", "pruned", "OTHER_ORIGINAL"),
        ("of-the-original", "original", "original", "NO_PRUNE_MANIFEST"),
        ("of-the-original", "original", "nowhere", "NO_SUCH_BASE"),
        ("of-the-copy", "original", "pruned", "SHAPE_MISMATCH"),
        ("original", "original", "pruned", "MISSING_FILE"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name_and_leaves_nothing(
    house: Path, tmp_path: Path, adapter: str, original: str, pruned: str, reason: str
) -> None:
    with pytest.raises((BaseError, AdapterError)) as caught:
        restrict_directory(house / adapter, str(house / original), str(house / pruned), tmp_path / "out")
    assert caught.value.reason == reason
    assert not list(tmp_path.iterdir())


# --- lists that were edited -------------------------------------------------------------------------------------------


def merge_something(copy: Path) -> Path:
    """Move every weight of the layers a little, and say in the manifest that a recovery did."""
    tensors = load_file(copy / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    write_prune_manifest(copy, replace(read_prune_manifest(copy), recovery=f"sha256:{'c' * 64}"))
    return copy


def quantize(copy: Path) -> Path:
    quantize_base(copy, "nf4", copy.with_name("quantized"))
    return copy.with_name("quantized")


HELD: dict[str, Callable[[Path], Path]] = {
    "as it was cut": lambda copy: copy,
    "recovered": merge_something,
    "quantized": quantize,
}


@pytest.mark.parametrize("held", HELD)
def test_a_list_that_is_not_what_was_kept_is_refused_by_the_index(house: Path, tmp_path: Path, held: str) -> None:
    copy = HELD[held](Path(shutil.copytree(house / "pruned", tmp_path / "pruned")))
    directory = read_prune_manifest(copy)

    def restrict_with(layer: int, keep: LayerKeep) -> None:
        layers = (*directory.layers[:layer], keep, *directory.layers[layer + 1 :])
        pruned = copy if held != "quantized" else tmp_path / "pruned"  # whose fingerprint the record names
        edited = write_prune_manifest(pruned, replace(directory, layers=layers))
        assert edited.pruned_fingerprint == directory.pruned_fingerprint
        if pruned != copy:
            shutil.copy(pruned / "prune_manifest.json", copy)
        restrict_directory(house / "of-the-original", str(house / "original"), str(copy), tmp_path / "out")

    first, second = (keep for keep in directory.layers if keep is not None)
    for layer, wrong, field, index in (
        (1, replace(first, kv_heads=(0,)), "layers[1].kv_heads", 0),
        (1, replace(first, ffn_channels=(*first.ffn_channels[:-1], 95)), "layers[1].ffn_channels", 95),
        (2, replace(second, ffn_channels=(1, *second.ffn_channels[1:])), "layers[2].ffn_channels", 1),
        (2, replace(second, kv_heads=(1,)), "layers[2].kv_heads", 1),
    ):
        with pytest.raises(UnsuitableBaseError, match=f"names {index} of original") as caught:
            restrict_with(layer, wrong)
        assert (caught.value.reason, caught.value.field) == ("OTHER_KEPT", f"prune_manifest.{field}")
        assert not (tmp_path / "out").exists()
    restrict_with(1, first)
    assert (tmp_path / "out").is_dir()


def test_an_original_of_other_weights_under_the_right_name_is_refused(house: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(house / "pruned", tmp_path / "pruned"))
    manifest = replace(read_prune_manifest(copy), original_fingerprint=fingerprint(house / "other"))
    write_prune_manifest(copy, manifest)
    with pytest.raises(UnsuitableBaseError) as caught:
        recover_directory(house / "of-the-copy", str(house / "other"), str(copy), tmp_path / "out")
    assert caught.value.reason == "OTHER_KEPT"


def test_a_place_that_is_taken_is_left_as_it_is(house: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(OutputError) as caught:
        recover_directory(house / "of-the-copy", str(house / "original"), str(house / "pruned"), tmp_path)
    assert caught.value.reason == "OUTPUT_EXISTS"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_directory_that_is_not_there_is_wrong_usage(house: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        base_command, ["recover", str(house / "nowhere"), "--original", "tiny", "--pruned", "x", "--out", str(tmp_path)]
    )
    assert ran.exit_code == 2
    assert "nowhere" in ran.output
