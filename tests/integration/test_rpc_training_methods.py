"""GOAT and LoRAM over the wire: what their jobs name, what their leases open, and what becomes of their reports."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import pytest
from adapter_calls import key_of, read_all, refused
from motley.v1 import adapter_pb2, training_pb2
from rpc_harness import Shell, serving
from training_calls import (
    DATA,
    at_work,
    create,
    digest_of,
    get,
    hands_of,
    samples,
    send,
    spec_with,
    whole_dataset,
)
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = training_pb2
TEXT = b'{"text": "a"}\n{"text": "b"}\n'
CHAT = b'{"messages": [{"role": "assistant", "content": "a"}]}\n' * 2
OTHER = samples(seed=1)


def loram_with(dataset: bytes = DATA, align_with: bytes | None = None, **settings: Any) -> pb.TrainingSpec:
    """Return a spec of LoRAM that is right for the paper base but for what is said."""
    said = {} if "same_cut_as" in settings else {"layers": "0:1"}
    if align_with is not None:
        settings["alignment"] = pb.LoramAlignment(dataset=digest_of(align_with))
    loram = pb.LoramSettings(lora=pb.LoraSettings(rank=4), **said | settings)
    return spec_with(method=pb.TRAINING_METHOD_LORAM, dataset=digest_of(dataset), loram=loram)


def goat_spec() -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_GOAT, goat=pb.GoatSettings(experts=4))


async def push(shell: Shell, name: str, kind: str) -> adapter_pb2.AdapterVersion:
    stream = whole(paper_files(kind=kind), upload_id=name, name=name)
    return (await shell.adapters.UploadAdapter(iter(stream))).version


ALIGNMENT, CUT = "spec.loram.alignment.dataset", "spec.loram.same_cut_as"
REFUSED: dict[str, tuple[pb.TrainingSpec, grpc.StatusCode, str, str]] = {
    "alignment on answers": (loram_with(align_with=OTHER), Code.INVALID_ARGUMENT, "FORMAT_MISMATCH", ALIGNMENT),
    "alignment on conversations": (loram_with(align_with=CHAT), Code.INVALID_ARGUMENT, "FORMAT_MISMATCH", ALIGNMENT),
    "alignment on the answers that are trained on": (
        loram_with(align_with=DATA), Code.INVALID_ARGUMENT, "FORMAT_MISMATCH", ALIGNMENT,
    ),
    "alignment on what is not there": (
        loram_with(align_with=b"never seen"), Code.NOT_FOUND, "DATASET_NOT_FOUND", ALIGNMENT,
    ),
    "alignment on another tenant's text": (
        loram_with(align_with=TEXT * 2), Code.NOT_FOUND, "DATASET_NOT_FOUND", ALIGNMENT,
    ),
    "a cut that is not there": (loram_with(same_cut_as="nothing"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", CUT),
    "a cut of another tenant's": (loram_with(same_cut_as="other/secret"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", CUT),
    "a cut of a LoRA": (loram_with(same_cut_as="alpha"), Code.INVALID_ARGUMENT, "KIND_MISMATCH", CUT),
    "a cut of S2FT": (loram_with(same_cut_as="rows"), Code.INVALID_ARGUMENT, "KIND_MISMATCH", CUT),
    "a pruning without a name": (
        loram_with(pruning=99), Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "spec.loram.pruning",
    ),
    "more experts than ranks": (
        spec_with(method=pb.TRAINING_METHOD_GOAT, goat=pb.GoatSettings(experts=9)), Code.INVALID_ARGUMENT,
        "RANK_TOO_SMALL", "spec.goat.rank",
    ),
}  # fmt: skip


def test_a_job_that_cannot_be_done_is_refused_and_not_queued() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for data in (DATA, OTHER, CHAT, TEXT):
                await send(shell, whole_dataset(data))
            await send(shell, whole_dataset(TEXT * 2), metadata=await key_of(shell, "acme"))
            for name, (spec, code, reason, field) in REFUSED.items():
                refusal = await refused(create(shell, spec))
                assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field), name
            assert not (await shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest())).jobs
            both = await create(shell, loram_with(dataset=TEXT, align_with=TEXT))
            assert both.spec.loram.alignment.dataset == both.spec.dataset

    asyncio.run(scenario())


def test_a_lease_opens_the_text_to_align_on_and_the_adapter_whose_cut_is_taken() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            cut = await push(shell, "cut", "loram")
            await push(shell, "more", "loram")
            for data in (DATA, OTHER, TEXT):
                await send(shell, whole_dataset(data))
            asked = loram_with(align_with=TEXT, same_cut_as="cut@1")
            assert (await create(shell, asked)).spec == asked
            work = await hands_of(shell)
            assert await work.fetch(digest_of(TEXT)) == TEXT
            assert (await refused(work.fetch(digest_of(OTHER)))).reason == "DATASET_NOT_FOUND"
            request = adapter_pb2.DownloadAdapterRequest(name="cut@1")
            parts = [part async for part in shell.adapters.DownloadAdapter(request, metadata=work.token)]
            assert (parts[0].version.kind, parts[0].version.digest) == (adapter_pb2.ADAPTER_KIND_LORAM, cut.digest)
            for name in ("cut", "more"):
                request = adapter_pb2.DownloadAdapterRequest(name=name)
                refusal = await refused(read_all(shell.adapters.DownloadAdapter(request, metadata=work.token)))
                assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "OUTSIDE_LEASE")
            forget = pb.DeleteDatasetRequest(digest=digest_of(TEXT))
            assert (await refused(shell.jobs.DeleteDataset(forget))).reason == "DATASET_IN_USE"

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "spec"), [("goat", goat_spec()), ("loram", loram_with())], ids=["goat", "loram"])
def test_a_worker_publishes_either_kind_by_its_lease(kind: str, spec: pb.TrainingSpec) -> None:
    own = {"goat": "goat_residual.safetensors", "loram": "prune_manifest.json"}
    files = paper_files(kind=kind) | {own[kind]: b"shared" * 100}

    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, spec)
            stream = whole(files, upload_id=work.held.upload_id, name="trained")
            made = (await shell.adapters.UploadAdapter(iter(stream), metadata=work.token)).version
            assert adapter_pb2.AdapterKind.Name(made.kind) == f"ADAPTER_KIND_{kind.upper()}"
            await work.end(pb.JOB_STATE_SUCCEEDED)
            job = await get(shell, work.held.job.id)
            assert (job.state, job.version.digest, job.version.kind) == (pb.JOB_STATE_SUCCEEDED, made.digest, made.kind)
            assert shell.count("motley_training_jobs_ended_total", method=kind, state="succeeded") == 1
            download = shell.adapters.DownloadAdapter(adapter_pb2.DownloadAdapterRequest(name="trained"))
            kept: dict[str, bytes] = {}
            async for part in download:
                kept[part.chunk.file] = kept.get(part.chunk.file, b"") + part.chunk.data
            assert {name: kept.get(name) for name in files} == files

    asyncio.run(scenario())


def routing(*shares: float, path: str = "model.layers.0.mlp.down_proj") -> pb.JobEvent:
    return pb.JobEvent(routing=pb.RoutingReport(modules={path: pb.ExpertShares(shares=shares)}))


def test_where_tokens_went_comes_to_who_watches() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, goat_spec())
            told = [routing(0.5, 0.25, 0.2496, 0.0), pb.JobEvent(routing=pb.RoutingReport())]
            await work.report(*told)
            await work.end(pb.JOB_STATE_FAILED)
            request = pb.WatchTrainingJobRequest(id=work.held.job.id, after_sequence=2)
            seen = [answer.event async for answer in shell.jobs.WatchTrainingJob(request)]
            assert [one.WhichOneof("event") for one in seen] == ["routing", "routing", "state_change"]
            assert [one.routing for one in seen[:2]] == [one.routing for one in told]

    asyncio.run(scenario())


PATH = "model.layers.0.mlp.down_proj"
BAD_ROUTING: dict[str, tuple[pb.JobEvent, str]] = {
    "shares of more than all": (routing(0.6, 0.6), f"[{PATH}]"),
    "shares of less than all": (routing(0.5, 0.4), f"[{PATH}]"),
    "shares of nobody": (routing(), f"[{PATH}]"),
    "a negative share": (routing(1.5, -0.5), f"[{PATH}]"),
    "a share of NaN": (routing(math.nan, 1.0), f"[{PATH}]"),
    "experts without end": (routing(1.0, *[0.0] * 4096), f"[{PATH}]"),
    "a path of pages": (routing(1.0, path="a" * 201), ""),
    "a path of lines": (routing(1.0, path="a\nb"), ""),
    "modules without end": (
        pb.JobEvent(
            routing=pb.RoutingReport(modules={str(number): pb.ExpertShares(shares=[1.0]) for number in range(4097)})
        ),
        "",
    ),
}


def test_shares_that_are_none_are_refused_and_nothing_is_kept_of_them() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, goat_spec())
            for name, (event, where) in BAD_ROUTING.items():
                refusal = await refused(work.report(pb.JobEvent(stage="fine"), event))
                assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_EVENT"), name
                assert refusal.field == f"events[1].routing.modules{where}", name
            assert (await get(shell, work.held.job.id)).last_sequence == 2

    asyncio.run(scenario())
