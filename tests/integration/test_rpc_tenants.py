"""TenantService over the wire: tenants, quotas and keys as an admin sees them, and what the audit says of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from motley.v1 import adapter_pb2, adapter_pb2_grpc, server_pb2, tenant_pb2
from motley_server.asked import Role
from rpc_harness import Refusal, Shell, read_refusal, serving, text_request

Code = grpc.StatusCode
Quota = tenant_pb2.Quota


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def create(shell: Shell, id: str = "acme", **fields: Any) -> Awaitable[tenant_pb2.CreateTenantResponse]:
    return shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id=id, **fields))


def update(shell: Shell, id: str = "acme", **fields: Any) -> Awaitable[tenant_pb2.UpdateTenantResponse]:
    return shell.tenants.UpdateTenant(tenant_pb2.UpdateTenantRequest(id=id, **fields))


def create_key(shell: Shell, **fields: Any) -> Awaitable[tenant_pb2.CreateKeyResponse]:
    given: dict[str, Any] = {"tenant_id": "acme", "role": tenant_pb2.ROLE_USER} | fields
    return shell.tenants.CreateKey(tenant_pb2.CreateKeyRequest(**given))


def test_a_tenant_is_made_read_changed_listed_and_deleted() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            before = datetime.now(UTC)
            quota = Quota(adapters=0, tokens_per_minute=9000, weight=2.5)
            made = (await create(shell, display_name="Acme & Söhne", quota=quota)).tenant
            assert (made.id, made.display_name, made.quota) == ("acme", "Acme & Söhne", quota)
            age = made.create_time.ToDatetime(tzinfo=UTC) - before
            assert timedelta(0) <= age < timedelta(minutes=1)
            assert (await shell.tenants.GetTenant(tenant_pb2.GetTenantRequest(id="acme"))).tenant == made
            listed = await shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest())
            assert [one.id for one in listed.tenants] == ["acme", "local"]
            assert listed.tenants[0] == made
            assert listed.tenants[1].quota == Quota(weight=1)
            deleted = await shell.tenants.DeleteTenant(tenant_pb2.DeleteTenantRequest(id="acme"))
            assert deleted == tenant_pb2.DeleteTenantResponse()
            refusal = await refused(shell.tenants.GetTenant(tenant_pb2.GetTenantRequest(id="acme")))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "TENANT_NOT_FOUND", "id")
            resource: Any = refusal.details["ResourceInfo"]
            assert resource.resource_type == "tenant"

    asyncio.run(scenario())


def test_an_update_changes_what_is_set_and_only_what_was_seen() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            made = (await create(shell, display_name="before", quota=Quota(adapters=3, weight=2))).tenant
            changed = (await update(shell, quota=Quota(requests_in_flight=0), etag=made.etag)).tenant
            assert changed.quota == Quota(adapters=3, requests_in_flight=0, weight=2)
            assert (changed.display_name, changed.create_time) == ("before", made.create_time)
            refusal = await refused(update(shell, display_name="late", etag=made.etag))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.ABORTED, "ETAG_MISMATCH", "etag")
            assert (await refused(update(shell, display_name="empty", etag=""))).reason == "ETAG_MISMATCH"
            renamed = (await update(shell, display_name="")).tenant
            assert (renamed.display_name, renamed.quota) == ("", changed.quota)

    asyncio.run(scenario())


def test_a_limit_that_is_lifted_is_gone_and_the_others_stay() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await create(shell, quota=Quota(adapters=3, tokens_per_minute=0, training_jobs=1, weight=2))
            lifted = (await update(shell, lift=["tokens_per_minute", "weight"])).tenant
            assert lifted.quota == Quota(adapters=3, training_jobs=1, weight=1)
            both = (await update(shell, quota=Quota(adapters=0), lift=["training_jobs", "requests_in_flight"])).tenant
            assert both.quota == Quota(adapters=0, weight=1)
            assert (await shell.tenants.GetTenant(tenant_pb2.GetTenantRequest(id="acme"))).tenant == both

    asyncio.run(scenario())


def test_a_lifted_limit_stops_limiting_the_next_request() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await update(shell, "local", quota=Quota(requests_per_minute=0))
            assert (await refused(shell.inference.Generate(text_request("hi")))).reason == "QUOTA_REQUESTS_PER_MINUTE"
            await update(shell, "local", lift=["requests_per_minute"])
            assert (await shell.inference.Generate(text_request("hi"))).candidates

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "reason", "field", "word"),
    [
        ({"lift": ["adapters", "token"]}, "UNKNOWN_QUOTA", "lift[1]", "'token'"),
        ({"lift": ["quota.adapters"]}, "UNKNOWN_QUOTA", "lift[0]", "adapter_bytes"),
        ({"lift": ["adapters"], "quota": Quota(adapters=0)}, "SET_AND_LIFTED", "lift[0]", "'adapters'"),
        ({"lift": ["adapters"] * 8}, "OUT_OF_RANGE", "lift", "7"),
    ],
)
def test_a_bad_lift_is_refused_by_name_and_changes_nothing(
    fields: dict[str, Any], reason: str, field: str, word: str
) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            made = (await create(shell, quota=Quota(adapters=3))).tenant
            refusal = await refused(update(shell, display_name="new", **fields))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.INVALID_ARGUMENT, reason, field)
            assert word in refusal.message
            assert (await shell.tenants.GetTenant(tenant_pb2.GetTenantRequest(id="acme"))).tenant == made

    asyncio.run(scenario())


def test_a_secret_is_shown_once_and_never_listed() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await create(shell)
            first = await create_key(shell, role=tenant_pb2.ROLE_PUBLISHER, request_id="once")
            repeated = await create_key(shell, role=tenant_pb2.ROLE_PUBLISHER, request_id="once")
            assert first.secret.startswith(f"mk_{first.key.id}_")
            assert (repeated.key, repeated.secret) == (first.key, "")
            refusal = await refused(create_key(shell, request_id="once"))
            assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
            listed = await shell.tenants.ListKeys(tenant_pb2.ListKeysRequest(tenant_id="acme"))
            assert list(listed.keys) == [first.key]
            assert first.key.role == tenant_pb2.ROLE_PUBLISHER
            assert not first.key.HasField("expire_time")
            assert not first.key.HasField("revoke_time")
            assert first.secret.encode() not in listed.SerializeToString()

    asyncio.run(scenario())


def test_a_request_id_is_its_tenants_own() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            registry = shell.registry
            await registry.database.run(registry.tenants.create, "ops")
            _, text = await registry.database.run(registry.keys.create, "ops", Role.ADMIN)
            await create(shell, "one", request_id="same")
            request = tenant_pb2.CreateTenantRequest(id="two", request_id="same")
            made = await shell.tenants.CreateTenant(request, metadata=(("authorization", f"Bearer {text}"),))
            assert made.tenant.id == "two"

    asyncio.run(scenario())


def test_pages_hold_every_tenant_once() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for index in range(5):
                await create(shell, f"t{index}")
            found, token, num_pages = [], "", 0
            while num_pages == 0 or token:
                page = await shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest(page_size=2, page_token=token))
                found.extend(one.id for one in page.tenants)
                token, num_pages = page.next_page_token, num_pages + 1
            assert (found, num_pages) == (["local", "t0", "t1", "t2", "t3", "t4"], 3)

    asyncio.run(scenario())


def test_an_expiry_comes_back_as_it_was_set() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await create(shell)
            expiry = Timestamp(seconds=4102444800, nanos=123456000)
            assert (await create_key(shell, expire_time=expiry)).key.expire_time == expiry

    asyncio.run(scenario())


BAD: dict[str, tuple[Callable[[Shell], Awaitable[object]], Code, str, str]] = {
    "an id twice": (lambda shell: create(shell, "local"), Code.ALREADY_EXISTS, "TENANT_EXISTS", "id"),
    "an id with a slash": (lambda shell: create(shell, "a/b"), Code.INVALID_ARGUMENT, "INVALID_TENANT_ID", "id"),
    "a name with a control character": (
        lambda shell: create(shell, display_name="a\x1b[2J"), Code.INVALID_ARGUMENT, "INVALID_DISPLAY_NAME",
        "display_name",
    ),
    "a negative quota": (
        lambda shell: create(shell, quota=Quota(adapters=-1)), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "quota.adapters",
    ),
    "a weight that is no number": (
        lambda shell: create(shell, quota=Quota(weight=float("nan"))), Code.INVALID_ARGUMENT, "OUT_OF_RANGE",
        "quota.weight",
    ),
    "a key of no role": (
        lambda shell: create_key(shell, role=0), Code.INVALID_ARGUMENT, "ROLE_REQUIRED", "role",
    ),
    "a key of an unknown role": (
        lambda shell: create_key(shell, role=77), Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "role",
    ),
    "a key of nobody": (lambda shell: create_key(shell), Code.NOT_FOUND, "TENANT_NOT_FOUND", "tenant_id"),
    "a key that has expired": (
        lambda shell: create_key(shell, tenant_id="local", expire_time=Timestamp(seconds=1)), Code.INVALID_ARGUMENT,
        "INVALID_EXPIRY", "expire_time",
    ),
    "an expiry beyond the calendar": (
        lambda shell: create_key(shell, tenant_id="local", expire_time=Timestamp(seconds=2**60)),
        Code.INVALID_ARGUMENT, "INVALID_EXPIRY", "expire_time",
    ),
    "an expiry of too many nanos": (
        lambda shell: create_key(shell, tenant_id="local", expire_time=Timestamp(seconds=4102444800, nanos=-5)),
        Code.INVALID_ARGUMENT, "INVALID_EXPIRY", "expire_time",
    ),
    "the keys of nobody": (
        lambda shell: shell.tenants.ListKeys(tenant_pb2.ListKeysRequest(tenant_id="nobody")), Code.NOT_FOUND,
        "TENANT_NOT_FOUND", "tenant_id",
    ),
    "a key that is not there": (
        lambda shell: shell.tenants.RevokeKey(tenant_pb2.RevokeKeyRequest(key_id="00")), Code.NOT_FOUND,
        "KEY_NOT_FOUND", "key_id",
    ),
    "the tenant that needs no key": (
        lambda shell: shell.tenants.DeleteTenant(tenant_pb2.DeleteTenantRequest(id="local")),
        Code.FAILED_PRECONDITION, "TENANT_NEEDED", "id",
    ),
    "a page of less than nothing": (
        lambda shell: shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest(page_size=-1)), Code.INVALID_ARGUMENT,
        "OUT_OF_RANGE", "page_size",
    ),
    "a page token of one's own": (
        lambda shell: shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest(page_token="bQ==")),
        Code.INVALID_ARGUMENT, "BAD_PAGE_TOKEN", "page_token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_by_field_and_changes_nothing(what: str) -> None:
    call, code, reason, field = BAD[what]

    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(call(shell))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            run, registry = shell.registry.database.run, shell.registry
            assert [one.id for one in (await run(registry.tenants.list)).items] == ["local"]
            assert (await run(registry.keys.list, "local")).items == ()

    asyncio.run(scenario())


def test_a_draining_server_administers_nobody() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await shell.engine.drain(0.0)
            for call in (create(shell), shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest())):
                refusal = await refused(call)
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")

    asyncio.run(scenario())


def test_every_control_action_has_one_line_in_the_audit_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> list[str]:
        async with serving() as shell:
            key = await shell.registry.database.run(shell.registry.keys.create, "local", Role.USER)
            await create(shell, display_name="a private remark")
            made = await create_key(shell)
            await shell.tenants.ListKeys(tenant_pb2.ListKeysRequest(tenant_id="acme"))
            bearer = (("authorization", f"Bearer {key[1]}"), ("x-request-id", "mine-7"))
            await refused(shell.server.Drain(server_pb2.DrainRequest(), metadata=bearer))
            await refused(shell.server.Drain(server_pb2.DrainRequest(), metadata=(("authorization", "Bearer x"),)))
            alias = adapter_pb2.SetAliasRequest(name="a\nb", alias="prod")
            await refused(adapter_pb2_grpc.AdapterServiceStub(shell.channel).SetAlias(alias))
            return [key[0].id, made.key.id, key[1], made.secret]

    with caplog.at_level(logging.INFO, "motley.audit"):
        caller_id, made_id, *secrets = asyncio.run(scenario())
    lines = [record.getMessage() for record in caplog.records if record.name == "motley.audit"]
    assert not any("\n" in line for line in lines)
    read = [json.loads(line) for line in lines]
    made = {"tenant_id": "acme", "role": "ROLE_USER", "key_id": made_id}
    assert [(line["tenant"], line["key"], line["method"], line["object"], line["code"]) for line in read] == [
        ("local", "", "motley.v1.TenantService/CreateTenant", {"id": "acme"}, "OK"),
        ("local", "", "motley.v1.TenantService/CreateKey", made, "OK"),
        ("local", caller_id, "motley.v1.ServerService/Drain", {}, "PERMISSION_DENIED"),
        ("", "", "motley.v1.ServerService/Drain", {}, "UNAUTHENTICATED"),
        ("local", "", "motley.v1.AdapterService/SetAlias", {"name": "a\nb", "alias": "prod"}, "INVALID_ARGUMENT"),
    ]
    assert [line["request_id"] == "mine-7" for line in read] == [False, False, True, False, False]
    assert all(line["request_id"] for line in read)
    assert not any(words in caplog.text for words in [*secrets, "a private remark"])
