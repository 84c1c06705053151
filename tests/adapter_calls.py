"""Calls of AdapterService that several tests make."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from motley.v1 import adapter_pb2 as pb
from motley.v1 import inference_pb2, tenant_pb2
from rpc_harness import Refusal, Shell, read_refusal, text_request
from upload_streams import paper_files, whole

Metadata = tuple[tuple[str, str], ...]
Request = pb.UploadAdapterRequest


async def refused(call: Awaitable[object]) -> Refusal:
    """Return how a call was refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


async def key_of(shell: Shell, tenant_id: str, role: Any = tenant_pb2.ROLE_PUBLISHER) -> Metadata:
    """Make a tenant and a key of it, and return what shows the key."""
    await shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id=tenant_id))
    made = await shell.tenants.CreateKey(tenant_pb2.CreateKeyRequest(tenant_id=tenant_id, role=role))
    return (("authorization", f"Bearer {made.secret}"),)


async def push(shell: Shell, seed: int, name: str = "mine", **options: Any) -> pb.AdapterVersion:
    """Upload an adapter of its own for each seed."""
    stream = whole(paper_files(seed=seed), upload_id=f"{name}-{seed}", name=name)
    return (await shell.adapters.UploadAdapter(iter(stream), **options)).version


def under(name: str) -> inference_pb2.GenerateRequest:
    """Ask for an answer under an adapter."""
    request = text_request("hello", max_new_tokens=3)
    request.adapters.add(name=name)
    return request


async def served(shell: Shell, name: str, **options: Any) -> tuple[str, int]:
    """Return the name and version that an answer was served by."""
    (one,) = (await shell.inference.Generate(under(name), **options)).served_by.adapters
    return one.name, one.version


async def answer(call: Awaitable[Any]) -> Any:
    """Wait for a call, as a coroutine."""
    return await call


async def read_all(download: Any) -> None:
    """Read a stream of messages to its end."""
    while await download.read() is not grpc.aio.EOF:
        continue


async def upload(shell: Shell, messages: Iterable[Request], **options: Any) -> pb.AdapterVersion:
    """Send an upload, and return what it became."""
    return (await shell.adapters.UploadAdapter(iter(messages), **options)).version


async def committed(shell: Shell, upload_id: str = "up-1", **options: Any) -> dict[str, int]:
    """Return how many bytes of each file the server has for sure."""
    answer = await shell.adapters.GetUpload(pb.GetUploadRequest(upload_id=upload_id), **options)
    return dict(answer.committed_bytes)


def staged(shell: Shell) -> set[Path]:
    """Return the files and folders of uploads that are not versions."""
    root = shell.library.folder / "files"
    return {path for name in ("staging", "trash") for path in (root / name).rglob("*")}
