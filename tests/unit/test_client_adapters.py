"""Both clients manage adapters alike, and what is repeated happens once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, cast

import grpc
import pytest
from both_clients import BOTH, Ask, ask_asyncio, ask_blocking
from fake_adapter_service import FakeAdapterService, serving_adapters
from fake_service import FIRST_SECOND, refusal
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2
from motley_client import (
    AbortedError,
    Adapter,
    AdapterKind,
    AdapterResidency,
    AdapterState,
    AdapterVersion,
    Alias,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResolvedAdapter,
    UnavailableError,
    UploadStatus,
    Visibility,
    convert_adapters,
)

DIGEST = "sha256:" + "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of the file `a`


@pytest.fixture
def fake() -> FakeAdapterService:
    fake = FakeAdapterService()
    for name in ("legal", "medical", "poems"):
        fake.add(name, {"adapter_config.json": b"a"}, {"team": "search"})
        fake.point(name, "default", 1)
    return fake


@pytest.fixture
def address(fake: FakeAdapterService) -> Iterator[str]:
    with serving_adapters(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def test_an_adapter_is_shown_with_its_aliases_and_the_version_that_is_meant(
    ask: Ask, fake: FakeAdapterService, address: str
) -> None:
    fake.add("legal", {"adapter_config.json": b"b"})
    fake.point("legal", "prod", 2)
    fake.point("legal", "prod", 1)
    first = AdapterVersion(
        name="legal",
        version=1,
        digest=DIGEST,
        kind=AdapterKind.LORA,
        state=AdapterState.READY,
        size_bytes=1,
        ranks={"layers.0.q_proj": 8, "layers.1.q_proj": 8, "layers.0.k_proj": 4},
        device_bytes=4096,
        trained_on="undeclared",
        serves_on="undeclared",
        residency=AdapterResidency.DISK,
        pinned=False,
        labels={"team": "search"},
        create_time=datetime.fromtimestamp(FIRST_SECOND + 1, UTC),
        created_by="k0",
    )

    found = ask(address, "get_adapter", "legal@prod")

    assert found.version == first
    assert found.adapter.latest.version == 2
    aliases = (Alias("default", 1, None, "etag-1"), Alias("prod", 1, 2, "etag-2"))
    latest = found.adapter.latest
    assert found.adapter == Adapter("acme", "legal", aliases, latest, Visibility.PRIVATE, ())
    assert hash(found) == hash(ResolvedAdapter(found.adapter, first))


def test_an_adapter_without_versions_has_no_latest(ask: Ask, fake: FakeAdapterService, address: str) -> None:
    fake.versions["legal"].clear()

    assert ask(address, "list_adapters", "name=legal")[0].latest is None


def test_lists_go_through_every_page_in_order(ask: Ask, fake: FakeAdapterService, address: str) -> None:
    for text in (b"b", b"c", b"d", b"e"):
        fake.add("legal", {"adapter_config.json": text})

    assert [one.name for one in ask(address, "list_adapters")] == ["legal", "medical", "poems"]
    assert [one.name for one in ask(address, "list_adapters", "name=poems", page_size=7)] == ["poems"]
    assert [one.version for one in ask(address, "list_adapter_versions", "legal", page_size=4)] == [5, 4, 3, 2, 1]
    pages = [(name, request.page_size, request.page_token) for name, request in fake.calls]
    assert pages == [
        *(("ListAdapters", 0, token) for token in ("", "2")),
        ("ListAdapters", 7, ""),
        *(("ListAdapterVersions", 4, token) for token in ("", "4")),
    ]


def test_lists_do_not_tell_ranks_and_an_adapter_may_have_none(ask: Ask, fake: FakeAdapterService, address: str) -> None:
    assert ask(address, "list_adapters")[0].latest.ranks is None
    assert ask(address, "list_adapter_versions", "legal")[0].ranks is None
    fake.versions["legal"][0].ranks.clear()
    assert ask(address, "get_adapter", "legal").version.ranks == {}


def test_a_page_is_fetched_when_the_iteration_gets_there(fake: FakeAdapterService, address: str) -> None:
    with Client(address) as client:
        adapters = client.list_adapters()
        assert [next(adapters).name, next(adapters).name] == ["legal", "medical"]
    assert len(fake.calls) == 1


def test_aliases_are_set_rolled_back_and_removed_under_their_etag(
    ask: Ask, fake: FakeAdapterService, address: str
) -> None:
    fake.add("legal", {"adapter_config.json": b"b"})

    assert ask(address, "set_alias", "legal", "prod", 1, etag="") == Alias("prod", 1, None, "etag-1")
    assert ask(address, "set_alias", "legal", "prod", 2, etag="etag-1") == Alias("prod", 2, 1, "etag-2")
    with pytest.raises(AbortedError):
        ask(address, "set_alias", "legal", "prod", 1, etag="etag-1")
    assert ask(address, "rollback_alias", "legal", "prod", etag="etag-2") == Alias("prod", 1, 2, "etag-3")
    assert ask(address, "set_alias", "legal", "prod", 2).version == 2, "no etag overwrites"
    assert ask(address, "remove_alias", "legal", "prod", etag="etag-4") is None
    assert set(fake.aliases["legal"]) == {"default"}
    with pytest.raises(FailedPreconditionError):
        ask(address, "rollback_alias", "legal")
    assert fake.calls[-1][1].alias == "default"


def test_an_adapter_is_shared_with_exactly_those_that_are_named(
    ask: Ask, fake: FakeAdapterService, address: str
) -> None:
    shared = ask(address, "share_adapter", "legal", Visibility.TENANTS, ["bolt", "cord"])
    assert (shared.visibility, shared.shared_with) == (Visibility.TENANTS, ("bolt", "cord"))

    assert ask(address, "share_adapter", "legal", Visibility.PUBLIC).visibility is Visibility.PUBLIC
    assert ask(address, "share_adapter", "legal", Visibility.PRIVATE).shared_with == ()


def test_a_version_is_deleted_after_a_wait_that_is_said_or_the_servers(
    ask: Ask, fake: FakeAdapterService, address: str
) -> None:
    fake.add("legal", {"adapter_config.json": b"bb"})
    assert ask(address, "delete_adapter_version", "legal", 2, wait_seconds=0, force=True) == 2
    sent = fake.calls[-1][1]
    assert (sent.HasField("timeout"), sent.timeout, sent.force) == (True, Duration(), True)

    assert ask(address, "delete_adapter_version", "legal", 1) == 1
    sent = fake.calls[-1][1]
    assert (sent.HasField("timeout"), sent.force) == (False, False)
    assert fake.versions["legal"] == []


def test_a_version_is_pinned_and_unpinned(ask: Ask, address: str) -> None:
    pinned = ask(address, "pin_adapter", "legal")
    assert (pinned.pinned, pinned.residency) == (True, AdapterResidency.DEVICE)
    assert ask(address, "unpin_adapter", "legal@1").pinned is False


def test_an_upload_is_shown_and_forgotten(ask: Ask, fake: FakeAdapterService, address: str) -> None:
    fake.uploads["u1"] = {"adapter_config.json": bytearray(b"abc")}
    found = ask(address, "get_upload", "u1")

    assert found == UploadStatus("u1", {"adapter_config.json": 3}, datetime.fromtimestamp(FIRST_SECOND + 4, UTC))
    assert ask(address, "abort_upload", "u1") is None
    with pytest.raises(NotFoundError):
        ask(address, "get_upload", "u1")


CHANGES: list[tuple[str, tuple[Any, ...]]] = [
    ("set_alias", ("legal", "prod", 1)),
    ("remove_alias", ("legal", "default")),
    ("rollback_alias", ("medical", "back")),
    ("share_adapter", ("legal", Visibility.PUBLIC)),
    ("delete_adapter_version", ("poems", 1)),
]
PINS: list[tuple[str, tuple[Any, ...]]] = [("pin_adapter", ("legal",)), ("unpin_adapter", ("legal",))]
READS: list[tuple[str, tuple[Any, ...]]] = [
    ("get_adapter", ("legal",)),
    ("list_adapters", ("name=legal",)),
    ("list_adapter_versions", ("legal",)),
    ("get_upload", ("u1",)),
]


@pytest.mark.parametrize(("call", "args"), [*CHANGES, *PINS, *READS])
def test_a_call_whose_answer_is_lost_is_repeated_and_happens_once(
    ask: Ask, fake: FakeAdapterService, address: str, call: str, args: tuple[Any, ...]
) -> None:
    fake.uploads["u1"] = {}
    fake.add("medical", {"adapter_config.json": b"b"})
    for version in (1, 2):
        fake.point("medical", "back", version)
    fake.losses = 2

    ask(address, call, *args)

    assert len(fake.calls) == 3
    if (call, args) in CHANGES:
        assert len({request.request_id for _, request in fake.calls}) == 1
        assert fake.calls[0][1].request_id
    assert fake.aliases["medical"]["back"].version == (1 if call == "rollback_alias" else 2)


def test_an_abort_is_not_repeated_behind_the_callers_back(ask: Ask, fake: FakeAdapterService, address: str) -> None:
    fake.uploads["u1"] = {}
    fake.losses = 1
    with pytest.raises(UnavailableError):
        ask(address, "abort_upload", "u1")

    assert len(fake.calls) == 1


def test_every_change_has_a_request_id_of_its_own_unless_one_is_given(
    ask: Ask, fake: FakeAdapterService, address: str
) -> None:
    for words in ({}, {}, {"request_id": "mine"}):
        ask(address, "share_adapter", "legal", Visibility.PUBLIC, **words)

    ids = [request.request_id for _, request in fake.calls]
    assert len(set(ids)) == 3
    assert ids[2] == "mine"


@pytest.mark.parametrize(("call", "args"), [*CHANGES, *PINS, *READS, ("abort_upload", ("u1",))])
def test_every_call_sends_the_key_and_turns_a_refusal_into_its_typed_error(
    fake: FakeAdapterService, address: str, call: str, args: tuple[Any, ...]
) -> None:
    for ask in (ask_blocking, ask_asyncio):
        fake.refusals.append(refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED", "name"))
        with pytest.raises(PermissionDeniedError) as caught:
            ask(address, call, *args, key="mk_a_b")
        assert (caught.value.reason, caught.value.field) == ("ROLE_REQUIRED", "name")
    assert fake.credentials == ["Bearer mk_a_b"] * 2


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: convert_adapters.get_adapter_request("\ud800"), "name"),
        (lambda: convert_adapters.list_adapters_request(cast(str, 5), None), "filter"),
        (lambda: convert_adapters.list_adapters_request("", 2**31), "page_size"),
        (lambda: convert_adapters.list_versions_request("a", -(2**40)), "page_size"),
        (lambda: convert_adapters.set_alias_request("a", "\ud800", 1, None, None), "alias"),
        (lambda: convert_adapters.set_alias_request("a", "b", 0, None, None), "version"),
        (lambda: convert_adapters.set_alias_request("a", "b", 2**63, None, None), "version"),
        (lambda: convert_adapters.set_alias_request("a", "b", 1, "\ud800", None), "etag"),
        (lambda: convert_adapters.set_alias_request("a", "b", 1, None, "\ud800"), "request_id"),
        (lambda: convert_adapters.rollback_alias_request("a", cast(str, 5), None, None), "alias"),
        (lambda: convert_adapters.share_adapter_request("a", cast(Visibility, "all"), (), None), "visibility"),
        (lambda: convert_adapters.share_adapter_request("a", Visibility.TENANTS, "bolt", None), "tenants"),
        (lambda: convert_adapters.delete_version_request("a", 1, float("nan"), False, None), "timeout"),
        (lambda: convert_adapters.delete_version_request("a", cast(int, "1"), None, False, None), "version"),
        (lambda: convert_adapters.pin_adapter_request("\ud800"), "name"),
        (lambda: convert_adapters.abort_upload_request("\ud800"), "upload_id"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


def known(enum: Any) -> set[int]:
    """Return an enum's numbers but for the unspecified."""
    return set(enum.values()) - {0}


def test_every_enum_travels() -> None:
    def read(**fields: Any) -> AdapterVersion:
        return convert_adapters.version(adapter_pb2.AdapterVersion(**fields))

    assert {convert_adapters.kind_number(kind) for kind in AdapterKind} == known(adapter_pb2.AdapterKind)
    assert {read(kind=number).kind for number in known(adapter_pb2.AdapterKind)} == set(AdapterKind)
    assert {read(state=number).state for number in known(adapter_pb2.AdapterState)} == set(AdapterState)
    assert {read(residency=number).residency for number in known(adapter_pb2.AdapterResidency)} == set(AdapterResidency)
    for number in known(adapter_pb2.Visibility):
        visibility = convert_adapters.adapter(adapter_pb2.Adapter(visibility=cast(Any, number))).visibility
        assert visibility is not None
        assert convert_adapters.share_adapter_request("a", visibility, (), None).visibility == number
    strange = read(kind=99, state=99, residency=99)
    assert (strange.kind, strange.state, strange.residency) == (None, None, None)


def test_types_show_every_field_of_their_messages() -> None:
    pairs = (
        (Adapter, adapter_pb2.Adapter),
        (AdapterVersion, adapter_pb2.AdapterVersion),
        (Alias, adapter_pb2.Alias),
        (ResolvedAdapter, adapter_pb2.GetAdapterResponse),
        (UploadStatus, adapter_pb2.GetUploadResponse),
    )
    for kind, message in pairs:
        assert {field.name for field in dataclasses.fields(kind)} == {field.name for field in message.DESCRIPTOR.fields}
