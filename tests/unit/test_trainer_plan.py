"""`motley base plan`: what fits, from a config alone, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_bases.errors import BaseError
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import read_parsed_config
from motley_trainer.bases.plan import Question, make_plan, plan_lines, show_bytes
from motley_trainer.commands.base import base as base_command
from motley_trainer.errors import SettingsError
from motley_trainer.sizes import parse_size
from typer.testing import CliRunner

MIB = 2**20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and nothing else."""
    made = build_checkpoint("llama", tmp_path_factory.mktemp("made"))
    for path in made.iterdir():
        if path.name != "config.json":
            path.unlink()
    return made


def test_a_plan_is_what_the_ledger_leaves(llama: Path) -> None:
    plan = make_plan(Question(str(llama), 2 * MIB, dtype="float32", context=100, ranks=(4, 8)))
    ledger = make_ledger(read_parsed_config(llama), Weights(torch.float32))
    assert plan.weight_bytes == ledger.weight_bytes
    assert plan.left_bytes == 2 * MIB - ledger.weight_bytes
    assert plan.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert plan.kv_tokens == plan.left_bytes // 768
    assert plan.num_contexts == plan.kv_tokens // 100
    beside = plan.left_bytes - 100 * 768
    assert [(entry.rank, entry.num_adapters) for entry in plan.ranks] == [
        (rank, beside // ledger.adapter_bytes(rank)) for rank in (4, 8)
    ]


def test_quantizing_leaves_more(llama: Path) -> None:
    left = {
        method: make_plan(Question(str(llama), MIB, dtype="bfloat16", quantize=method, device="cuda")).left_bytes
        for method in ("none", "int8", "nf4")
    }
    assert left["none"] < left["int8"]
    assert left["none"] < left["nf4"]


def test_weights_that_do_not_fit_are_told_of(llama: Path) -> None:
    question = Question(str(llama), 1000, dtype="float32")
    plan = make_plan(question)
    assert (plan.kv_tokens, plan.num_contexts, [entry.num_adapters for entry in plan.ranks]) == (0, 0, [0, 0, 0])
    assert plan_lines(question, plan)[-1].startswith("does not fit: ")
    assert not plan.fits


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_fails_where_the_weights_do_not_fit_and_still_says_what_it_counted(
    form: list[str], llama: Path
) -> None:
    needed = make_plan(Question(str(llama), 0, dtype="float32")).weight_bytes
    statuses = []
    for memory in (needed - 1, needed):
        arguments = ["plan", str(llama), "--memory", str(memory), "--dtype", "float32", *form]
        told = CliRunner().invoke(base_command, arguments)
        assert str(needed) in told.output or "weights " in told.output
        assert ("does not fit: 1 B" in told.output) == (memory < needed and not form)
        statuses.append(told.exit_code)
    assert statuses == [1, 0]


def test_the_command_prints_lines_or_json(llama: Path) -> None:
    arguments = ["plan", str(llama), "--memory", "4MiB", "--dtype", "bfloat16", "--quantize", "nf4", "--rank", "5"]
    told = CliRunner().invoke(base_command, arguments)
    assert told.exit_code == 0, told.output
    assert "nf4 computed in bfloat16, on cpu" in told.output
    assert "rank 5 " in told.output
    asked = CliRunner().invoke(base_command, [*arguments, "--json"])
    plan = make_plan(Question(str(llama), 4 * MIB, dtype="bfloat16", quantize="nf4", ranks=(5,)))
    assert json.loads(asked.output)["ranks"] == [
        {"rank": 5, "adapter_bytes": plan.ranks[0].adapter_bytes, "num_adapters": plan.ranks[0].num_adapters}
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5kib", 1536), ("7", 7), ("0.1TB", 10**11), (" 3b ", 3)],
)
def test_sizes_are_read_exactly(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "lots", "-1", "1e9", "24 Gi", "1.GB", "\u0661", "9" * 300, "9" * 5000, "8388608TiB", f"1.{'0' * 300}"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_size(text)
    assert (caught.value.reason, caught.value.field) == ("SIZE", "memory")
    assert len(caught.value.message) < 150


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"context": 0}, "CONTEXT", "context"),
        ({"context": 257}, "CONTEXT", "context"),
        ({"ranks": (8, 0)}, "RANK", "rank"),
        ({"device": "tpu"}, "DEVICE", "device"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    fields: dict[str, object], reason: str, field: str, llama: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        make_plan(Question(str(llama), MIB, **fields))  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_base_that_would_not_be_served_has_no_plan(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(BaseError) as caught:
        make_plan(Question(str(tmp_path), MIB))
    assert caught.value.reason == "ROPE_TYPE"


def test_a_base_that_cannot_be_built_has_no_plan(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", hidden_act="swoosh")
    with pytest.raises(BaseError, match="swoosh") as caught:
        make_plan(Question(str(tmp_path), MIB))
    assert caught.value.reason == "MODEL_CONSTRUCTION"


def test_where_nothing_tells_the_dtype_it_must_be_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype=None)
    with pytest.raises(BaseError, match="names no dtype, and no weights lie beside it") as caught:
        make_plan(Question(str(tmp_path), MIB))
    assert (caught.value.reason, caught.value.field) == ("DTYPE", "dtype")
    named = make_plan(Question(str(tmp_path), MIB, dtype="bfloat16", device="cuda"))
    assert named == make_plan(Question(str(llama), MIB, dtype="bfloat16", device="cuda"))


def test_a_base_whose_linears_take_no_adapter_has_a_plan_without_ranks(tmp_path: Path) -> None:
    question = Question(str(build_checkpoint("gpt2", tmp_path)), 64 * MIB)
    plan = make_plan(question)
    assert plan.fits
    assert plan.ranks == ()
    assert "no Linear" in plan_lines(question, plan)[-2]


def test_bytes_read_like_bytes() -> None:
    assert [show_bytes(number) for number in (0, 1023, 1536, MIB, 5 * 2**30)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 GiB",
    ]  # fmt: skip
