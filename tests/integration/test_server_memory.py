"""What the server says that it takes, against what it allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import make_harness
from held_bytes import held_bytes
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import load_base, read_parsed_config
from motley_server.config import EngineConfig
from motley_server.memory import ledger_line, ledger_of
from peft_adapters import make_adapter
from pruned_bases import prune_checkpoint, random_keeps

CPU = torch.device("cpu")
MIB = 2**20
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    whole = build_checkpoint("llama", root / "whole", **SIZES, dtype=torch.bfloat16)
    return {"whole": whole, "pruned": prune_checkpoint(whole, root / "pruned", random_keeps(6, 4, 768))}


@pytest.mark.parametrize(
    ("name", "quantize"),
    [("whole", "none"), ("whole", "nf4"), ("whole", "int8"), ("pruned", "none"), ("pruned", "nf4"), ("pruned", "int8")],
)
def test_the_ledger_is_what_the_server_allocates(checkpoints: dict[str, Path], name: str, quantize: str) -> None:
    base = load_base(checkpoints[name], dtype="auto", device=CPU, quantize=quantize)
    ledger = ledger_of(base)
    assert ledger == make_ledger(read_parsed_config(checkpoints[name]), Weights(torch.bfloat16, quantize, CPU))
    assert ledger.weight_bytes == pytest.approx(held_bytes(base.model), rel=0.02)
    path = make_adapter(checkpoints[name], checkpoints[name].parent / f"{name}-lora", seed=1, r=5)
    harness = make_harness(checkpoints[name], {"a": path}, base=base, kv_cache_bytes=MIB, block_size=8)
    answers = harness.run([harness.request("1", [5, 6, 7], "a")])
    assert answers["1"].error is None
    assert harness.core.residency.arena.num_used_bytes == ledger.adapter_bytes(5)
    blocks = harness.core.pool.num_blocks
    assert blocks * 8 == ledger.kv_tokens(MIB, 8)
    assert harness.core.runner.bytes_per_block == 8 * ledger.kv_bytes_per_token


def test_the_line_says_the_ledger(checkpoints: dict[str, Path]) -> None:
    ledger = make_ledger(read_parsed_config(checkpoints["pruned"]), Weights(torch.bfloat16, "nf4", CPU))
    line = ledger_line(ledger, EngineConfig(kv_cache_bytes=3 * MIB, adapter_arena_bytes=20 * MIB, block_size=16))
    assert f"weights {ledger.weight_bytes / MIB:.1f} MiB;" in line
    assert f"KV cache 3.0 MiB, {ledger.kv_tokens(3 * MIB, 16)} tokens at {ledger.kv_bytes_per_token} bytes;" in line
    assert f"20.0 MiB, as many as {20 * MIB // ledger.adapter_bytes(8)} of rank 8, " in line
