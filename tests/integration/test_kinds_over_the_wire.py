"""Every kind behind the whole server: what it lists, what served an answer, and which channels a set shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path

import grpc
import pytest
from architectures import build_checkpoint
from kind_sets import KINDS, make_kinds
from motley.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from motley_server.app import build
from motley_server.config import resolve
from motley_server.rpc.convert_adapters import KINDS as KIND_WORDS
from rpc_harness import read_refusal, text_request
from safetensors.torch import load_file

NAMES = {kind.replace(" ", "-"): kind for kind in KINDS}  # as a request may write them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def paths(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = make_kinds(checkpoint, tmp_path_factory.mktemp("kinds"))
    return {name: made[kind] for name, kind in NAMES.items()}


@asynccontextmanager
async def running(checkpoint: Path, adapters: dict[str, Path], data_dir: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Serve a checkpoint and its adapters in this process."""
    given = {
        "base": str(checkpoint), "listen": "127.0.0.1:0", "metrics": "", "data_dir": str(data_dir), "dtype": "float32",
        "adapters": [f"{name}={path}" for name, path in adapters.items()],
    }  # fmt: skip
    app = await build(resolve({"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24)}, given))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            yield channel
    finally:
        await app.stop()


def under(*adapters: tuple[str, float]) -> inference_pb2.GenerateRequest:
    request = text_request("the quick brown", max_new_tokens=4)
    request.adapters.extend(common_pb2.AdapterRef(name=name, weight=weight) for name, weight in adapters)
    return request


def held_channels(directory: Path) -> set[tuple[str, int]]:
    """Read from an S2FT directory's own file which channels of which tensor it has."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {(name, int(channel)) for name in tensors if name.endswith(".s2_idx") for channel in tensors[name]}


def test_every_kind_serves_and_says_so_and_overlaps_are_counted(
    checkpoint: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    shared = len(held_channels(paths["s2ft-heads"]) & held_channels(paths["s2ft-heads-too"]))
    assert shared > 0
    overlaps = {"s2ft-heads": shared, "s2ft-heads-too": shared}

    async def scenario() -> None:
        async with running(checkpoint, paths, tmp_path) as channel:
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            info = await server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
            assert sorted(info.adapter_kinds) == ["goat", "lora", "loram", "s2ft"]
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            listed = await stub.ListAdapters(adapter_pb2.ListAdaptersRequest())
            kinds = {one.name: KIND_WORDS[one.latest.kind] for one in listed.adapters}
            assert kinds == {name: KINDS[NAMES[name]] for name in NAMES}
            alone = [under((name, 1.0)) for name in NAMES]
            all_eight = under(*[(name, 0.3 + 0.1 * place) for place, name in enumerate(NAMES)])
            asked = [text_request("the quick brown", max_new_tokens=4), *alone, all_eight]
            base, *ones, fused = await asyncio.gather(*(inference.Generate(one) for one in asked))
            assert len(base.served_by.adapters) == 0
            for name, answer in zip(NAMES, ones, strict=True):
                [served] = answer.served_by.adapters
                assert (served.name, served.kind, served.overlapping_channels) == (name, KINDS[NAMES[name]], 0)
            said = {one.name: (one.kind, one.overlapping_channels) for one in fused.served_by.adapters}
            assert said == {name: (KINDS[NAMES[name]], overlaps.get(name, 0)) for name in NAMES}
            digests = [one.digest for one in fused.served_by.adapters]
            assert digests == sorted(digests)
            assert len({tuple(one.candidates[0].token_ids) for one in (base, *ones, fused)}) > len(NAMES) // 2

    asyncio.run(scenario())


def test_a_set_s_order_on_the_wire_changes_no_bit_and_bad_sets_are_refused(
    checkpoint: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running(checkpoint, paths, tmp_path) as channel:
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            pairs = [("goat", 0.7), ("s2ft-outputs", -0.5), ("loram", 1.0), ("lora", 0.3)]
            answers = []
            for order in (pairs, pairs[::-1]):
                request = under(*order)
                request.sampling.logprobs = 0
                answers.append(await inference.Generate(request))
            assert answers[0].candidates == answers[1].candidates
            assert answers[0].served_by == answers[1].served_by
            digest = answers[0].served_by.adapters[0].digest
            again = f"{answers[0].served_by.adapters[0].name}@{digest}"
            twice = under((answers[0].served_by.adapters[0].name, 1.0), (again, -1.0))
            nine = under(*[(name, 1.0) for name, _ in zip([*NAMES, "lora"], range(9), strict=True)])
            bad = [(twice, "DUPLICATE_ADAPTER"), (nine, "TOO_MANY_ADAPTERS")]
            bad += [
                (under((name, weight)), "OUT_OF_RANGE")
                for name, weight in product(("goat", "s2ft-heads"), (float("nan"), float("-inf"), 1e30, 100.5))
            ]
            for request, reason in bad:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await inference.Generate(request)
                assert read_refusal(caught.value).reason == reason

    asyncio.run(scenario())
