"""A TenantService in memory: keeps its promises of pages, etags and request ids, and loses answers when told to."""

# ruff: noqa: N802 (the methods are named by the service)

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import grpc
from certificates import Certificates
from fake_motley_server import rich_status
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from motley.v1 import tenant_pb2
from motley.v1.tenant_pb2_grpc import TenantServiceServicer, add_TenantServiceServicer_to_server

FIRST_SECOND = 1_800_000_000  # everything happens a second after what came before
DEFAULT_PAGE = 2

_Response = TypeVar("_Response", bound=Message)


def refusal(code: grpc.StatusCode, reason: str, field: str = "") -> status_pb2.Status:
    """Make the status of a typed error, as a server sends it."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="motley.dev", metadata={"field": field} if field else {})
    return rich_status(code, f"{reason} it is", info)


class FakeTenantService(TenantServiceServicer):
    """Keep tenants and keys.

    Semantics: `refusals` are taken one a call, before anything is done; `losses` counts the calls whose answer is lost
    after everything is done. A repeated request id gets the first answer, but for a secret.
    """

    def __init__(self) -> None:
        self.tenants: dict[str, tenant_pb2.Tenant] = {}
        self.keys: dict[str, tenant_pb2.Key] = {}
        self.calls: list[tuple[str, Any]] = []
        self.credentials: list[str | None] = []
        self.refusals: list[status_pb2.Status] = []
        self.losses = 0
        self._answers: dict[str, Message] = {}
        self._seconds = FIRST_SECOND

    def _do(self, name: str, request: Any, context: Any, act: Callable[[], _Response]) -> _Response:
        self.calls.append((name, request))
        self.credentials.append(dict(context.invocation_metadata()).get("authorization"))
        if self.refusals:
            self._abort(context, self.refusals.pop(0))
        request_id = getattr(request, "request_id", "")
        answer: Any = self._answers.get(request_id) or act()
        if request_id and request_id not in self._answers:
            self._answers[request_id] = type(answer).FromString(answer.SerializeToString())
            if isinstance(answer, tenant_pb2.CreateKeyResponse):
                self._answers[request_id].ClearField("secret")
        if self.losses:
            self.losses -= 1
            self._abort(context, rich_status(grpc.StatusCode.UNAVAILABLE, "cut off"))
        return answer  # type: ignore[no-any-return]

    def _abort(self, context: Any, status: status_pb2.Status) -> None:
        if status.details:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(next(code for code in grpc.StatusCode if code.value[0] == status.code), status.message)

    def _tenant(self, context: Any, tenant_id: str) -> tenant_pb2.Tenant:
        if tenant_id not in self.tenants:
            self._abort(context, refusal(grpc.StatusCode.NOT_FOUND, "TENANT_NOT_FOUND", "id"))
        return self.tenants[tenant_id]

    def _now(self) -> int:
        self._seconds += 1
        return self._seconds

    def CreateTenant(self, request: tenant_pb2.CreateTenantRequest, context: Any) -> tenant_pb2.CreateTenantResponse:
        def act() -> tenant_pb2.CreateTenantResponse:
            if request.id in self.tenants:
                self._abort(context, refusal(grpc.StatusCode.ALREADY_EXISTS, "TENANT_EXISTS", "id"))
            tenant = tenant_pb2.Tenant(id=request.id, display_name=request.display_name, quota=request.quota)
            tenant.create_time.FromSeconds(self._now())
            tenant.etag = "etag-1"
            self.tenants[request.id] = tenant
            return tenant_pb2.CreateTenantResponse(tenant=tenant)

        return self._do("CreateTenant", request, context, act)

    def GetTenant(self, request: tenant_pb2.GetTenantRequest, context: Any) -> tenant_pb2.GetTenantResponse:
        return self._do(
            "GetTenant",
            request,
            context,
            lambda: tenant_pb2.GetTenantResponse(tenant=self._tenant(context, request.id)),
        )

    def ListTenants(self, request: tenant_pb2.ListTenantsRequest, context: Any) -> tenant_pb2.ListTenantsResponse:
        def act() -> tenant_pb2.ListTenantsResponse:
            names, token = _page(sorted(self.tenants), request)
            return tenant_pb2.ListTenantsResponse(tenants=[self.tenants[name] for name in names], next_page_token=token)

        return self._do("ListTenants", request, context, act)

    def UpdateTenant(self, request: tenant_pb2.UpdateTenantRequest, context: Any) -> tenant_pb2.UpdateTenantResponse:
        def act() -> tenant_pb2.UpdateTenantResponse:
            tenant = self._tenant(context, request.id)
            if request.HasField("etag") and request.etag != tenant.etag:
                self._abort(context, refusal(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"))
            if request.HasField("display_name"):
                tenant.display_name = request.display_name
            tenant.quota.MergeFrom(request.quota)
            for name in request.lift:
                tenant.quota.ClearField(cast(Any, name))
            tenant.etag = f"etag-{int(tenant.etag.removeprefix('etag-')) + 1}"
            return tenant_pb2.UpdateTenantResponse(tenant=tenant)

        return self._do("UpdateTenant", request, context, act)

    def DeleteTenant(self, request: tenant_pb2.DeleteTenantRequest, context: Any) -> tenant_pb2.DeleteTenantResponse:
        def act() -> tenant_pb2.DeleteTenantResponse:
            self._tenant(context, request.id)
            del self.tenants[request.id]
            return tenant_pb2.DeleteTenantResponse()

        return self._do("DeleteTenant", request, context, act)

    def CreateKey(self, request: tenant_pb2.CreateKeyRequest, context: Any) -> tenant_pb2.CreateKeyResponse:
        def act() -> tenant_pb2.CreateKeyResponse:
            self._tenant(context, request.tenant_id)
            key = tenant_pb2.Key(id=f"k{len(self.keys)}", tenant_id=request.tenant_id, role=request.role)
            key.create_time.FromSeconds(self._now())
            if request.HasField("expire_time"):
                key.expire_time.CopyFrom(request.expire_time)
            self.keys[key.id] = key
            return tenant_pb2.CreateKeyResponse(key=key, secret=f"mk_{key.id}_hush")

        return self._do("CreateKey", request, context, act)

    def ListKeys(self, request: tenant_pb2.ListKeysRequest, context: Any) -> tenant_pb2.ListKeysResponse:
        def act() -> tenant_pb2.ListKeysResponse:
            self._tenant(context, request.tenant_id)
            names, token = _page([key.id for key in self.keys.values() if key.tenant_id == request.tenant_id], request)
            return tenant_pb2.ListKeysResponse(keys=[self.keys[name] for name in names], next_page_token=token)

        return self._do("ListKeys", request, context, act)

    def RevokeKey(self, request: tenant_pb2.RevokeKeyRequest, context: Any) -> tenant_pb2.RevokeKeyResponse:
        def act() -> tenant_pb2.RevokeKeyResponse:
            if request.key_id not in self.keys:
                self._abort(context, refusal(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "key_id"))
            self.keys[request.key_id].revoke_time.FromSeconds(self._now())
            return tenant_pb2.RevokeKeyResponse(key=self.keys[request.key_id])

        return self._do("RevokeKey", request, context, act)


def _page(
    names: list[str], request: tenant_pb2.ListTenantsRequest | tenant_pb2.ListKeysRequest
) -> tuple[list[str], str]:
    start = int(request.page_token or 0)
    end = start + (request.page_size or DEFAULT_PAGE)
    return names[start:end], str(end) if end < len(names) else ""


@contextmanager
def serving_tenants(fake: FakeTenantService, certificates: Certificates | None = None) -> Iterator[str]:
    """Serve on loopback while the block runs, by TLS where there are certificates; yield the address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    add_TenantServiceServicer_to_server(fake, server)
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (certificates.server_key.read_bytes(), certificates.server.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(timeout=10)
