"""Who a caller is taken for: keys good and bad over the wire, what they open, and when they stop to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from motley.v1 import adapter_pb2, inference_pb2, server_pb2, tenant_pb2
from motley_server.asked import Role
from motley_server.registry.records import Quota
from rpc_harness import Refusal, Shell, read_refusal, serving, text_request

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...]


async def make_key(
    shell: Shell, role: Role = Role.USER, tenant_id: str = "acme", expires_at: datetime | None = None
) -> tuple[str, str]:
    """Make a key, and its tenant if need be; return its id and its text."""
    run, tenants = shell.registry.database.run, shell.registry.tenants
    if tenant_id not in {one.id for one in (await run(tenants.list)).items}:
        await run(tenants.create, tenant_id)
    key, text = await run(shell.registry.keys.create, tenant_id, role, expires_at)
    return key.id, text


def bearing(text: str) -> Metadata:
    return (("authorization", f"Bearer {text}"),)


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def info(shell: Shell, metadata: Metadata) -> Awaitable[server_pb2.GetServerInfoResponse]:
    return shell.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=metadata)


async def revoked(shell: Shell) -> Metadata:
    key_id, text = await make_key(shell)
    await shell.registry.database.run(shell.registry.keys.revoke, key_id)
    return bearing(text)


async def expired(shell: Shell) -> Metadata:
    _, text = await make_key(shell, expires_at=datetime.now(UTC) + timedelta(minutes=1))
    shell.library.clock.moved = timedelta(minutes=2)
    return bearing(text)


async def orphaned(shell: Shell) -> Metadata:
    _, text = await make_key(shell)
    await shell.registry.database.run(shell.registry.tenants.delete, "acme")
    return bearing(text)


async def with_another_secret(shell: Shell) -> Metadata:
    _, text = await make_key(shell)
    return bearing(text[:-1] + ("A" if text[-1] != "A" else "B"))


async def shown_twice(shell: Shell) -> Metadata:
    _, text = await make_key(shell)
    return bearing(text) * 2


async def as_basic(shell: Shell) -> Metadata:
    _, text = await make_key(shell)
    return (("authorization", f"Basic {text}"),)


async def with_more_behind(shell: Shell) -> Metadata:
    _, text = await make_key(shell)
    return bearing(f"{text} {text}")


async def of_nobody(shell: Shell) -> Metadata:
    return bearing("mk_0123456789abcdef_" + "x" * 43)


async def malformed(shell: Shell) -> Metadata:
    return bearing("mk_'; drop table keys; --")


async def empty(shell: Shell) -> Metadata:
    return (("authorization", ""),)


BAD = [revoked, expired, orphaned, with_another_secret, shown_twice, as_basic, with_more_behind, of_nobody, malformed]


@pytest.mark.parametrize("auth", [True, False])
@pytest.mark.parametrize("make", [*BAD, empty], ids=lambda value: value.__name__)
def test_a_bad_key_is_refused_with_one_text_whatever_is_wrong(
    make: Callable[[Shell], Awaitable[Metadata]], auth: bool
) -> None:
    async def scenario() -> None:
        async with serving(auth=auth) as shell:
            refusal = await refused(info(shell, await make(shell)))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.UNAUTHENTICATED, "INVALID_KEY", "")
            assert refusal.message == "the key is malformed, unknown, expired or revoked"
            assert set(refusal.details) == {"ErrorInfo", "RequestInfo"}

    asyncio.run(scenario())


def test_a_revoked_key_opens_nothing_from_the_next_call_on() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            _, admin = await make_key(shell, Role.ADMIN, "local")
            key_id, text = await make_key(shell)
            await info(shell, bearing(text))
            revoke = tenant_pb2.RevokeKeyRequest(key_id=key_id)
            answer = await shell.tenants.RevokeKey(revoke, metadata=bearing(admin))
            assert answer.key.HasField("revoke_time")
            assert (await refused(info(shell, bearing(text)))).reason == "INVALID_KEY"

    asyncio.run(scenario())


def test_the_scheme_is_read_in_any_case() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            _, text = await make_key(shell)
            await info(shell, (("authorization", f"bEARER  {text}"),))

    asyncio.run(scenario())


async def adapters_of(shell: Shell, metadata: Metadata) -> set[str]:
    listed = await shell.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=metadata)
    return {one.latest.name for one in listed.adapters}


def test_without_auth_a_key_still_says_who_calls() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            _, text = await make_key(shell, tenant_id="other")
            assert "zeta" in await adapters_of(shell, ())
            assert await adapters_of(shell, bearing(text)) == {"secret", "public/shared"}
            refusal = await refused(shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), metadata=bearing(text)))
            assert refusal.code is Code.PERMISSION_DENIED

    asyncio.run(scenario())


def under(name: str) -> inference_pb2.GenerateRequest:
    request = text_request("hello")
    request.adapters.add(name=name)
    return request


def test_a_tenant_uses_its_own_adapters_and_meets_others_as_missing() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            _, theirs = await make_key(shell, tenant_id="other")
            _, ours = await make_key(shell, tenant_id="local")
            answer = await shell.inference.Generate(under("secret"), metadata=bearing(theirs))
            assert [one.name for one in answer.served_by.adapters] == ["secret"]
            texts = []
            for name in ("other/secret", "other/absent"):
                refusal = await refused(shell.inference.Generate(under(name), metadata=bearing(ours)))
                assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
                texts.append(refusal.message.replace(name, "NAME"))
            assert texts[0] == texts[1]

    asyncio.run(scenario())


def test_a_quota_holds_from_the_call_after_it_was_set() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            _, admin = await make_key(shell, Role.ADMIN, "local")
            _, text = await make_key(shell)
            await shell.inference.Generate(text_request(), metadata=bearing(text))
            change = tenant_pb2.UpdateTenantRequest(id="acme", quota=tenant_pb2.Quota(requests_per_minute=1))
            await shell.tenants.UpdateTenant(change, metadata=bearing(admin))
            await shell.inference.Generate(text_request(), metadata=bearing(text))
            refusal = await refused(shell.inference.Generate(text_request(), metadata=bearing(text)))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_REQUESTS_PER_MINUTE")
            await shell.inference.Generate(text_request(), metadata=bearing(admin))

    asyncio.run(scenario())


def test_a_quota_changed_by_another_server_holds_after_a_moment() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            now = [0.0]
            quotas = type(shell.registry.quotas)(shell.registry.database, shell.registry.tenants, lambda: now[0])
            assert await quotas.of("local") == Quota()
            await shell.registry.database.run(shell.registry.tenants.update, "local", quota=Quota(adapters=3))
            now[0] = 0.99
            assert await quotas.of("local") == Quota()
            now[0] = 1.0
            assert await quotas.of("local") == Quota(adapters=3)

    asyncio.run(scenario())
