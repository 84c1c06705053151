"""A TenantService in memory: keeps its promises of pages, etags and request ids, and loses answers when told to."""

# ruff: noqa: N802 (the methods are named by the service)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import grpc
from certificates import Certificates
from fake_service import FIRST_SECOND, FakeService, page, refusal, serving_service
from google.protobuf.message import Message
from motley.v1 import tenant_pb2
from motley.v1.tenant_pb2_grpc import TenantServiceServicer, add_TenantServiceServicer_to_server

__all__ = ["FIRST_SECOND", "FakeTenantService", "refusal", "serving_tenants"]


class FakeTenantService(FakeService, TenantServiceServicer):
    """Keep tenants and keys; a repeated request id gets the first answer, but for a secret."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants: dict[str, tenant_pb2.Tenant] = {}
        self.keys: dict[str, tenant_pb2.Key] = {}

    def _remembered(self, answer: Message) -> Message:
        if isinstance(answer, tenant_pb2.CreateKeyResponse):
            answer.ClearField("secret")
        return answer

    def _tenant(self, context: Any, tenant_id: str) -> tenant_pb2.Tenant:
        if tenant_id not in self.tenants:
            self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "TENANT_NOT_FOUND", "id"))
        return self.tenants[tenant_id]

    def CreateTenant(self, request: tenant_pb2.CreateTenantRequest, context: Any) -> tenant_pb2.CreateTenantResponse:
        def act() -> tenant_pb2.CreateTenantResponse:
            if request.id in self.tenants:
                self.abort(context, refusal(grpc.StatusCode.ALREADY_EXISTS, "TENANT_EXISTS", "id"))
            tenant = tenant_pb2.Tenant(id=request.id, display_name=request.display_name, quota=request.quota)
            tenant.create_time.FromSeconds(self.now())
            tenant.etag = "etag-1"
            self.tenants[request.id] = tenant
            return tenant_pb2.CreateTenantResponse(tenant=tenant)

        return self.do("CreateTenant", request, context, act)

    def GetTenant(self, request: tenant_pb2.GetTenantRequest, context: Any) -> tenant_pb2.GetTenantResponse:
        return self.do(
            "GetTenant",
            request,
            context,
            lambda: tenant_pb2.GetTenantResponse(tenant=self._tenant(context, request.id)),
        )

    def ListTenants(self, request: tenant_pb2.ListTenantsRequest, context: Any) -> tenant_pb2.ListTenantsResponse:
        def act() -> tenant_pb2.ListTenantsResponse:
            names, token = page(sorted(self.tenants), request)
            return tenant_pb2.ListTenantsResponse(tenants=[self.tenants[name] for name in names], next_page_token=token)

        return self.do("ListTenants", request, context, act)

    def UpdateTenant(self, request: tenant_pb2.UpdateTenantRequest, context: Any) -> tenant_pb2.UpdateTenantResponse:
        def act() -> tenant_pb2.UpdateTenantResponse:
            tenant = self._tenant(context, request.id)
            if request.HasField("etag") and request.etag != tenant.etag:
                self.abort(context, refusal(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"))
            if request.HasField("display_name"):
                tenant.display_name = request.display_name
            tenant.quota.MergeFrom(request.quota)
            for name in request.lift:
                tenant.quota.ClearField(cast(Any, name))
            tenant.etag = f"etag-{int(tenant.etag.removeprefix('etag-')) + 1}"
            return tenant_pb2.UpdateTenantResponse(tenant=tenant)

        return self.do("UpdateTenant", request, context, act)

    def DeleteTenant(self, request: tenant_pb2.DeleteTenantRequest, context: Any) -> tenant_pb2.DeleteTenantResponse:
        def act() -> tenant_pb2.DeleteTenantResponse:
            self._tenant(context, request.id)
            del self.tenants[request.id]
            return tenant_pb2.DeleteTenantResponse()

        return self.do("DeleteTenant", request, context, act)

    def CreateKey(self, request: tenant_pb2.CreateKeyRequest, context: Any) -> tenant_pb2.CreateKeyResponse:
        def act() -> tenant_pb2.CreateKeyResponse:
            self._tenant(context, request.tenant_id)
            key = tenant_pb2.Key(id=f"k{len(self.keys)}", tenant_id=request.tenant_id, role=request.role)
            key.create_time.FromSeconds(self.now())
            if request.HasField("expire_time"):
                key.expire_time.CopyFrom(request.expire_time)
            self.keys[key.id] = key
            return tenant_pb2.CreateKeyResponse(key=key, secret=f"mk_{key.id}_hush")

        return self.do("CreateKey", request, context, act)

    def ListKeys(self, request: tenant_pb2.ListKeysRequest, context: Any) -> tenant_pb2.ListKeysResponse:
        def act() -> tenant_pb2.ListKeysResponse:
            self._tenant(context, request.tenant_id)
            names, token = page([key.id for key in self.keys.values() if key.tenant_id == request.tenant_id], request)
            return tenant_pb2.ListKeysResponse(keys=[self.keys[name] for name in names], next_page_token=token)

        return self.do("ListKeys", request, context, act)

    def RevokeKey(self, request: tenant_pb2.RevokeKeyRequest, context: Any) -> tenant_pb2.RevokeKeyResponse:
        def act() -> tenant_pb2.RevokeKeyResponse:
            if request.key_id not in self.keys:
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "key_id"))
            self.keys[request.key_id].revoke_time.FromSeconds(self.now())
            return tenant_pb2.RevokeKeyResponse(key=self.keys[request.key_id])

        return self.do("RevokeKey", request, context, act)


@contextmanager
def serving_tenants(fake: FakeTenantService, certificates: Certificates | None = None) -> Iterator[str]:
    """Serve on loopback while the block runs, by TLS where there are certificates; yield the address."""
    with serving_service(add_TenantServiceServicer_to_server, fake, certificates) as address:
        yield address
