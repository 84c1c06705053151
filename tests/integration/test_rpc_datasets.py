"""Datasets over the wire: taken in over cuts, restarts and repeats, whose they are, and gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from adapter_calls import key_of, refused
from motley.v1 import training_pb2
from rpc_harness import Shell, eventually, serving
from training_calls import (
    DATA,
    FINISH,
    Upload,
    at_work,
    chunks_of,
    digest_of,
    header_of,
    let_pass,
    samples,
    send,
    whole_dataset,
)

Code = grpc.StatusCode
pb = training_pb2
DIGEST = digest_of(DATA)


async def get(shell: Shell, digest: str = DIGEST, **options: Any) -> pb.GetDatasetResponse:
    return await shell.jobs.GetDataset(pb.GetDatasetRequest(digest=digest), **options)


async def delete(shell: Shell, digest: str = DIGEST, request_id: str = "", **options: Any) -> pb.DeleteDatasetResponse:
    return await shell.jobs.DeleteDataset(pb.DeleteDatasetRequest(digest=digest, request_id=request_id), **options)


def kept(folder: Path) -> list[Path]:
    """Return the files of datasets and of uploads that are not datasets."""
    return [path for path in (folder / "datasets").rglob("*.jsonl") if path.is_file()]


async def cut_after(
    shell: Shell, messages: list[Upload], arrived: Callable[[], Awaitable[bool]], **options: Any
) -> None:
    """Send messages, wait until they have arrived, and break the connection off."""
    gate = asyncio.Event()

    async def stream() -> AsyncIterator[Upload]:
        for message in messages:
            yield message
        await gate.wait()

    call = shell.jobs.UploadDataset(stream(), **options)
    async with asyncio.timeout(5):
        while not await arrived():
            await asyncio.sleep(0.01)
    call.cancel()
    await eventually(lambda: not shell.training.dataset_desk.active)


def has_arrived(shell: Shell, num_bytes: int, digest: str = DIGEST) -> Callable[[], Awaitable[bool]]:
    async def arrived() -> bool:
        return shell.count("motley_training_dataset_bytes_total") >= num_bytes

    return arrived


def test_a_dataset_is_told_for_what_it_is() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            made = await send(shell, whole_dataset(DATA, display_name="Sums"))
            assert (made.digest, made.display_name, made.size_bytes, made.num_samples) == (DIGEST, "Sums", len(DATA), 4)
            assert made.format == pb.DATASET_FORMAT_COMPLETION
            assert made.HasField("create_time")
            assert await get(shell) == pb.GetDatasetResponse(dataset=made, committed_bytes=len(DATA))
            text = b'{"text": "a"}\n{"text": "b"}'
            other = await send(shell, whole_dataset(text))
            assert (other.format, other.num_samples) == (pb.DATASET_FORMAT_TEXT, 2)
            listed = await shell.jobs.ListDatasets(pb.ListDatasetsRequest())
            assert [one.digest for one in listed.datasets] == [other.digest, made.digest]
            assert len(kept(shell.library.folder)) == 2

    asyncio.run(scenario())


def test_what_is_there_is_answered_from_its_header_and_stays_as_it_is() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            made = await send(shell, whole_dataset(DATA, display_name="Sums"))
            assert await send(shell, [header_of(DATA, display_name="Other")]) == made

    asyncio.run(scenario())


def test_a_cut_upload_goes_on_where_it_was_committed() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await cut_after(shell, [header_of(DATA), *chunks_of(DATA)[:2]], has_arrived(shell, 128))
            found = await get(shell)
            assert (found.HasField("dataset"), found.committed_bytes) == (False, 128)
            made = await send(shell, [header_of(DATA), *chunks_of(DATA, 128), FINISH])
            assert (made.digest, made.num_samples) == (DIGEST, 4)
            assert shell.count("motley_training_dataset_bytes_total") == len(DATA)

    asyncio.run(scenario())


def test_an_upload_goes_on_after_a_restart(tmp_path: Path) -> None:
    async def first() -> None:
        async with serving(folder=tmp_path) as shell:
            await cut_after(shell, [header_of(DATA), *chunks_of(DATA)[:2]], has_arrived(shell, 128))

    async def second() -> None:
        async with serving(folder=tmp_path) as shell:
            assert (await get(shell)).committed_bytes == 128
            made = await send(shell, [header_of(DATA), *chunks_of(DATA, 128), FINISH])
            assert made.num_samples == 4

    async def third() -> None:
        async with serving(folder=tmp_path) as shell:
            assert (await get(shell)).dataset.num_samples == 4
            assert (await send(shell, [header_of(DATA)])).num_samples == 4

    for part in (first, second, third):
        asyncio.run(part())


def test_several_streams_may_bring_one_dataset() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            data = samples(2000)
            together = await asyncio.gather(
                *(send(shell, whole_dataset(data)) for _ in range(4)), return_exceptions=True
            )
            made = [one for one in together if isinstance(one, pb.Dataset)]
            assert {(one.digest, one.num_samples) for one in made} == {(digest_of(data), 2000)}
            for late in (one for one in together if isinstance(one, grpc.aio.AioRpcError)):
                assert late.code() is Code.NOT_FOUND
            assert await send(shell, [header_of(data)]) == made[0]
            assert len(kept(shell.library.folder)) == 1

    asyncio.run(scenario())


ONE = b'{"text": "a"}\n'


def test_what_another_tenant_has_is_met_in_the_words_for_what_is_not_there() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            half = samples(seed=2)
            await send(shell, whole_dataset(DATA))
            await refused(send(shell, [header_of(half), *chunks_of(half)]))
            absent = digest_of(b"never seen")
            for call in (get, delete):
                met = [await refused(call(shell, one, metadata=theirs)) for one in (DIGEST, digest_of(half), absent)]
                assert {(one.code, one.reason, one.field, one.message) for one in met} == {
                    (Code.NOT_FOUND, "DATASET_NOT_FOUND", "digest", met[0].message)
                }
            assert not (await shell.jobs.ListDatasets(pb.ListDatasetsRequest(), metadata=theirs)).datasets
            assert (await get(shell)).dataset.num_samples == 4
            assert (await get(shell, digest_of(half))).committed_bytes == len(half)

    asyncio.run(scenario())


def test_knowing_a_digest_gives_nobody_the_bytes() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            await send(shell, whole_dataset(DATA))
            refusal = await refused(send(shell, [header_of(DATA), FINISH], metadata=theirs))
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE")
            assert (await send(shell, [header_of(DATA), *chunks_of(DATA), FINISH], metadata=theirs)).num_samples == 4
            assert len(kept(shell.library.folder)) == 1
            await delete(shell)
            await shell.training.keeper.collect()
            await shell.training.keeper.collect()
            assert len(kept(shell.library.folder)) == 1

    asyncio.run(scenario())


def test_a_deleted_dataset_is_gone_and_its_bytes_soon_after() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(DATA))
            await shell.training.keeper.collect()
            await shell.training.keeper.collect()
            assert len(kept(shell.library.folder)) == 1
            await delete(shell, request_id="once")
            await delete(shell, request_id="once")
            assert (await refused(delete(shell))).reason == "DATASET_NOT_FOUND"
            assert (await refused(get(shell))).reason == "DATASET_NOT_FOUND"
            await shell.training.keeper.collect()
            await shell.training.keeper.collect()
            assert kept(shell.library.folder) == []
            assert shell.count("motley_collected_bytes_total") == len(DATA)
            assert (await send(shell, whole_dataset(DATA))).num_samples == 4

    asyncio.run(scenario())


def test_a_dataset_stays_while_a_job_needs_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            refusal = await refused(delete(shell))
            assert (refusal.code, refusal.reason, refusal.field) == (
                Code.FAILED_PRECONDITION, "DATASET_IN_USE", "digest",
            )  # fmt: skip
            assert work.held.job.id in refusal.message
            await work.end(pb.JOB_STATE_FAILED, "LOSS_NOT_FINITE")
            await delete(shell)

    asyncio.run(scenario())


def test_an_upload_that_is_given_up_leaves_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await refused(send(shell, [header_of(DATA), *chunks_of(DATA)]))
            assert kept(shell.library.folder)
            await delete(shell)
            assert kept(shell.library.folder) == []
            assert (await refused(get(shell))).reason == "DATASET_NOT_FOUND"

    asyncio.run(scenario())


def test_a_stream_whose_dataset_is_deleted_brings_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            gate = asyncio.Event()

            async def slow() -> AsyncIterator[Upload]:
                yield header_of(DATA)
                yield chunks_of(DATA)[0]
                await gate.wait()
                for message in [*chunks_of(DATA, 64), FINISH]:
                    yield message

            call = shell.jobs.UploadDataset(slow())
            await eventually(lambda: shell.count("motley_training_dataset_bytes_total") >= 64)
            await delete(shell)
            gate.set()
            assert (await refused(call)).reason == "DATASET_NOT_FOUND"
            assert kept(shell.library.folder) == []

    asyncio.run(scenario())


def test_an_upload_that_nobody_goes_on_with_is_forgotten_after_a_day() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await refused(send(shell, [header_of(DATA), *chunks_of(DATA)]))
            let_pass(shell, 23 * 3600)
            await shell.training.keeper.collect()
            assert (await get(shell)).committed_bytes == len(DATA)
            let_pass(shell, 2 * 3600)
            await shell.training.keeper.collect()
            assert (await refused(get(shell))).reason == "DATASET_NOT_FOUND"
            await shell.training.keeper.collect()
            assert kept(shell.library.folder) == []

    asyncio.run(scenario())


def test_datasets_come_by_pages_the_newest_first() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            made = [(await send(shell, whole_dataset(samples(seed=seed)))).digest for seed in range(5)]
            found: list[str] = []
            token = ""
            while len(found) < 5:
                page = await shell.jobs.ListDatasets(pb.ListDatasetsRequest(page_size=2, page_token=token))
                found += [one.digest for one in page.datasets]
                token = page.next_page_token
            assert (found, token) == (made[::-1], "")
            refusal = await refused(shell.jobs.ListDatasets(pb.ListDatasetsRequest(page_token="x")))
            assert (refusal.reason, refusal.field) == ("BAD_PAGE_TOKEN", "page_token")

    asyncio.run(scenario())


def test_an_upload_is_one_line_in_the_audit(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(DATA))
            await refused(send(shell, whole_dataset(ONE)))
            await delete(shell)

    with caplog.at_level("INFO", "motley.audit"):
        asyncio.run(scenario())
    lines = [json.loads(one.message) for one in caplog.records if one.name == "motley.audit"]
    assert [(one["method"].rpartition("/")[2], one["code"], one["object"]) for one in lines] == [
        ("UploadDataset", "OK", {"digest": DIGEST}),
        ("UploadDataset", "INVALID_ARGUMENT", {"digest": digest_of(ONE)}),
        ("DeleteDataset", "OK", {"digest": DIGEST}),
    ]
