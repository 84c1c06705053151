"""A server over a quantized base: what it says of itself, how it starts, and what its caches are bound to."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from architectures import build_checkpoint
from engine_harness import make_harness
from motley.v1 import inference_pb2_grpc, server_pb2, server_pb2_grpc
from motley_bases.fingerprint import fingerprint
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import read_parsed_config
from motley_server.app import StartError, build
from motley_server.config import ServerConfig, resolve
from motley_server.engine import core
from pruned_bases import GROUPED_KEEPS, prune_checkpoint
from rpc_harness import text_request


def settings(tmp_path: Path, **flags: str) -> ServerConfig:
    environ = {"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**22), "MOTLEY_ENGINE_ADAPTER_ARENA_BYTES": str(2**22)}
    return resolve(environ, {"listen": "127.0.0.1:0", "metrics": "", "data_dir": str(tmp_path), **flags})


@pytest.mark.parametrize(("method", "pruned"), [("nf4", True), ("int8", False)])
def test_what_is_served_is_told_with_the_memory_that_a_plan_counts(
    tmp_path: Path, method: str, pruned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = original = build_checkpoint("llama", tmp_path / "base")
    if pruned:
        checkpoint = prune_checkpoint(original, tmp_path / "pruned", GROUPED_KEEPS)
    ledger = make_ledger(read_parsed_config(checkpoint), Weights(torch.float32, method))
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        app = await build(settings(tmp_path / "data", base=str(checkpoint), quantize=method))
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
                stub = server_pb2_grpc.ServerServiceStub(channel)
                info = await stub.GetServerInfo(server_pb2.GetServerInfoRequest())
                assert (info.quantization, info.dtype) == (method, "float32")
                assert info.pruned_from == (fingerprint(original) if pruned else "")
                capacity = await stub.GetCapacity(server_pb2.GetCapacityRequest(ranks=[5]))
                assert capacity.weight_bytes == ledger.weight_bytes
                assert capacity.kv_tokens_total == ledger.kv_tokens(2**22, 16)
                assert capacity.kv_bytes_per_token == ledger.kv_bytes_per_token
                (fit,) = capacity.adapter_fits
                assert (fit.bytes, fit.count) == (ledger.adapter_bytes(5), 2**22 // ledger.adapter_bytes(5))
                request = text_request("the quick", max_new_tokens=3)
                request.sampling.ignore_eos = True
                answer = await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
                assert len(answer.candidates[0].token_ids) == 3
                assert answer.served_by.base_fingerprint == info.base_fingerprint
            labels = {"quantization": method, "base_fingerprint": info.base_fingerprint}
            (shown,) = (family for family in app.metrics.registry.collect() if family.name == "motley_base")
            assert labels.items() <= shown.samples[0].labels.items()
        finally:
            await app.stop()

    asyncio.run(scenario())
    assert f"quantization {method}," in caplog.text


def test_a_start_that_asks_for_another_quantization_is_refused(tmp_path: Path) -> None:
    checkpoint = build_checkpoint("llama", tmp_path / "base")
    file = checkpoint / "config.json"
    stored = '"quantization_config": {"quant_method": "gptq"}'
    file.write_text(file.read_text().rstrip().removesuffix("}") + f", {stored}}}")
    with pytest.raises(StartError, match="QUANTIZED_CHECKPOINT"):
        asyncio.run(build(settings(tmp_path / "data", base=str(checkpoint), quantize="nf4")))


def test_caches_are_bound_to_the_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make_harness(build_checkpoint("llama", tmp_path))
    seeds: list[bytes] = []
    make_seed = core.cache_seed

    def note(*parts: object) -> bytes:
        seeds.append(make_seed(*parts))  # type: ignore[arg-type]
        return seeds[-1]

    monkeypatch.setattr(core, "cache_seed", note)
    for quantization in ("none", "nf4", "int8"):
        base = replace(harness.base, spec=replace(harness.base.spec, quantization=quantization))
        other = make_harness(tmp_path, base=base)
        assert other.core.add(other.request("one", [5, 6, 7]), time.monotonic()) is None
    assert len(set(seeds)) == len(seeds) == 3
