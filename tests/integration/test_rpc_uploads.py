"""UploadAdapter over the wire: from the header to the version, over cuts and repeats, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from motley.v1 import adapter_pb2, tenant_pb2
from motley_server.registry.records import Quota
from rpc_harness import Refusal, Shell, eventually, read_refusal, serving
from upload_streams import FINISH, KIB, chunk_of, chunks_of, header_of, paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Request = adapter_pb2.UploadAdapterRequest
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


async def upload(shell: Shell, messages: Iterable[Request], **options: Any) -> adapter_pb2.AdapterVersion:
    return (await shell.adapters.UploadAdapter(iter(messages), **options)).version


async def committed(shell: Shell, upload_id: str = "up-1", **options: Any) -> dict[str, int]:
    answer = await shell.adapters.GetUpload(adapter_pb2.GetUploadRequest(upload_id=upload_id), **options)
    return dict(answer.committed_bytes)


async def key_of(shell: Shell, tenant_id: str, role: Any = tenant_pb2.ROLE_PUBLISHER) -> tuple[tuple[str, str], ...]:
    await shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id=tenant_id))
    made = await shell.tenants.CreateKey(tenant_pb2.CreateKeyRequest(tenant_id=tenant_id, role=role))
    return (("authorization", f"Bearer {made.secret}"),)


def staged(shell: Shell) -> set[Path]:
    """Return the files and folders of uploads that are not versions."""
    root = shell.library.folder / "files"
    return {path for name in ("staging", "trash") for path in (root / name).rglob("*")}


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


def with_files(*files: tuple[str, int, str]) -> Request:
    announced = [adapter_pb2.UploadFile(name=name, size_bytes=size, sha256=sha256) for name, size, sha256 in files]
    return Request(header=adapter_pb2.UploadHeader(upload_id="u", adapter_name="mine", files=announced))


FILES = paper_files()
CHUNKS = chunks_of(FILES)
SHA = "0" * 64
BAD_UPLOADS: dict[str, tuple[list[Request], grpc.StatusCode, str, str]] = {
    "nothing": ([], Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header"),
    "a chunk first": ([CHUNKS[0]], Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header"),
    "two headers": ([header_of(FILES), header_of(FILES)], Code.INVALID_ARGUMENT, "CHUNK_EXPECTED", "chunk"),
    "no finish": ([header_of(FILES), *CHUNKS], Code.INVALID_ARGUMENT, "UPLOAD_UNFINISHED", "finish"),
    "an empty message": ([header_of(FILES), Request()], Code.INVALID_ARGUMENT, "CHUNK_EXPECTED", "chunk"),
    "an id of slashes": (
        [header_of(FILES, upload_id="../../etc")], Code.INVALID_ARGUMENT, "INVALID_UPLOAD_ID", "header.upload_id",
    ),
    "no id": ([header_of(FILES, upload_id="")], Code.INVALID_ARGUMENT, "INVALID_UPLOAD_ID", "header.upload_id"),
    "a name of capitals": (
        [header_of(FILES, name="Mine")], Code.INVALID_ARGUMENT, "INVALID_ADAPTER_NAME", "header.adapter_name",
    ),
    "a name with a version": (
        [header_of(FILES, name="mine@3")], Code.INVALID_ARGUMENT, "INVALID_ADAPTER_NAME", "header.adapter_name",
    ),
    "another's name": (
        [header_of(FILES, name="other/secret")], Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "header.adapter_name",
    ),
    "a digit for an alias": (
        [*whole(FILES, aliases=["3"])], Code.INVALID_ARGUMENT, "INVALID_ALIAS", "header.aliases[0]",
    ),
    "a label of control characters": (
        [*whole(FILES, labels={"a": "b\x00"})], Code.INVALID_ARGUMENT, "INVALID_LABEL", "header.labels[a]",
    ),
    "too many files": (
        [with_files(*[(CONFIG, 1, SHA)] * 5)], Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "header.files",
    ),
    "no file": ([with_files()], Code.INVALID_ARGUMENT, "EMPTY_UPLOAD", "header.files"),
    "a path for a file": (
        [with_files(("../passwd", 1, SHA))], Code.INVALID_ARGUMENT, "FILE_NOT_ALLOWED", "header.files[0].name",
    ),
    "a pickle": (
        [with_files(("adapter_model.bin", 1, SHA))], Code.INVALID_ARGUMENT, "FILE_NOT_ALLOWED", "header.files[0].name",
    ),
    "one file twice": (
        [with_files((CONFIG, 1, SHA), (CONFIG, 1, SHA))], Code.INVALID_ARGUMENT, "DUPLICATE_FILE",
        "header.files[1].name",
    ),
    "a negative size": (
        [with_files((CONFIG, -1, SHA))], Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "header.files[0].size_bytes",
    ),
    "a config of megabytes": (
        [with_files((CONFIG, 2 << 20, SHA))], Code.INVALID_ARGUMENT, "FILE_TOO_LARGE", "header.files[0].size_bytes",
    ),
    "a checksum of capitals": (
        [with_files((CONFIG, 1, "A" * 64))], Code.INVALID_ARGUMENT, "INVALID_CHECKSUM", "header.files[0].sha256",
    ),
    "a file that was not announced": (
        [header_of(FILES), chunk_of("motley_manifest.json", 0, b"x")], Code.INVALID_ARGUMENT, "FILE_NOT_IN_UPLOAD",
        "chunk.file",
    ),
    "a gap": ([header_of(FILES), chunk_of(TENSORS, 7, b"x")], Code.OUT_OF_RANGE, "UPLOAD_OFFSET", "chunk.offset"),
    "a negative offset": (
        [header_of(FILES), chunk_of(TENSORS, -1, b"x")], Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "chunk.offset",
    ),
    "more than was announced": (
        [header_of(FILES), chunk_of(CONFIG, 0, b"loras")], Code.OUT_OF_RANGE, "UPLOAD_PAST_END", "chunk.offset",
    ),
    "other bytes the second time": (
        [header_of(FILES), chunk_of(CONFIG, 0, b"lor"), chunk_of(CONFIG, 0, b"lox")],
        Code.DATA_LOSS, "UPLOAD_BYTES_DIFFER", CONFIG,
    ),
    "a chunk of two megabytes": (
        [header_of(FILES), chunk_of(TENSORS, 0, b"x" * ((1 << 20) + 1))], Code.INVALID_ARGUMENT, "CHUNK_TOO_LARGE",
        "chunk.data",
    ),
    "the wrong bytes": (
        [header_of(FILES), *chunks_of(FILES | {CONFIG: b"s2ft"}), FINISH], Code.DATA_LOSS, "CHECKSUM_MISMATCH", CONFIG,
    ),
    "too few bytes": ([header_of(FILES), *CHUNKS[:-1], FINISH], Code.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE", TENSORS),
    "what is no adapter": (
        [*whole(FILES | {CONFIG: b"none"})], Code.INVALID_ARGUMENT, "BAD_JSON", CONFIG,
    ),
    "another kind than it says": (
        [*whole(FILES, kind=adapter_pb2.ADAPTER_KIND_GOAT)], Code.INVALID_ARGUMENT, "KIND_MISMATCH", "header.kind",
    ),
    "an unknown kind": (
        [*whole(FILES, kind=77)], Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "header.kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_field_and_makes_no_version(name: str) -> None:
    messages, code, reason, field = BAD_UPLOADS[name]

    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(upload(shell, messages))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            assert shell.library.registry.adapters.newest("local", "mine") is None
            assert shell.library.registry.store.bundles() == set()

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["the wrong bytes", "what is no adapter", "another kind than it says"])
def test_what_is_refused_for_what_it_is_leaves_nothing_behind(name: str) -> None:
    messages, _, _, _ = BAD_UPLOADS[name]

    async def scenario() -> None:
        async with serving() as shell:
            await refused(upload(shell, messages))
            assert staged(shell) == set()
            assert (await refused(committed(shell))).reason == "UPLOAD_NOT_FOUND"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("quota", "reason"),
    [(Quota(adapters=0), "QUOTA_ADAPTERS"), (Quota(adapter_bytes=3000), "QUOTA_ADAPTER_BYTES")],
)
def test_a_quota_is_checked_before_the_first_byte(quota: Quota, reason: str) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            key = await key_of(shell, "acme")
            await shell.registry.database.run(
                lambda: shell.registry.tenants.update("acme", quota=quota, quota_fields=["adapters", "adapter_bytes"])
            )
            shell.registry.quotas.forget("acme")
            refusal = await refused(upload(shell, [header_of(paper_files())], metadata=key))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, reason)
            assert "QuotaFailure" in refusal.details
            assert staged(shell) == set()

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
            await refused(upload(shell, whole(FILES | {CONFIG: b"none"}, upload_id="up-2")))
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
