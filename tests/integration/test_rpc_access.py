"""Every RPC there is, called by everybody who may not: without a key, with a bad one, and in each wrong role."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import grpc
import motley.v1
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from motley_server.asked import Role
from motley_server.errors import PermissionDeniedError
from motley_server.registry.records import Quota, Visibility
from motley_server.rpc.access import OPEN_METHODS, RULES, check_roles
from rpc_harness import Refusal, Shell, read_refusal, serving
from training_calls import lease, queue, register

Code = grpc.StatusCode
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METADATA = Mapping[str, str]
NO_KEY: METADATA = MappingProxyType({})
BAD_KEY: METADATA = MappingProxyType({"authorization": "Bearer mk_0123456789abcdef_" + "x" * 43})


def find_rpcs() -> dict[str, MethodDescriptor]:
    """Return every method of every service of `motley.v1`, by its name on the wire."""
    names = [one.name for one in pkgutil.iter_modules(motley.v1.__path__) if one.name.endswith("_pb2")]
    files = [importlib.import_module(f"motley.v1.{name}").DESCRIPTOR for name in names]
    return {
        f"/{service.full_name}/{method.name}": method
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


RPCS = find_rpcs()

# By hand, so that a slip in the server's table is seen: what each role may do, `Service` or `Service/Method`.
USERS = {
    "InferenceService", "ServerService/GetServerInfo", "ServerService/GetCapacity", "AdapterService/GetAdapter",
    "AdapterService/ListAdapters", "AdapterService/ListAdapterVersions",
}  # fmt: skip
WORKERS = {"WorkerService/RegisterWorker", "WorkerService/LeaseJob"}
MAY: Mapping[Role, set[str]] = {
    Role.USER: USERS,
    Role.PUBLISHER: USERS | {"AdapterService", "TrainingService"},
    Role.WORKER: {"ServerService/GetServerInfo", "ServerService/GetCapacity"} | WORKERS,
    Role.ADMIN: {"InferenceService", "AdapterService", "ServerService", "TenantService", "TrainingService"} | WORKERS,
}
MAY_BY_LEASE = {
    "AdapterService/UploadAdapter", "AdapterService/GetUpload", "AdapterService/AbortUpload",
    "AdapterService/DownloadAdapter", "ServerService/GetServerInfo", "WorkerService/FetchDataset",
    "WorkerService/ReportJob",
}  # fmt: skip


def may(role: Role, method: str) -> bool:
    name = method.removeprefix("/motley.v1.")
    return name in MAY[role] or name.partition("/")[0] in MAY[role]


async def call(shell: Shell, method: str, metadata: METADATA, request: Any = None) -> Refusal | None:
    """Call a method, with an empty request unless another is given, and return how it was refused."""
    described = RPCS[method]
    request = GetMessageClass(described.input_type)() if request is None else request
    kinds = {
        (False, False): shell.channel.unary_unary, (False, True): shell.channel.unary_stream,
        (True, False): shell.channel.stream_unary, (True, True): shell.channel.stream_stream,
    }  # fmt: skip
    make: Any = kinds[described.client_streaming, described.server_streaming]
    stub = make(method, request_serializer=lambda message: message.SerializeToString())
    made = stub(iter([request]) if described.client_streaming else request, metadata=tuple(metadata.items()))
    try:
        await (made.read() if described.server_streaming else made)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    return None


async def bearer(shell: Shell, role: Role, tenant_id: str = "local") -> METADATA:
    _, text = await shell.registry.database.run(shell.registry.keys.create, tenant_id, role)
    return {"authorization": f"Bearer {text}"}


def test_the_table_names_every_rpc_and_no_other() -> None:
    assert set(RULES) == set(RPCS) | {REFLECTION}
    assert all(rule.roles or rule.takes_lease for rule in RULES.values())
    methods = health_pb2.DESCRIPTOR.services_by_name["Health"].methods
    assert {f"/grpc.health.v1.Health/{method.name}" for method in methods} == OPEN_METHODS


def test_a_method_that_no_table_names_is_for_nobody() -> None:
    with pytest.raises(PermissionDeniedError, match="needs what no role has"):
        check_roles("/motley.v1.TenantService/ForgottenInTheTable", frozenset(Role))


@pytest.mark.parametrize("method", RPCS)
def test_nobody_calls_an_rpc_without_a_good_key(method: str) -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            for metadata, reason in ((NO_KEY, "KEY_REQUIRED"), (BAD_KEY, "INVALID_KEY")):
                refusal = await call(shell, method, metadata)
                assert refusal is not None
                assert (refusal.code, refusal.reason, refusal.field) == (Code.UNAUTHENTICATED, reason, "")
            assert shell.engine.submitted == []
            assert not shell.rpc.lifecycle.has_begun

    asyncio.run(scenario())


@pytest.mark.parametrize("method", RPCS)
def test_an_rpc_takes_the_right_roles_and_refuses_the_others_by_name(method: str) -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            # The admin comes last, whose Drain ends it all.
            for role in (Role.USER, Role.PUBLISHER, Role.WORKER, Role.ADMIN):
                refusal = await call(shell, method, await bearer(shell, role))
                if may(role, method):
                    assert refusal is None or refusal.code not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED)
                    continue
                assert refusal is not None
                needed = [one.value for one in Role if may(one, method)]
                reason, what = "WRONG_ROLE", f"a key of role {' or '.join(needed)}"
                if not needed:
                    reason, what = "LEASE_REQUIRED", "the token of a lease"
                assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, reason)
                assert refusal.message == f"{method[1:]} needs {what}"

    asyncio.run(scenario())


def test_a_lease_opens_what_it_must_and_nothing_else_whatever_its_roles() -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            await run_a_job(shell)
            worker = await bearer(shell, Role.WORKER)
            await register(shell, metadata=tuple(worker.items()))
            held = await lease(shell, metadata=tuple(worker.items()))
            assert held is not None
            token = {"authorization": f"Bearer {held.token}"}
            for method in RPCS:
                refusal = await call(shell, method, token)
                is_open = method.removeprefix("/motley.v1.") in MAY_BY_LEASE
                is_refused = (
                    refusal is not None and refusal.reason == "OUTSIDE_LEASE" and "does not open" in refusal.message
                )
                assert is_refused is not is_open, method
            assert not shell.rpc.lifecycle.has_begun

    async def run_a_job(shell: Shell) -> None:
        await queue(shell, metadata=tuple((await bearer(shell, Role.PUBLISHER)).items()))

    asyncio.run(scenario())


BAD_TOKEN: METADATA = MappingProxyType({"authorization": "Bearer mj_0123456789abcdef_" + "x" * 43})


@pytest.mark.parametrize("auth", [True, False])
def test_what_looks_like_a_token_is_refused_with_one_text_whatever_is_wrong(auth: bool) -> None:
    async def scenario() -> None:
        async with serving(auth=auth) as shell:
            texts = set()
            for text in ("mj_", "mj_0123456789abcdef_short", BAD_TOKEN["authorization"].split()[1]):
                for method in ("/motley.v1.WorkerService/ReportJob", "/motley.v1.TenantService/ListTenants"):
                    refusal = await call(shell, method, {"authorization": f"Bearer {text}"})
                    assert refusal is not None
                    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "LEASE_ENDED")
                    texts.add(refusal.message)
            assert len(texts) == 1

    asyncio.run(scenario())


PLAUSIBLE: Mapping[str, Any] = MappingProxyType({
    "text": "a", "continuations": ["b"], "alias": "default", "version": 1, "visibility": 3, "sha256": "0" * 64,
    "size_bytes": 1,
})  # fmt: skip


def naming(message: Any, adapter: str, upload_id: str) -> bool:
    """Fill a request with plausible values and these names wherever it can name something; False if it cannot."""
    names_something = False
    for field in message.DESCRIPTOR.fields:
        is_message = field.message_type is not None
        if field.full_name == "motley.v1.UploadFile.name":
            message.name = "adapter_config.json"
        elif field.name in ("name", "adapter_name") and not is_message:
            setattr(message, field.name, adapter)
            names_something = True
        elif field.name == "upload_id":
            message.upload_id = upload_id
            names_something = True
        elif field.name in PLAUSIBLE and field.is_repeated:
            getattr(message, field.name).extend(PLAUSIBLE[field.name])
        elif field.name in PLAUSIBLE:
            setattr(message, field.name, PLAUSIBLE[field.name])
        elif field.name in ("header", "prompt"):
            names_something |= naming(getattr(message, field.name), adapter, upload_id)
        elif field.name in ("adapters", "files"):
            names_something |= naming(getattr(message, field.name).add(), adapter, upload_id)
    return names_something


def requests_that_name(adapter: str, upload_id: str) -> dict[str, Any]:
    """Return a request of every method that names an adapter or an upload."""
    requests = {
        method: GetMessageClass(described.input_type)()
        for method, described in RPCS.items()
        if described.containing_service.name in ("InferenceService", "AdapterService")
    }
    return {method: request for method, request in requests.items() if naming(request, adapter, upload_id)}


NAMING = sorted(requests_that_name("a", "a"))


def test_only_lists_and_tokens_name_nothing() -> None:
    services = ("InferenceService", "AdapterService")
    silent = {method for method, one in RPCS.items() if one.containing_service.name in services} - set(NAMING)
    assert {method.rpartition("/")[2] for method in silent} == {"ListAdapters", "Tokenize", "Detokenize"}


@pytest.mark.parametrize("method", NAMING)
def test_what_another_tenant_owns_is_met_in_the_words_for_what_is_not_there(method: str) -> None:
    async def scenario() -> None:
        async with serving(auth=True) as shell:
            run, registry = shell.registry.database.run, shell.library.registry
            await run(shell.registry.tenants.create, "acme")
            publisher = await bearer(shell, Role.PUBLISHER, "acme")
            await run(registry.uploads.begin, "local", "begun", "zeta", 10, Quota())
            met = []
            for adapter, upload_id in (("local/zeta", "begun"), ("local/atez", "nuged"), ("lacol/zeta", "begnu")):
                request = requests_that_name(adapter, upload_id)[method]
                refusal = await call(shell, method, publisher, request)
                assert refusal is not None
                met.append((refusal.code, refusal.reason, refusal.field, refusal.message.replace(adapter, "NAME")))
            assert met == [met[0]] * 3
            assert met[0][:2] in ((Code.NOT_FOUND, "ADAPTER_NOT_FOUND"), (Code.NOT_FOUND, "UPLOAD_NOT_FOUND"))
            assert (await run(registry.uploads.get, "local", "begun")).size_bytes == 10
            kept = await run(registry.adapters.get, "local", "local", "zeta")
            assert [(one.alias, one.version) for one in kept.aliases] == [("default", 2)]
            assert (kept.visibility, kept.latest.version) == (Visibility.PRIVATE, 2)
            assert shell.engine.submitted == []

    asyncio.run(scenario())


def test_probes_need_no_key_and_reflection_does() -> None:
    async def reflected(shell: Shell, metadata: METADATA) -> Any:
        stub = reflection_pb2_grpc.ServerReflectionStub(shell.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        return await stub.ServerReflectionInfo(iter([request]), metadata=tuple(metadata.items())).read()

    async def scenario() -> None:
        async with serving(auth=True) as shell:
            health = health_pb2_grpc.HealthStub(shell.channel)
            for metadata in (NO_KEY, BAD_KEY):
                answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=tuple(metadata.items()))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await reflected(shell, metadata)
                assert caught.value.code() is Code.UNAUTHENTICATED
            listed = await reflected(shell, await bearer(shell, Role.WORKER))
            names = {one.name for one in listed.list_services_response.service}
            assert names > {method.containing_service.full_name for method in RPCS.values()}

    asyncio.run(scenario())
