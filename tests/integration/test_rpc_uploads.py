"""UploadAdapter over the wire: from the header to the version, over cuts and repeats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from adapter_calls import committed, key_of, refused, staged, upload
from motley.v1 import adapter_pb2, tenant_pb2
from rpc_harness import Shell, eventually, read_refusal, serving
from upload_streams import FINISH, KIB, chunks_of, header_of, paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Request = adapter_pb2.UploadAdapterRequest
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


async def cut_after(
    shell: Shell, messages: list[Request], arrived: Callable[[], Awaitable[bool]], **options: Any
) -> None:
    """Send messages, wait until they have arrived, and break the connection off."""
    gate = asyncio.Event()

    async def stream() -> AsyncIterator[Request]:
        for message in messages:
            yield message
        await gate.wait()

    call = shell.adapters.UploadAdapter(stream(), **options)
    async with asyncio.timeout(5):
        while not await arrived():
            await asyncio.sleep(0.01)
    call.cancel()
    await eventually(lambda: not shell.library.desk.active)


def test_an_upload_becomes_the_next_version_of_its_name_and_is_served() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            first = await upload(shell, whole(files, labels={"team": "search"}))
            assert (first.name, first.version, first.kind) == ("mine", 1, adapter_pb2.ADAPTER_KIND_LORA)
            assert first.state == adapter_pb2.ADAPTER_STATE_READY
            assert first.size_bytes == sum(map(len, files.values()))
            assert dict(first.labels) == {"team": "search"}
            second = await upload(shell, whole(paper_files(seed=1), upload_id="up-2"))
            assert (second.version, second.digest != first.digest) == (2, True)
            got = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="mine"))
            assert got.version == second
            assert [(one.name, one.version, one.previous_version) for one in got.adapter.aliases] == [("default", 2, 1)]
            bundle = shell.library.registry.adapters.newest("local", "mine")
            assert bundle is not None
            stored = shell.library.registry.store.directory(bundle.bundle)
            assert {path.name: path.read_bytes() for path in stored.iterdir()} == paper_files(seed=1)
            assert staged(shell) == set()

    asyncio.run(scenario())


def test_aliases_that_are_named_move_and_the_default_one_stays() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await upload(shell, whole(paper_files()))
            await upload(shell, whole(paper_files(seed=1), upload_id="b", aliases=["canary", "next"]))
            got = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="mine"))
            pointed = {one.name: one.version for one in got.adapter.aliases}
            assert (pointed, got.version.version) == ({"default": 1, "canary": 2, "next": 2}, 1)

    asyncio.run(scenario())


def test_a_cut_upload_goes_on_where_it_was_committed() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files(10 * KIB)
            chunks = chunks_of(files)

            async def has_six() -> bool:
                try:
                    return (await committed(shell))[TENSORS] == 6 * KIB
                except grpc.aio.AioRpcError:
                    return False

            await cut_after(shell, [header_of(files), *chunks[:7]], has_six)
            offsets = await committed(shell)
            assert offsets == {CONFIG: 4, TENSORS: 6 * KIB}
            rest = chunks_of(files, offsets)
            assert len(rest) == 4
            assert shell.count("motley_upload_bytes_total") == 4 + 6 * KIB
            version = await upload(shell, [header_of(files), *rest, FINISH])
            assert version.version == 1
            assert (await refused(committed(shell))).reason == "UPLOAD_NOT_FOUND"

    asyncio.run(scenario())


def test_a_finished_upload_is_answered_from_its_header_alone() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            made = await upload(shell, whole(files))
            assert await upload(shell, [header_of(files)]) == made
            refusal = await refused(upload(shell, whole(paper_files(seed=1))))
            assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
            again = await upload(shell, [header_of(files, upload_id="other", aliases=["prod"])])
            assert again.version == made.version
            got = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="mine@prod"))
            assert got.version == made
            relabelled = await upload(shell, whole(files, upload_id="labels", labels={"a": "b"}))
            assert (relabelled.version, relabelled.digest) == (2, made.digest)

    asyncio.run(scenario())


def test_knowing_the_checksums_of_anothers_adapter_gives_nobody_its_bytes() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            await upload(shell, whole(files))
            theirs = await key_of(shell, "acme")
            refusal = await refused(upload(shell, [header_of(files), FINISH], metadata=theirs))
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE")
            assert await committed(shell, metadata=theirs) == {CONFIG: 0, TENSORS: 0}

    asyncio.run(scenario())


def test_an_upload_id_means_something_to_its_tenant_alone() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            ours, files = paper_files(), paper_files(seed=5)
            await refused(upload(shell, [header_of(ours), chunks_of(ours)[0]]))
            for call in (
                committed(shell, metadata=theirs),
                shell.adapters.AbortUpload(adapter_pb2.AbortUploadRequest(upload_id="up-1"), metadata=theirs),
            ):
                assert (await refused(call)).reason == "UPLOAD_NOT_FOUND"
            assert (await upload(shell, whole(files), metadata=theirs)).version == 1
            assert await committed(shell) == {CONFIG: 4, TENSORS: 0}

    asyncio.run(scenario())


def test_several_streams_may_bring_one_upload_and_all_are_answered_with_what_it_became() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files, gate = paper_files(), asyncio.Event()
            chunks = chunks_of(files)

            async def slow() -> AsyncIterator[Request]:
                yield header_of(files)
                yield chunks[0]
                await gate.wait()
                for chunk in chunks[1:]:
                    yield chunk
                yield FINISH

            call = shell.adapters.UploadAdapter(slow())
            await eventually(lambda: bool(shell.library.desk.active))
            together = await asyncio.gather(*(upload(shell, whole(files)) for _ in range(3)), return_exceptions=True)
            made = [one for one in together if isinstance(one, pb.AdapterVersion)]
            late = [read_refusal(one) for one in together if isinstance(one, grpc.aio.AioRpcError)]
            assert made
            assert {one.version for one in made} == {1}
            gate.set()
            late.append(await refused(call))
            assert {(one.code, one.reason) for one in late} == {(Code.NOT_FOUND, "UPLOAD_NOT_FOUND")}
            assert await upload(shell, [header_of(files)]) == made[0]

    asyncio.run(scenario())


def test_an_upload_is_one_header_and_another_under_its_id_is_refused() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            await refused(upload(shell, [header_of(files), chunks_of(files)[0]]))
            for other in (
                header_of(files, name="other"),
                header_of(files, labels={"a": "b"}),
                header_of(files, aliases=["prod"]),
                header_of(paper_files(seed=3)),
            ):
                refusal = await refused(upload(shell, [other, *chunks_of(files), FINISH]))
                assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "UPLOAD_EXISTS")
            assert (await upload(shell, whole(files))).name == "mine"

    asyncio.run(scenario())


def test_a_push_after_the_version_was_backed_out_of_makes_a_new_one() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await upload(shell, whole(paper_files(), upload_id="a"))
            await upload(shell, whole(paper_files(seed=1), upload_id="b"))
            await shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name="mine", alias="default"))
            await shell.adapters.DeleteAdapterVersion(pb.DeleteAdapterVersionRequest(name="mine", version=2))
            again = await upload(shell, whole(paper_files(seed=1), upload_id="b"))
            got = await shell.adapters.GetAdapter(pb.GetAdapterRequest(name="mine"))
            assert (again.version, got.version.version) == (3, 3)

    asyncio.run(scenario())


def test_a_tenant_that_is_made_again_under_its_old_name_begins_anew() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            key = await key_of(shell, "acme")
            await upload(shell, whole(files), metadata=key)
            remove = pb.SetAliasRequest(name="mine", alias="default", version=0)
            await shell.adapters.SetAlias(remove, metadata=key)
            delete = pb.DeleteAdapterVersionRequest(name="mine", version=1)
            await shell.adapters.DeleteAdapterVersion(delete, metadata=key)
            await shell.tenants.DeleteTenant(tenant_pb2.DeleteTenantRequest(id="acme"))
            key = await key_of(shell, "acme")
            made = await upload(shell, whole(files, upload_id="anew"), metadata=key)
            assert (made.state, made.version) == (pb.ADAPTER_STATE_READY, 2)
            got = await shell.adapters.GetAdapter(pb.GetAdapterRequest(name="mine"), metadata=key)
            assert got.version == made

    asyncio.run(scenario())


def test_an_aborted_upload_leaves_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            files = paper_files()
            await refused(upload(shell, [header_of(files), *chunks_of(files)]))
            assert staged(shell)
            await shell.adapters.AbortUpload(adapter_pb2.AbortUploadRequest(upload_id="up-1"))
            assert staged(shell) == set()
            assert (await refused(committed(shell))).reason == "UPLOAD_NOT_FOUND"

    asyncio.run(scenario())


def test_an_admin_uploads_for_everybody_and_nobody_else_does() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            files = paper_files()
            refusal = await refused(upload(shell, whole(files, name="public/tool"), metadata=theirs))
            assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
            assert (await upload(shell, whole(files, name="public/tool"))).name == "public/tool"
            await shell.adapters.ShareAdapter(
                adapter_pb2.ShareAdapterRequest(name="public/tool", visibility=adapter_pb2.VISIBILITY_PUBLIC)
            )
            got = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="public/tool"), metadata=theirs)
            assert (got.version.name, got.version.created_by) == ("public/tool", "")

    asyncio.run(scenario())


def test_an_upload_is_one_line_in_the_audit_with_what_it_made(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> str:
        async with serving() as shell:
            made = await upload(shell, whole(paper_files()))
            await refused(upload(shell, whole(paper_files() | {CONFIG: b"none"}, upload_id="up-2")))
            return made.digest

    with caplog.at_level("INFO", "motley.audit"):
        digest = asyncio.run(scenario())
    lines = [json.loads(one.message) for one in caplog.records if one.name == "motley.audit"]
    assert [(one["method"], one["code"]) for one in lines] == [
        ("motley.v1.AdapterService/UploadAdapter", "OK"),
        ("motley.v1.AdapterService/UploadAdapter", "INVALID_ARGUMENT"),
    ]
    assert lines[0]["object"] == {"upload_id": "up-1", "adapter_name": "mine", "version": 1, "digest": digest}
    assert lines[1]["object"] == {"upload_id": "up-2", "adapter_name": "mine"}
