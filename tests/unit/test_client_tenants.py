"""Both clients administer tenants and keys alike, and what is repeated happens once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import grpc
import pytest
from both_clients import BOTH, Ask, ask_asyncio, ask_blocking
from fake_tenant_service import FIRST_SECOND, FakeTenantService, refusal, serving_tenants
from motley.v1 import tenant_pb2
from motley_client import (
    AbortedError,
    AlreadyExistsError,
    Client,
    DataLossError,
    InvalidArgumentError,
    Key,
    NotFoundError,
    PermissionDeniedError,
    Quota,
    Role,
    Tenant,
    UnauthenticatedError,
    UnavailableError,
    convert_tenants,
)

NOON = datetime(2030, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def fake() -> FakeTenantService:
    return FakeTenantService()


@pytest.fixture
def address(fake: FakeTenantService) -> Iterator[str]:
    with serving_tenants(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def second(number: int) -> datetime:
    """Return when the fake did its first, second, ... thing."""
    return datetime.fromtimestamp(FIRST_SECOND + number, UTC)


def test_a_tenant_is_made_shown_changed_and_deleted(ask: Ask, fake: FakeTenantService, address: str) -> None:
    made = ask(address, "create_tenant", "acme", "Acme & Sons", Quota(requests_in_flight=0, weight=2.5))
    assert made == Tenant("acme", "Acme & Sons", Quota(requests_in_flight=0, weight=2.5), second(1), "etag-1")
    assert ask(address, "get_tenant", "acme") == made

    changed = ask(address, "update_tenant", "acme", display_name="", quota=Quota(adapters=7), etag="etag-1")
    wanted = Quota(adapters=7, requests_in_flight=0, weight=2.5)
    assert changed == dataclasses.replace(made, display_name="", quota=wanted, etag="etag-2")

    assert ask(address, "delete_tenant", "acme") is None
    assert fake.tenants == {}


def test_a_tenant_without_a_quota_has_no_limits_and_weighs_one(ask: Ask, address: str) -> None:
    assert ask(address, "create_tenant", "acme").quota == Quota(weight=1.0)


def test_an_update_sends_only_what_is_given(ask: Ask, fake: FakeTenantService, address: str) -> None:
    ask(address, "create_tenant", "acme", "Acme")
    ask(address, "update_tenant", "acme", quota=Quota(adapter_bytes=2**40))

    sent = fake.calls[-1][1]
    assert {field.name for field, _ in sent.ListFields()} == {"id", "quota", "request_id"}
    assert [(field.name, value) for field, value in sent.quota.ListFields()] == [("adapter_bytes", 2**40)]


def test_limits_are_lifted_by_name_and_others_set_at_once(ask: Ask, fake: FakeTenantService, address: str) -> None:
    ask(address, "create_tenant", "acme", quota=Quota(adapters=3, training_jobs=1, weight=2.0))
    changed = ask(address, "update_tenant", "acme", quota=Quota(adapters=4), lift=["training_jobs", "weight"])

    assert list(fake.calls[-1][1].lift) == ["training_jobs", "weight"]
    assert changed.quota == Quota(adapters=4, weight=1.0)


def test_a_key_is_made_with_its_secret_listed_without_and_revoked(
    ask: Ask, fake: FakeTenantService, address: str
) -> None:
    ask(address, "create_tenant", "acme")
    made = ask(address, "create_key", "acme", Role.PUBLISHER, expire_time=NOON)
    assert made.key == Key("k0", "acme", Role.PUBLISHER, second(2), NOON, None)
    assert made.secret == "mk_k0_hush"
    assert "hush" not in repr(made)

    assert ask(address, "list_keys", "acme") == [made.key]
    revoked = ask(address, "revoke_key", "k0")
    assert revoked == dataclasses.replace(made.key, revoke_time=second(3))


def test_a_key_is_a_users_and_never_expires_unless_said(ask: Ask, address: str) -> None:
    ask(address, "create_tenant", "acme")
    made = ask(address, "create_key", "acme").key

    assert (made.role, made.expire_time) == (Role.USER, None)


def test_lists_go_through_every_page_in_order(ask: Ask, fake: FakeTenantService, address: str) -> None:
    for number in range(5):
        ask(address, "create_tenant", f"t{number}")
        ask(address, "create_key", "t0")

    assert [one.id for one in ask(address, "list_tenants")] == [f"t{number}" for number in range(5)]
    assert [one.id for one in ask(address, "list_keys", "t0", page_size=4)] == [f"k{number}" for number in range(5)]
    pages = [(name, request.page_size, request.page_token) for name, request in fake.calls if name.startswith("List")]
    assert pages == [
        *(("ListTenants", 0, token) for token in ("", "2", "4")),
        *(("ListKeys", 4, token) for token in ("", "4")),
    ]


def test_a_page_is_fetched_when_the_iteration_gets_there(fake: FakeTenantService, address: str) -> None:
    with Client(address) as client:
        for number in range(5):
            client.create_tenant(f"t{number}")
        tenants = client.list_tenants()
        fake.calls.clear()
        assert [next(tenants).id, next(tenants).id] == ["t0", "t1"]
        assert len(fake.calls) == 1


CHANGES: list[tuple[str, tuple[Any, ...]]] = [
    ("create_tenant", ("new",)),
    ("update_tenant", ("acme",)),
    ("delete_tenant", ("acme",)),
    ("revoke_key", ("k0",)),
]


@pytest.mark.parametrize(("call", "args"), CHANGES)
def test_a_change_whose_answer_is_lost_is_repeated_under_the_same_id_and_happens_once(
    ask: Ask, fake: FakeTenantService, address: str, call: str, args: tuple[Any, ...]
) -> None:
    ask(address, "create_tenant", "acme")
    ask(address, "create_key", "acme")
    fake.calls.clear()
    fake.losses = 2

    ask(address, call, *args)

    assert len(fake.calls) == 3
    assert len({request.request_id for _, request in fake.calls}) == 1
    if call == "update_tenant":
        assert fake.tenants["acme"].etag == "etag-2", "changed more than once"


def test_every_call_has_a_request_id_of_its_own_unless_one_is_given(
    ask: Ask, fake: FakeTenantService, address: str
) -> None:
    ask(address, "create_tenant", "one")
    ask(address, "create_tenant", "two")
    ask(address, "create_tenant", "three", request_id="mine")
    assert ask(address, "create_tenant", "three", request_id="mine").id == "three"

    ids = [request.request_id for _, request in fake.calls]
    assert len(set(ids)) == 3
    assert all(ids)
    assert ids[2:] == ["mine", "mine"]


def test_a_key_whose_secret_was_lost_on_the_way_is_made_once_and_named(
    ask: Ask, fake: FakeTenantService, address: str
) -> None:
    ask(address, "create_tenant", "acme")
    fake.losses = 1

    with pytest.raises(DataLossError, match="k0") as caught:
        ask(address, "create_key", "acme")

    assert caught.value.reason == "SECRET_LOST"
    assert len(fake.keys) == 1


def test_what_stays_unavailable_is_given_up(ask: Ask, fake: FakeTenantService, address: str) -> None:
    fake.losses = 100

    with pytest.raises(UnavailableError):
        ask(address, "create_tenant", "acme")

    assert len(fake.calls) == 4


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError, "KEY_REQUIRED"),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError, "ROLE_REQUIRED"),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExistsError, "TENANT_EXISTS"),
        (grpc.StatusCode.ABORTED, AbortedError, "ETAG_MISMATCH"),
        (grpc.StatusCode.NOT_FOUND, NotFoundError, "TENANT_NOT_FOUND"),
    ],
)
@pytest.mark.parametrize(
    ("call", "args"),
    [*CHANGES, ("create_key", ("acme",)), ("get_tenant", ("acme",)), ("list_tenants", ()), ("list_keys", ("acme",))],
)
def test_every_call_turns_a_refusal_into_its_typed_error_without_a_repeat(
    fake: FakeTenantService,
    address: str,
    call: str,
    args: tuple[Any, ...],
    code: grpc.StatusCode,
    kind: type[Exception],
    reason: str,
) -> None:
    for ask in (ask_blocking, ask_asyncio):
        fake.refusals.append(refusal(code, reason, "id"))
        with pytest.raises(kind) as caught:
            ask(address, call, *args)
        assert (cast(Any, caught.value).reason, cast(Any, caught.value).field) == (reason, "id")
    assert len(fake.calls) == 2


def test_the_key_goes_with_every_call(ask: Ask, fake: FakeTenantService, address: str) -> None:
    for call, args in [("create_tenant", ("acme",)), ("create_key", ("acme",)), *CHANGES, ("list_tenants", ())]:
        ask(address, call, *args, key="mk_a_b")

    assert fake.credentials == ["Bearer mk_a_b"] * 7


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: convert_tenants.create_tenant_request("\ud800", "", None, None), "id"),
        (lambda: convert_tenants.create_tenant_request("a", "\ud800", None, None), "display_name"),
        (lambda: convert_tenants.create_tenant_request("a", "", Quota(adapters=2**63), None), "quota.adapters"),
        (lambda: convert_tenants.create_tenant_request("a", "", Quota(weight=cast(float, "x")), None), "quota.weight"),
        (lambda: convert_tenants.create_tenant_request("a", "", None, "\ud800"), "request_id"),
        (lambda: convert_tenants.get_tenant_request(cast(str, 5)), "id"),
        (lambda: convert_tenants.list_tenants_request(2**31), "page_size"),
        (lambda: convert_tenants.list_keys_request("a", -(2**40)), "page_size"),
        (lambda: convert_tenants.update_tenant_request("a", None, None, (), "\ud800", None), "etag"),
        (lambda: convert_tenants.update_tenant_request("a", None, None, ["\ud800"], None, None), "lift"),
        (lambda: convert_tenants.update_tenant_request("a", None, None, cast(list[str], 5), None, None), "lift"),
        (lambda: convert_tenants.create_key_request("a", cast(Role, "king"), None, None), "role"),
        (lambda: convert_tenants.create_key_request("a", Role.USER, datetime(2030, 1, 1), None), "expire_time"),
        (lambda: convert_tenants.revoke_key_request("\ud800", None), "key_id"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


def test_an_expiry_of_any_zone_is_the_same_instant() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-7)))
    request = convert_tenants.create_key_request("a", Role.USER, elsewhere, None)

    assert request.expire_time.ToDatetime(UTC) == NOON


def test_every_role_travels_there_and_back() -> None:
    numbers = set(tenant_pb2.Role.values()) - {tenant_pb2.ROLE_UNSPECIFIED}
    sent = {role: convert_tenants.create_key_request("a", role, None, None).role for role in Role}

    assert set(sent.values()) == numbers
    assert {role: convert_tenants.key(tenant_pb2.Key(role=number)).role for role, number in sent.items()} == {
        role: role for role in Role
    }
    assert convert_tenants.key(tenant_pb2.Key(role=cast(Any, 99))).role is None


def test_types_show_every_field_of_their_messages() -> None:
    for kind, message in ((Tenant, tenant_pb2.Tenant), (Quota, tenant_pb2.Quota), (Key, tenant_pb2.Key)):
        assert {field.name for field in dataclasses.fields(kind)} == {field.name for field in message.DESCRIPTOR.fields}
