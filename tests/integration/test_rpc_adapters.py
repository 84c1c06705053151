"""AdapterService over the wire: names, lists, aliases and shares, and who may see what of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable

import grpc
import pytest
from adapter_calls import key_of, push, refused, served, under
from google.protobuf.message import Message
from motley.v1 import adapter_pb2, tenant_pb2
from paper_library import digest_of
from rpc_harness import eventually, serving
from sqlalchemy import event
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Metadata = tuple[tuple[str, str], ...]


def test_a_name_is_read_in_every_form_and_says_what_it_means_now() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for name, version in (("zeta", 2), ("zeta@1", 1), (f"zeta@{digest_of('1')}", 1), ("local/zeta", 2)):
                got = await shell.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
                assert (got.version.version, got.adapter.latest.version, got.adapter.owner) == (version, 2, "local")
                assert got.version.residency == pb.ADAPTER_RESIDENCY_DISK
            for name in ("nobody", "other/secret", "zeta@9"):
                refusal = await refused(shell.adapters.GetAdapter(pb.GetAdapterRequest(name=name)))
                assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "name")
                assert refusal.message == f"there is no adapter {name!r} that you may use"

    asyncio.run(scenario())


def test_lists_come_by_pages_with_filters_and_newest_versions_first() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            names, token = [], ""
            while True:
                page = await shell.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=5, page_token=token))
                names += [one.latest.name for one in page.adapters]
                token = page.next_page_token
                if not token:
                    break
            assert len(names) == len(set(names)) == 16
            assert "public/shared" in names
            found = await shell.adapters.ListAdapters(pb.ListAdaptersRequest(filter="kind=s2ft owner=local"))
            assert {one.name for one in found.adapters} == {"apart", "columns", "rows"}
            versions = await shell.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name="zeta"))
            assert [one.version for one in versions.versions] == [2, 1]
            assert not any(one.ranks for one in [*versions.versions, *(one.latest for one in found.adapters)])
            assert (await shell.adapters.GetAdapter(pb.GetAdapterRequest(name="zeta"))).version.ranks
            for request, reason in (
                (pb.ListAdaptersRequest(filter="size>3"), "BAD_FILTER"),
                (pb.ListAdaptersRequest(page_token="mine"), "BAD_PAGE_TOKEN"),
                (pb.ListAdaptersRequest(page_size=-1), "OUT_OF_RANGE"),
            ):
                refusal = await refused(shell.adapters.ListAdapters(request))
                assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, reason)

    asyncio.run(scenario())


def test_an_alias_moves_with_an_etag_rolls_back_and_goes() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            set_alias, name = shell.adapters.SetAlias, "zeta"
            made = (await set_alias(pb.SetAliasRequest(name=name, alias="prod", version=1, etag=""))).alias
            assert await served(shell, "zeta@prod") == ("zeta", 1)
            moved = (await set_alias(pb.SetAliasRequest(name=name, alias="prod", version=2, etag=made.etag))).alias
            assert (moved.version, moved.previous_version) == (2, 1)
            stale = await refused(set_alias(pb.SetAliasRequest(name=name, alias="prod", version=1, etag=made.etag)))
            assert (stale.code, stale.reason, stale.field) == (Code.ABORTED, "ETAG_MISMATCH", "etag")
            assert await served(shell, "zeta@prod") == ("zeta", 2)
            back = (await shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name=name, alias="prod"))).alias
            assert (back.version, back.previous_version) == (1, 2)
            await set_alias(pb.SetAliasRequest(name=name, alias="prod", version=0))
            assert (await refused(shell.inference.Generate(under("zeta@prod")))).reason == "ADAPTER_NOT_FOUND"
            missing = await refused(set_alias(pb.SetAliasRequest(name=name, alias="prod", version=9)))
            assert (missing.code, missing.reason, missing.field) == (Code.NOT_FOUND, "VERSION_NOT_FOUND", "version")

    asyncio.run(scenario())


def test_what_is_shared_can_be_used_and_not_changed_or_taken_away() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            share = shell.adapters.ShareAdapter
            await refused(shell.inference.Generate(under("local/zeta"), metadata=theirs))
            with_acme = pb.ShareAdapterRequest(name="zeta", visibility=pb.VISIBILITY_TENANTS, tenants=["acme"])
            shared = await share(with_acme)
            assert list(shared.adapter.shared_with) == ["acme"]
            assert await served(shell, "local/zeta", metadata=theirs) == ("local/zeta", 2)
            got = await shell.adapters.GetAdapter(pb.GetAdapterRequest(name="local/zeta"), metadata=theirs)
            assert (list(got.adapter.shared_with), got.version.created_by) == ([], "")
            for call in (
                shell.adapters.SetAlias(pb.SetAliasRequest(name="local/zeta", alias="a", version=1), metadata=theirs),
                shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name="local/zeta", alias="a"), metadata=theirs),
                share(pb.ShareAdapterRequest(name="local/zeta", visibility=pb.VISIBILITY_PUBLIC), metadata=theirs),
                shell.adapters.DeleteAdapterVersion(
                    pb.DeleteAdapterVersionRequest(name="local/zeta", version=1), metadata=theirs
                ),
                shell.adapters.PinAdapter(pb.PinAdapterRequest(name="local/zeta"), metadata=theirs),
                shell.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="local/zeta"), metadata=theirs),
                shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="local/zeta"), metadata=theirs).read(),
                shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="public/shared"), metadata=theirs).read(),
            ):
                refusal = await refused(call)
                assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
            await share(pb.ShareAdapterRequest(name="zeta", visibility=pb.VISIBILITY_PRIVATE))
            assert (await refused(shell.inference.Generate(under("local/zeta"), metadata=theirs))).reason == (
                "ADAPTER_NOT_FOUND"
            )
            for request, reason in (
                (pb.ShareAdapterRequest(name="zeta"), "VISIBILITY_REQUIRED"),
                (pb.ShareAdapterRequest(name="zeta", visibility=pb.VISIBILITY_TENANTS), "INVALID_SHARING"),
            ):
                assert (await refused(share(request))).reason == reason

    asyncio.run(scenario())


def test_anothers_adapter_costs_the_same_queries_and_words_as_a_missing_one() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await served(shell, "alpha")  # who calls, and its quota, are known from now on
            statements: list[str] = []
            engine = shell.library.registry.database._reader
            event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
            seen = []
            for name in ("other/secret", "other/nobody", "nobody/secret", "local/zeta@7"):
                statements.clear()
                refusal = await refused(shell.inference.Generate(under(name)))
                seen.append((refusal.message.replace(name, "NAME"), list(statements)))
            assert seen.count(seen[0]) >= 3
            assert {(words, len(queries)) for words, queries in seen} == {(seen[0][0], len(seen[0][1]))}
            assert seen[0][1]

    asyncio.run(scenario())


def test_a_request_finishes_on_its_version_and_every_later_one_has_the_new() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "mine"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            await push(shell, 2)
            later = asyncio.ensure_future(served(shell, "mine"))
            await eventually(lambda: len(shell.engine.submitted) == 2)
            shell.engine.may_step.set()
            assert await running == ("mine", 1)
            assert await later == ("mine", 2)

    asyncio.run(scenario())


def test_calls_about_adapters_count_against_the_requests_of_a_minute() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            key = await key_of(shell, "acme")
            quota = tenant_pb2.Quota(requests_per_minute=3, requests_in_flight=0)
            await shell.tenants.UpdateTenant(tenant_pb2.UpdateTenantRequest(id="acme", quota=quota))
            for _ in range(3):
                await shell.adapters.ListAdapters(pb.ListAdaptersRequest(), metadata=key)
            refusal = await refused(shell.adapters.ListAdapters(pb.ListAdaptersRequest(), metadata=key))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_REQUESTS_PER_MINUTE")
            assert "RetryInfo" in refusal.details

    asyncio.run(scenario())


def test_each_change_is_one_line_in_the_audit_with_its_version_and_digest(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for version in (1, 2):
                await shell.adapters.SetAlias(pb.SetAliasRequest(name="zeta", alias="prod", version=version))
            await shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name="zeta", alias="prod"))
            await shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id="acme"))
            with_acme = pb.ShareAdapterRequest(name="zeta", visibility=pb.VISIBILITY_TENANTS, tenants=["acme"])
            await shell.adapters.ShareAdapter(with_acme)
            await shell.adapters.SetAlias(pb.SetAliasRequest(name="zeta", alias="prod", version=0))
            await shell.adapters.DeleteAdapterVersion(pb.DeleteAdapterVersionRequest(name="zeta", version=1))

    with caplog.at_level("INFO", "motley.audit"):
        asyncio.run(scenario())
    lines = [json.loads(one.message) for one in caplog.records if one.name == "motley.audit"]
    told = [(one["method"].rpartition("/")[2], one["object"]) for one in lines if "AdapterService" in one["method"]]
    first, second = ({"version": number, "digest": digest_of(str(number))} for number in (1, 2))
    alias = {"name": "zeta", "alias": "prod"}
    assert told == [
        ("SetAlias", alias | first),
        ("SetAlias", alias | second),
        ("RollbackAlias", alias | first),
        ("ShareAdapter", {"name": "zeta", "visibility": "VISIBILITY_TENANTS", "tenants": "acme"}),
        ("SetAlias", alias),
        ("DeleteAdapterVersion", {"name": "zeta"} | first),
    ]


def test_nothing_is_changed_or_told_while_the_server_drains() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "zeta"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            draining = asyncio.ensure_future(shell.rpc.lifecycle.drain(None))
            await eventually(lambda: shell.engine.is_draining)
            calls: list[Awaitable[Message]] = [
                shell.adapters.ListAdapters(pb.ListAdaptersRequest()),
                shell.adapters.SetAlias(pb.SetAliasRequest(name="zeta", alias="a", version=1)),
                shell.adapters.UploadAdapter(iter(whole(paper_files()))),
            ]
            for call in calls:
                refusal = await refused(call)
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")
                assert "RetryInfo" in refusal.details
            shell.engine.may_step.set()
            await running
            await draining

    asyncio.run(scenario())
