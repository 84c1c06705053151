"""UploadAdapter over the wire: what is refused, by which field, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from adapter_calls import committed, key_of, refused, staged, upload
from motley.v1 import adapter_pb2
from motley_server.registry.records import Quota
from rpc_harness import serving
from upload_streams import FINISH, chunk_of, chunks_of, header_of, paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Request = adapter_pb2.UploadAdapterRequest
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


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
        [with_files(*[(CONFIG, 1, SHA)] * 6)], Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "header.files",
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
