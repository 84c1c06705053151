"""`motley base restrict` and `motley base recover`: from names to a directory that serves, or to nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import build_checkpoint
from motley_adapters.errors import AdapterError
from motley_adapters.reader import read_adapter
from motley_bases.errors import BaseError
from motley_bases.stored_spec import read_spec
from motley_trainer.bases.carry import recover_directory, restrict_directory
from motley_trainer.commands.base import base as base_command
from motley_trainer.errors import OutputError
from peft_adapters import make_adapter
from pruned_bases import GROUPED_KEEPS, prune_checkpoint
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
