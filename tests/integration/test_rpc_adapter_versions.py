"""AdapterService over the wire: versions that are in use, deleted, pinned and sent back."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from adapter_calls import answer, push, read_all, refused, served, under
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2
from paper_library import digest_of
from rpc_harness import Shell, eventually, serving
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Metadata = tuple[tuple[str, str], ...]


def delete(version: int = 1, wait: float | None = None, **fields: Any) -> pb.DeleteAdapterVersionRequest:
    request = pb.DeleteAdapterVersionRequest(name="mine", version=version, **fields)
    if wait is not None:
        request.timeout.FromMilliseconds(round(wait * 1000))
    return request


def test_a_version_is_deleted_once_nobody_holds_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            first = await push(shell, 1)
            pointed = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (pointed.code, pointed.reason) == (Code.FAILED_PRECONDITION, "VERSION_HAS_ALIAS")
            await push(shell, 2)
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "mine@1"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            held = await refused(shell.adapters.DeleteAdapterVersion(delete(wait=0.05)))
            assert (held.code, held.reason, held.field) == (Code.DEADLINE_EXCEEDED, "VERSION_HELD", "timeout")
            deleting = asyncio.ensure_future(answer(shell.adapters.DeleteAdapterVersion(delete(request_id="d"))))
            await eventually(lambda: shell.library.holds.is_deleting(("local", "mine", 1)))
            assert (await refused(shell.inference.Generate(under("mine@1")))).reason == "ADAPTER_NOT_FOUND"
            listed = await shell.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name="mine"))
            assert [one.state for one in listed.versions] == [pb.ADAPTER_STATE_READY, pb.ADAPTER_STATE_DELETING]
            named = await refused(shell.adapters.SetAlias(pb.SetAliasRequest(name="mine", alias="old", version=1)))
            assert (named.code, named.reason) == (Code.FAILED_PRECONDITION, "VERSION_NOT_READY")
            twice = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (twice.code, twice.reason) == (Code.ABORTED, "VERSION_BEING_DELETED")
            assert not deleting.done()
            shell.engine.may_step.set()
            assert await running == ("mine", 1)
            assert (await deleting).freed_bytes == first.size_bytes
            again = await shell.adapters.DeleteAdapterVersion(delete(request_id="d"))
            assert again.freed_bytes == first.size_bytes
            gone = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (gone.code, gone.reason) == (Code.NOT_FOUND, "VERSION_NOT_FOUND")
            assert (await push(shell, 3)).version == 3

    asyncio.run(scenario())


def test_a_forced_deletion_ends_the_requests_that_hold_the_version_and_no_others() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_step.clear()
            old, new = (asyncio.ensure_future(answer(shell.inference.Generate(under(f"mine@{v}")))) for v in (1, 2))
            await eventually(lambda: len(shell.engine.submitted) == 2)
            deleting = asyncio.ensure_future(answer(shell.adapters.DeleteAdapterVersion(delete(wait=0.05, force=True))))
            await asyncio.sleep(0.1)
            shell.engine.may_step.set()
            refusal = await refused(old)
            assert (refusal.code, refusal.reason, refusal.field) == (Code.ABORTED, "ADAPTER_DELETED", "adapters")
            await deleting
            assert [one.version for one in (await new).served_by.adapters] == [2]

    asyncio.run(scenario())


def test_no_alias_comes_to_point_at_a_version_that_is_going() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "mine@1"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            deleting = asyncio.ensure_future(answer(shell.adapters.DeleteAdapterVersion(delete())))
            await eventually(lambda: shell.library.holds.is_deleting(("local", "mine", 1)))
            rollback = shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name="mine", alias="default"))
            refusal = await refused(rollback)
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "VERSION_NOT_READY")
            shell.engine.may_step.set()
            await running
            await deleting
            assert await served(shell, "mine") == ("mine", 2)

    asyncio.run(scenario())


def test_a_forced_deletion_waits_for_no_reader_that_stopped_reading() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            stream = whole(paper_files(12 << 20, seed=1), size_bytes=1 << 20)
            await shell.adapters.UploadAdapter(iter(stream))
            await push(shell, 2)
            download = shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine@1"))
            await download.read()
            await eventually(lambda: bool(shell.library.holds.bundles()))
            async with asyncio.timeout(5):
                await shell.adapters.DeleteAdapterVersion(delete(wait=0, force=True))
            refusal = await refused(read_all(download))
            assert (refusal.code, refusal.reason) == (Code.ABORTED, "ADAPTER_DELETED")

    asyncio.run(scenario())


def test_a_forced_deletion_ends_a_pin_that_waits() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_keep.clear()
            pinning = asyncio.ensure_future(answer(shell.adapters.PinAdapter(pb.PinAdapterRequest(name="mine@1"))))
            await eventually(lambda: bool(shell.library.holds.bundles()))
            async with asyncio.timeout(5):
                await shell.adapters.DeleteAdapterVersion(delete(wait=0, force=True))
            refusal = await refused(pinning)
            assert (refusal.code, refusal.reason) == (Code.ABORTED, "ADAPTER_DELETED")
            assert shell.engine.kept == []

    asyncio.run(scenario())


def test_a_reader_that_leaves_in_mid_download_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            stream = whole(paper_files(12 << 20, seed=1), size_bytes=1 << 20)
            await shell.adapters.UploadAdapter(iter(stream))
            for _ in range(5):
                download = shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine"))
                await download.read()
                download.cancel()
            await eventually(lambda: not shell.library.holds.bundles())
            method = "/motley.v1.AdapterService/DownloadAdapter"
            assert shell.count("motley_grpc_server_handled_total", method=method, code="INTERNAL") == 0

    with caplog.at_level("ERROR"):
        asyncio.run(scenario())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("seconds", [-1, 86401])
def test_nobody_waits_for_less_than_nothing_or_for_ever(seconds: int) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = pb.DeleteAdapterVersionRequest(name="zeta", version=1, timeout=Duration(seconds=seconds))
            refusal = await refused(shell.adapters.DeleteAdapterVersion(request))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "timeout")

    asyncio.run(scenario())


def test_a_download_is_the_upload_byte_for_byte_and_goes_on_by_offset() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            files = paper_files(seed=1)
            whole_files, version = await downloaded(shell, {})
            assert (whole_files, version.version) == (files, 1)
            offsets = {"adapter_config.json": 4, "adapter_model.safetensors": 1000}
            rest, _ = await downloaded(shell, offsets)
            assert rest == {name: data[offsets[name] :] for name, data in files.items()}
            for wrong, code, reason in (
                ({"adapter_config.json": 5}, Code.OUT_OF_RANGE, "PAST_END"),
                ({"adapter_config.json": -1}, Code.OUT_OF_RANGE, "PAST_END"),
                ({"../key": 0}, Code.INVALID_ARGUMENT, "FILE_NOT_IN_ADAPTER"),
            ):
                request = pb.DownloadAdapterRequest(name="mine", offsets=wrong)
                refusal = await refused(shell.adapters.DownloadAdapter(request).read())
                assert (refusal.code, refusal.reason) == (code, reason)
            assert shell.library.holds.bundles() == set()
            refusal = await refused(shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="zeta")).read())
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_FILES_MISSING")

    asyncio.run(scenario())


async def downloaded(shell: Shell, offsets: dict[str, int]) -> tuple[dict[str, bytes], pb.AdapterVersion]:
    files: dict[str, bytes] = {}
    version = pb.AdapterVersion()
    async for message in shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine", offsets=offsets)):
        match message.WhichOneof("payload"):
            case "version":
                version = message.version
            case "file":
                files[message.file.name] = b""
            case "chunk":
                assert message.chunk.offset == offsets.get(message.chunk.file, 0) + len(files[message.chunk.file])
                files[message.chunk.file] += message.chunk.data
    return files, version


def test_a_pin_holds_until_it_is_undone_or_its_version_deleted() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            pinned = (await shell.adapters.PinAdapter(pb.PinAdapterRequest(name="zeta@1"))).version
            assert (pinned.version, pinned.pinned) == (1, True)
            assert pinned.residency == pb.ADAPTER_RESIDENCY_DEVICE
            assert shell.engine.kept == [digest_of("1")]
            unpinned = (await shell.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="zeta@1"))).version
            assert (unpinned.pinned, shell.engine.kept) == (False, [])
            for name in ("alpha", "twin"):  # one digest
                await shell.adapters.PinAdapter(pb.PinAdapterRequest(name=name))
            await shell.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="alpha"))
            assert shell.engine.kept == [digest_of("9")]
            await shell.adapters.SetAlias(pb.SetAliasRequest(name="twin", alias="default", version=0))
            await shell.adapters.DeleteAdapterVersion(pb.DeleteAdapterVersionRequest(name="twin", version=1))
            assert shell.engine.kept == []

    asyncio.run(scenario())
