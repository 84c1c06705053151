"""AdapterService over the wire: names, aliases, shares, downloads, pins and deletions, and who may see what of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from motley.v1 import adapter_pb2, inference_pb2, tenant_pb2
from paper_library import digest_of
from rpc_harness import Refusal, Shell, eventually, read_refusal, serving, text_request
from sqlalchemy import event
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = adapter_pb2
Metadata = tuple[tuple[str, str], ...]


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


async def key_of(shell: Shell, tenant_id: str, role: Any = tenant_pb2.ROLE_PUBLISHER) -> Metadata:
    await shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id=tenant_id))
    made = await shell.tenants.CreateKey(tenant_pb2.CreateKeyRequest(tenant_id=tenant_id, role=role))
    return (("authorization", f"Bearer {made.secret}"),)


async def push(shell: Shell, seed: int, name: str = "mine", **options: Any) -> adapter_pb2.AdapterVersion:
    stream = whole(paper_files(seed=seed), upload_id=f"{name}-{seed}", name=name)
    return (await shell.adapters.UploadAdapter(iter(stream), **options)).version


def under(name: str) -> inference_pb2.GenerateRequest:
    request = text_request("hello", max_new_tokens=3)
    request.adapters.add(name=name)
    return request


async def served(shell: Shell, name: str, **options: Any) -> tuple[str, int]:
    (one,) = (await shell.inference.Generate(under(name), **options)).served_by.adapters
    return one.name, one.version


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


def delete(version: int = 1, wait: float | None = None, **fields: Any) -> pb.DeleteAdapterVersionRequest:
    request = pb.DeleteAdapterVersionRequest(name="mine", version=version, **fields)
    if wait is not None:
        request.timeout.FromMilliseconds(round(wait * 1000))
    return request


def test_a_version_is_deleted_once_nobody_holds_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            first = await push(shell, 1)
            pointed = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (pointed.code, pointed.reason) == (Code.FAILED_PRECONDITION, "VERSION_HAS_ALIAS")
            await push(shell, 2)
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "mine@1"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            held = await refused(shell.adapters.DeleteAdapterVersion(delete(wait=0.05)))
            assert (held.code, held.reason, held.field) == (Code.DEADLINE_EXCEEDED, "VERSION_HELD", "timeout")
            deleting = asyncio.ensure_future(_answer(shell.adapters.DeleteAdapterVersion(delete(request_id="d"))))
            await eventually(lambda: shell.library.holds.is_deleting(("local", "mine", 1)))
            assert (await refused(shell.inference.Generate(under("mine@1")))).reason == "ADAPTER_NOT_FOUND"
            listed = await shell.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name="mine"))
            assert [one.state for one in listed.versions] == [pb.ADAPTER_STATE_READY, pb.ADAPTER_STATE_DELETING]
            named = await refused(shell.adapters.SetAlias(pb.SetAliasRequest(name="mine", alias="old", version=1)))
            assert (named.code, named.reason) == (Code.FAILED_PRECONDITION, "VERSION_NOT_READY")
            twice = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (twice.code, twice.reason) == (Code.ABORTED, "VERSION_BEING_DELETED")
            assert not deleting.done()
            shell.engine.may_step.set()
            assert await running == ("mine", 1)
            assert (await deleting).freed_bytes == first.size_bytes
            again = await shell.adapters.DeleteAdapterVersion(delete(request_id="d"))
            assert again.freed_bytes == first.size_bytes
            gone = await refused(shell.adapters.DeleteAdapterVersion(delete()))
            assert (gone.code, gone.reason) == (Code.NOT_FOUND, "VERSION_NOT_FOUND")
            assert (await push(shell, 3)).version == 3

    asyncio.run(scenario())


def test_a_forced_deletion_ends_the_requests_that_hold_the_version_and_no_others() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_step.clear()
            old, new = (asyncio.ensure_future(_answer(shell.inference.Generate(under(f"mine@{v}")))) for v in (1, 2))
            await eventually(lambda: len(shell.engine.submitted) == 2)
            deleting = asyncio.ensure_future(
                _answer(shell.adapters.DeleteAdapterVersion(delete(wait=0.05, force=True)))
            )
            await asyncio.sleep(0.1)
            shell.engine.may_step.set()
            refusal = await refused(old)
            assert (refusal.code, refusal.reason, refusal.field) == (Code.ABORTED, "ADAPTER_DELETED", "adapters")
            await deleting
            assert [one.version for one in (await new).served_by.adapters] == [2]

    asyncio.run(scenario())


def test_no_alias_comes_to_point_at_a_version_that_is_going() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(served(shell, "mine@1"))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            deleting = asyncio.ensure_future(_answer(shell.adapters.DeleteAdapterVersion(delete())))
            await eventually(lambda: shell.library.holds.is_deleting(("local", "mine", 1)))
            rollback = shell.adapters.RollbackAlias(pb.RollbackAliasRequest(name="mine", alias="default"))
            refusal = await refused(rollback)
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "VERSION_NOT_READY")
            shell.engine.may_step.set()
            await running
            await deleting
            assert await served(shell, "mine") == ("mine", 2)

    asyncio.run(scenario())


def test_a_forced_deletion_waits_for_no_reader_that_stopped_reading() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            stream = whole(paper_files(12 << 20, seed=1), size_bytes=1 << 20)
            await shell.adapters.UploadAdapter(iter(stream))
            await push(shell, 2)
            download = shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine@1"))
            await download.read()
            await eventually(lambda: bool(shell.library.holds.bundles()))
            async with asyncio.timeout(5):
                await shell.adapters.DeleteAdapterVersion(delete(wait=0, force=True))
            refusal = await refused(_read_all(download))
            assert (refusal.code, refusal.reason) == (Code.ABORTED, "ADAPTER_DELETED")

    asyncio.run(scenario())


def test_a_forced_deletion_ends_a_pin_that_waits() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            await push(shell, 2)
            shell.engine.may_keep.clear()
            pinning = asyncio.ensure_future(_answer(shell.adapters.PinAdapter(pb.PinAdapterRequest(name="mine@1"))))
            await eventually(lambda: bool(shell.library.holds.bundles()))
            async with asyncio.timeout(5):
                await shell.adapters.DeleteAdapterVersion(delete(wait=0, force=True))
            refusal = await refused(pinning)
            assert (refusal.code, refusal.reason) == (Code.ABORTED, "ADAPTER_DELETED")
            assert shell.engine.kept == []

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


def test_a_reader_that_leaves_in_mid_download_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            stream = whole(paper_files(12 << 20, seed=1), size_bytes=1 << 20)
            await shell.adapters.UploadAdapter(iter(stream))
            for _ in range(5):
                download = shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine"))
                await download.read()
                download.cancel()
            await eventually(lambda: not shell.library.holds.bundles())
            method = "/motley.v1.AdapterService/DownloadAdapter"
            assert shell.count("motley_grpc_server_handled_total", method=method, code="INTERNAL") == 0

    with caplog.at_level("ERROR"):
        asyncio.run(scenario())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


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


@pytest.mark.parametrize("seconds", [-1, 86401])
def test_nobody_waits_for_less_than_nothing_or_for_ever(seconds: int) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = pb.DeleteAdapterVersionRequest(name="zeta", version=1, timeout=Duration(seconds=seconds))
            refusal = await refused(shell.adapters.DeleteAdapterVersion(request))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "timeout")

    asyncio.run(scenario())


def test_a_download_is_the_upload_byte_for_byte_and_goes_on_by_offset() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await push(shell, 1)
            files = paper_files(seed=1)
            whole_files, version = await downloaded(shell, {})
            assert (whole_files, version.version) == (files, 1)
            offsets = {"adapter_config.json": 4, "adapter_model.safetensors": 1000}
            rest, _ = await downloaded(shell, offsets)
            assert rest == {name: data[offsets[name] :] for name, data in files.items()}
            for wrong, code, reason in (
                ({"adapter_config.json": 5}, Code.OUT_OF_RANGE, "PAST_END"),
                ({"adapter_config.json": -1}, Code.OUT_OF_RANGE, "PAST_END"),
                ({"../key": 0}, Code.INVALID_ARGUMENT, "FILE_NOT_IN_ADAPTER"),
            ):
                request = pb.DownloadAdapterRequest(name="mine", offsets=wrong)
                refusal = await refused(shell.adapters.DownloadAdapter(request).read())
                assert (refusal.code, refusal.reason) == (code, reason)
            assert shell.library.holds.bundles() == set()
            refusal = await refused(shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="zeta")).read())
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_FILES_MISSING")

    asyncio.run(scenario())


async def downloaded(shell: Shell, offsets: dict[str, int]) -> tuple[dict[str, bytes], pb.AdapterVersion]:
    files: dict[str, bytes] = {}
    version = pb.AdapterVersion()
    async for message in shell.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="mine", offsets=offsets)):
        match message.WhichOneof("payload"):
            case "version":
                version = message.version
            case "file":
                files[message.file.name] = b""
            case "chunk":
                assert message.chunk.offset == offsets.get(message.chunk.file, 0) + len(files[message.chunk.file])
                files[message.chunk.file] += message.chunk.data
    return files, version


def test_a_pin_holds_until_it_is_undone_or_its_version_deleted() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            pinned = (await shell.adapters.PinAdapter(pb.PinAdapterRequest(name="zeta@1"))).version
            assert (pinned.version, pinned.pinned) == (1, True)
            assert pinned.residency == pb.ADAPTER_RESIDENCY_DEVICE
            assert shell.engine.kept == [digest_of("1")]
            unpinned = (await shell.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="zeta@1"))).version
            assert (unpinned.pinned, shell.engine.kept) == (False, [])
            for name in ("alpha", "twin"):  # one digest
                await shell.adapters.PinAdapter(pb.PinAdapterRequest(name=name))
            await shell.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="alpha"))
            assert shell.engine.kept == [digest_of("9")]
            await shell.adapters.SetAlias(pb.SetAliasRequest(name="twin", alias="default", version=0))
            await shell.adapters.DeleteAdapterVersion(pb.DeleteAdapterVersionRequest(name="twin", version=1))
            assert shell.engine.kept == []

    asyncio.run(scenario())


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


async def _answer(call: Awaitable[Any]) -> Any:
    return await call


async def _read_all(download: Any) -> None:
    while await download.read() is not grpc.aio.EOF:
        continue
