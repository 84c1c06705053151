"""The whole server with keys and TLS: the first admin's key, what it opens, and what a start with bad files says."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_certificates
from motley.v1 import inference_pb2_grpc, server_pb2, server_pb2_grpc, tenant_pb2, tenant_pb2_grpc
from motley_server.app import StartError, build, prepare_process, run
from motley_server.config import resolve
from rpc_harness import text_request

SMALL = {"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24), "MOTLEY_METRICS": ""}


@pytest.fixture
def audit_level() -> Iterator[None]:
    """Leave the audit's logger as it was."""
    log = logging.getLogger("motley.audit")
    level = log.level
    yield
    log.setLevel(level)


async def until_ready(server: asyncio.Task[int], capsys: pytest.CaptureFixture[str]) -> str:
    out = ""
    while "ready on" not in out and not server.done():
        await asyncio.sleep(0.01)
        out += capsys.readouterr().out
    return out


@pytest.mark.usefixtures("audit_level")
def test_the_first_admins_key_is_shown_once_and_opens_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = make_certificates(tmp_path)
    flags = {
        "listen": "127.0.0.1:0", "data_dir": str(tmp_path / "data"), "auth": True, "tls.cert": str(made.server),
        "tls.key": str(made.server_key),
    }  # fmt: skip
    trusted = grpc.ssl_channel_credentials(made.authority.read_bytes())

    async def first_start() -> str:
        server = asyncio.create_task(run(resolve(SMALL, flags)))
        out = await until_ready(server, capsys)
        line, ready = out.strip().splitlines()
        [key] = re.findall(r"^the first admin's key, shown this once: (mk_\S+)$", line)
        admin = (("authorization", f"Bearer {key}"),)
        async with grpc.aio.secure_channel(ready.split()[-1], trusted) as channel:
            tenants = tenant_pb2_grpc.TenantServiceStub(channel)
            await tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id="acme"), metadata=admin)
            request = tenant_pb2.CreateKeyRequest(tenant_id="acme", role=tenant_pb2.ROLE_USER)
            user = (("authorization", f"Bearer {(await tenants.CreateKey(request, metadata=admin)).secret}"),)
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            answer = await inference.Generate(text_request("upper: cat =", max_new_tokens=6), metadata=user)
            assert answer.candidates[0].text.strip().startswith("CAT")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference.Generate(text_request("upper: cat ="))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await server_pb2_grpc.ServerServiceStub(channel).Drain(server_pb2.DrainRequest(), metadata=admin)
        assert await asyncio.wait_for(server, 20) == 0
        return key

    async def second_start(key: str) -> None:
        server = asyncio.create_task(run(resolve(SMALL, flags)))
        out = await until_ready(server, capsys)
        assert re.fullmatch(r"ready on \S+\n", out)
        async with grpc.aio.secure_channel(out.split()[-1], trusted) as channel:
            metadata = (("authorization", f"Bearer {key}"),)
            await server_pb2_grpc.ServerServiceStub(channel).Drain(server_pb2.DrainRequest(), metadata=metadata)
        assert await asyncio.wait_for(server, 20) == 0

    prepare_process({}, "error")
    key = asyncio.run(first_start())
    asyncio.run(second_start(key))
    lines = [json.loads(one.getMessage()) for one in caplog.records if one.name == "motley.audit"]
    methods = [line["method"].rpartition("/")[2] for line in lines]
    assert methods == ["first start", "CreateTenant", "CreateKey", "Drain", "Drain"]
    assert {line["key"] for line in lines[1:3]} == {lines[0]["object"]["key_id"]} == {key.split("_")[1]}
    assert key not in caplog.text
    assert key not in (tmp_path / "data" / "registry.sqlite3").read_bytes().decode(errors="ignore")


def test_what_protects_nobody_is_said_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from motley_server.tenancy import tell_exposure

    def said(**flags: Any) -> str:
        caplog.clear()
        tell_exposure(resolve({}, flags))
        return " | ".join(f"{one.levelname} {one.getMessage()}" for one in caplog.records)

    everywhere = {"listen": "0.0.0.0:1", "insecure": True}
    with caplog.at_level("INFO"):
        assert said().startswith("INFO a caller without a key is tenant 'local' with every role")
        assert said(auth=True) == "INFO every call needs a key, but for health checks"
        assert "WARNING insecure: anybody who reaches 0.0.0.0:1 is served" in said(**everywhere)
        assert "keys included, travels without encryption" in said(**everywhere, auth=True)
        assert "WARNING insecure: anybody" not in said(**everywhere, auth=True)


def test_a_start_without_its_files_or_registry_is_refused_by_name(tmp_path: Path) -> None:
    def start(**flags: Any) -> None:
        asyncio.run(build(resolve(SMALL, {"listen": "127.0.0.1:0", "data_dir": str(tmp_path)} | flags)))

    made = make_certificates(tmp_path)
    with pytest.raises(StartError, match=r"^tls.cert: /nowhere cannot be read"):
        start(**{"tls.cert": "/nowhere", "tls.key": str(made.server_key)})
    with closing(sqlite3.connect(tmp_path / "foreign.sqlite3")) as connection:
        connection.execute("create table theirs (id integer)")
        connection.commit()
    with pytest.raises(StartError, match=r"^NO_REGISTRY: database .*foreign.sqlite3"):
        start(database=f"sqlite:///{tmp_path}/foreign.sqlite3")
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"^data_dir: "):
        start(data_dir=str(tmp_path / "file" / "below"))
