"""UploadDataset over the wire: what is refused, by which field or line, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from adapter_calls import key_of, refused
from motley.v1 import tenant_pb2, training_pb2
from rpc_harness import MAX_DATASET_BYTES, Shell, serving
from training_calls import (
    DATA,
    FINISH,
    Upload,
    chunk_of,
    chunks_of,
    create,
    digest_of,
    header_of,
    samples,
    send,
    whole_dataset,
)

Code = grpc.StatusCode
pb = training_pb2
DIGEST = digest_of(DATA)


async def get(shell: Shell, digest: str = DIGEST, **options: Any) -> pb.GetDatasetResponse:
    return await shell.jobs.GetDataset(pb.GetDatasetRequest(digest=digest), **options)


def kept(folder: Path) -> list[Path]:
    """Return the files of datasets and of uploads that are not datasets."""
    return [path for path in (folder / "datasets").rglob("*.jsonl") if path.is_file()]


LATIN = b'{"text": "a"}\n{"text": "caf\xe9"}\n'
ONE = b'{"text": "a"}\n'
BAD_UPLOADS: dict[str, tuple[list[Upload], grpc.StatusCode, str, str]] = {
    "nothing": ([], Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header"),
    "a chunk first": ([chunk_of(0, b"x")], Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header"),
    "two headers": ([header_of(DATA), header_of(DATA)], Code.INVALID_ARGUMENT, "CHUNK_EXPECTED", "chunk"),
    "an empty message": ([header_of(DATA), Upload()], Code.INVALID_ARGUMENT, "CHUNK_EXPECTED", "chunk"),
    "no finish": ([header_of(DATA), *chunks_of(DATA)], Code.INVALID_ARGUMENT, "UPLOAD_UNFINISHED", "finish"),
    "no digest": ([header_of(DATA, digest="")], Code.INVALID_ARGUMENT, "INVALID_DIGEST", "header.digest"),
    "a digest of capitals": (
        [header_of(DATA, digest="sha256:" + "A" * 64)], Code.INVALID_ARGUMENT, "INVALID_DIGEST", "header.digest",
    ),
    "an empty file": ([*whole_dataset(b"")], Code.INVALID_ARGUMENT, "EMPTY_DATASET", "header.size_bytes"),
    "less than nothing": (
        [header_of(DATA, size_bytes=-1)], Code.INVALID_ARGUMENT, "EMPTY_DATASET", "header.size_bytes",
    ),
    "more than is allowed": (
        [header_of(DATA, size_bytes=MAX_DATASET_BYTES + 1)], Code.INVALID_ARGUMENT, "DATASET_TOO_LARGE",
        "header.size_bytes",
    ),
    "a name of lines": (
        [header_of(DATA, display_name="a\nb")], Code.INVALID_ARGUMENT, "INVALID_DISPLAY_NAME", "header.display_name",
    ),
    "a gap": ([header_of(DATA), chunk_of(7, b"x")], Code.OUT_OF_RANGE, "UPLOAD_OFFSET", "chunk.offset"),
    "a negative offset": (
        [header_of(DATA), chunk_of(-1, b"x")], Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "chunk.offset",
    ),
    "more than was announced": (
        [header_of(DATA), chunk_of(0, DATA + b"x")], Code.OUT_OF_RANGE, "UPLOAD_PAST_END", "chunk.offset",
    ),
    "a chunk of two megabytes": (
        [header_of(DATA), chunk_of(0, b"x" * ((1 << 20) + 1))], Code.INVALID_ARGUMENT, "CHUNK_TOO_LARGE", "chunk.data",
    ),
    "other bytes the second time": (
        [header_of(DATA), chunk_of(0, DATA[:9]), chunk_of(0, b"x" * 9)], Code.DATA_LOSS, "UPLOAD_BYTES_DIFFER",
        "data.jsonl",
    ),
    "too few bytes": (
        [header_of(DATA), chunk_of(0, DATA[:-1]), FINISH], Code.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE", "data.jsonl",
    ),
    "the wrong bytes": (
        [header_of(DATA), chunk_of(0, bytes(len(DATA))), FINISH], Code.DATA_LOSS, "CHECKSUM_MISMATCH", "data.jsonl",
    ),
    "one line": (whole_dataset(ONE), Code.INVALID_ARGUMENT, "TOO_FEW_SAMPLES", "line 1"),
    "a line of Latin-1": (whole_dataset(LATIN), Code.INVALID_ARGUMENT, "LINE_NOT_UTF8", "line 2"),
    "a line that is no JSON": (whole_dataset(DATA + b"and\n"), Code.INVALID_ARGUMENT, "LINE_NOT_JSON", "line 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_field_and_makes_no_dataset(name: str) -> None:
    messages, code, reason, field = BAD_UPLOADS[name]

    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(send(shell, messages))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            assert not (await shell.jobs.ListDatasets(pb.ListDatasetsRequest())).datasets

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["the wrong bytes", "one line", "a line of Latin-1", "a line that is no JSON"])
def test_what_is_refused_for_what_it_is_leaves_nothing_behind(name: str) -> None:
    messages, _, _, _ = BAD_UPLOADS[name]

    async def scenario() -> None:
        async with serving() as shell:
            await refused(send(shell, messages))
            assert kept(shell.library.folder) == []
            refusal = await refused(get(shell, messages[0].header.digest))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "DATASET_NOT_FOUND", "digest")

    asyncio.run(scenario())


def test_a_refused_line_is_told_in_words_with_its_number() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(send(shell, whole_dataset(DATA + b'{"prompt": "a", "answer": "b"}\n')))
            assert refusal.message == (
                "line 5 has 'answer' and 'prompt', and a sample has prompt and completion, or messages, or text, and "
                "nothing else"
            )

    asyncio.run(scenario())


def test_a_tenant_has_so_many_uploads_open_and_no_more() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for seed in range(16):
                await refused(send(shell, [header_of(samples(seed=seed))]))
            refusal = await refused(send(shell, [header_of(samples(seed=16))]))
            assert (refusal.code, refusal.reason, refusal.field) == (
                Code.RESOURCE_EXHAUSTED, "TOO_MANY_UPLOADS", "header.digest",
            )  # fmt: skip
            theirs = await key_of(shell, "acme")
            assert (await send(shell, whole_dataset(DATA), metadata=theirs)).num_samples == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("role", [tenant_pb2.ROLE_USER, tenant_pb2.ROLE_WORKER])
def test_who_may_not_publish_may_not_train(role: Any) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            key = await key_of(shell, "acme", role)
            for call in (
                send(shell, whole_dataset(DATA), metadata=key), get(shell, metadata=key), create(shell, metadata=key),
            ):  # fmt: skip
                assert (await refused(call)).code is Code.PERMISSION_DENIED

    asyncio.run(scenario())
