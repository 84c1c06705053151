"""The clients and `motley tenants` against the server itself, with keys and TLS: what one admin does, end to end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import make_certificates
from motley_client import (
    AbortedError,
    AlreadyExistsError,
    AsyncClient,
    DataLossError,
    NotFoundError,
    PermissionDeniedError,
    Quota,
    Role,
    UnauthenticatedError,
)
from motley_client.cli import app
from motley_server.asked import Role as ServerRole
from motley_server.tls import read_tls
from rpc_harness import serving
from typer.testing import CliRunner


class Served:
    """A server that demands keys and speaks TLS, and its first admin."""

    def __init__(self, address: str, ca_file: Path, admin_key: str) -> None:
        self.address = address
        self.ca_file = ca_file
        self.admin_key = admin_key

    def client(self, key: str | None) -> AsyncClient:
        return AsyncClient(self.address, key, timeout=10, ca_file=self.ca_file)

    async def motley(self, *arguments: str) -> str:
        """Run `motley tenants` as the admin, in a thread as the server has this loop; return what it prints."""
        trust = ["--server", self.address, "--ca-file", str(self.ca_file), "--key", self.admin_key]
        result = await asyncio.to_thread(CliRunner().invoke, app, ["tenants", *arguments, *trust])
        assert result.exit_code == 0, result.output
        return result.stdout


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    files = make_certificates(folder)
    async with serving(auth=True, tls=read_tls(files.server, files.server_key)) as shell:
        registry = shell.registry
        _, admin_key = await registry.database.run(registry.keys.create, "local", ServerRole.ADMIN)
        yield Served(f"127.0.0.1:{shell.port}", files.authority, admin_key)


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MOTLEY_SERVER", raising=False)
    monkeypatch.delenv("MOTLEY_KEY", raising=False)


def test_commands_administer_a_tenant_whose_key_works_until_it_is_revoked(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as server:
            await server.motley("create", "acme", "--display-name", "Acme", "--adapters", "5", "--weight", "2")
            await server.motley("update", "acme", "--requests-per-minute", "60")
            shown = json.loads(await server.motley("show", "acme", "--json"))
            assert (shown["display_name"], shown["quota"]["adapters"], shown["quota"]["weight"]) == ("Acme", 5, 2.0)
            assert (shown["quota"]["requests_per_minute"], shown["quota"]["tokens_per_minute"]) == (60, None)
            assert shown in json.loads(await server.motley("list", "--json"))["tenants"]

            secret = (await server.motley("keys", "create", "acme", "--expires", "30d")).strip()
            async with server.client(secret) as client:
                assert (await client.info()).base_model == "paper"
                with pytest.raises(PermissionDeniedError):
                    await client.get_tenant("acme")
                (key,) = json.loads(await server.motley("keys", "list", "acme", "--json"))["keys"]
                assert (key["role"], key["revoke_time"]) == ("user", None)
                await server.motley("keys", "revoke", key["id"])
                with pytest.raises(UnauthenticatedError):
                    await client.info()

            await server.motley("delete", "acme", "--yes")
            async with server.client(server.admin_key) as admin:
                with pytest.raises(NotFoundError):
                    await admin.get_tenant("acme")

    asyncio.run(run())


def test_a_caller_without_a_key_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as server, server.client(None) as client:
            with pytest.raises(UnauthenticatedError):
                await client.info()

    asyncio.run(run())


def test_what_the_client_promises_of_repeats_etags_and_pages_holds(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as server, server.client(server.admin_key) as admin:
            made = await admin.create_tenant("acme", quota=Quota(training_jobs=1), request_id="once")
            assert await admin.create_tenant("acme", quota=Quota(training_jobs=1), request_id="once") == made
            with pytest.raises(AlreadyExistsError):
                await admin.create_tenant("acme")

            await admin.update_tenant("acme", display_name="Acme", etag=made.etag)
            with pytest.raises(AbortedError):
                await admin.update_tenant("acme", display_name="Ace", etag=made.etag)

            expire_time = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
            new = await admin.create_key("acme", Role.WORKER, expire_time=expire_time, request_id="key")
            with pytest.raises(DataLossError, match=new.key.id):
                await admin.create_key("acme", Role.WORKER, expire_time=expire_time, request_id="key")
            others = {(await admin.create_key("acme", Role.PUBLISHER)).key.id for _ in range(4)}
            keys = [key async for key in admin.list_keys("acme", page_size=2)]
            assert {key.id for key in keys} == {new.key.id, *others}
            assert len(keys) == 5
            assert next(key for key in keys if key.id == new.key.id) == new.key
            assert new.key.expire_time == expire_time

    asyncio.run(run())
