"""TenantService: tenants, their quotas and their keys, for admins.

Reads a request, has the registry do it on the database's thread, and writes the answer. Who may call is decided before
(`access.py`). Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from motley.v1 import tenant_pb2, tenant_pb2_grpc

from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.tenants import Tenants
from motley_server.rpc.call import current_caller
from motley_server.rpc.convert_tenants import changed_fields, expiry_from, key_to, quota_from, role_from, tenant_to
from motley_server.rpc.identity import TenantQuotas

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class TenantRegistry:
    """Who is kept, and where."""

    database: Database
    tenants: Tenants
    keys: Keys
    quotas: TenantQuotas


class TenantService(tenant_pb2_grpc.TenantServiceServicer):
    """Administer tenants, keys and quotas."""

    def __init__(self, registry: TenantRegistry, check_open: Callable[[], None]) -> None:
        self._run = registry.database.run
        self._tenants = registry.tenants
        self._keys = registry.keys
        self._quotas = registry.quotas
        self._check_open = check_open

    async def CreateTenant(  # noqa: N802
        self, request: tenant_pb2.CreateTenantRequest, context: Context
    ) -> tenant_pb2.CreateTenantResponse:
        """Make a tenant."""
        tenant = await self._run(
            self._tenants.create, request.id, request.display_name, quota_from(request.quota), **self._once(request)
        )
        return tenant_pb2.CreateTenantResponse(tenant=tenant_to(tenant))

    async def GetTenant(  # noqa: N802
        self, request: tenant_pb2.GetTenantRequest, context: Context
    ) -> tenant_pb2.GetTenantResponse:
        """Return a tenant."""
        self._check_open()
        return tenant_pb2.GetTenantResponse(tenant=tenant_to(await self._run(self._tenants.get, request.id)))

    async def ListTenants(  # noqa: N802
        self, request: tenant_pb2.ListTenantsRequest, context: Context
    ) -> tenant_pb2.ListTenantsResponse:
        """Return tenants by pages."""
        self._check_open()
        page = await self._run(self._tenants.list, request.page_size, request.page_token)
        return tenant_pb2.ListTenantsResponse(
            tenants=[tenant_to(tenant) for tenant in page.items], next_page_token=page.next_page_token
        )

    async def UpdateTenant(  # noqa: N802
        self, request: tenant_pb2.UpdateTenantRequest, context: Context
    ) -> tenant_pb2.UpdateTenantResponse:
        """Change a tenant's name, or those of its quotas that are set or lifted."""
        fields = changed_fields(request)
        tenant = await self._run(
            self._tenants.update,
            request.id,
            display_name=request.display_name if request.HasField("display_name") else None,
            quota=quota_from(request.quota) if fields else None,
            quota_fields=fields,
            etag=request.etag if request.HasField("etag") else None,
            **self._once(request),
        )
        self._quotas.forget(tenant.id)
        return tenant_pb2.UpdateTenantResponse(tenant=tenant_to(tenant))

    async def DeleteTenant(  # noqa: N802
        self, request: tenant_pb2.DeleteTenantRequest, context: Context
    ) -> tenant_pb2.DeleteTenantResponse:
        """Delete a tenant and its keys."""
        await self._run(self._tenants.delete, request.id, **self._once(request))
        self._quotas.forget(request.id)
        return tenant_pb2.DeleteTenantResponse()

    async def CreateKey(  # noqa: N802
        self, request: tenant_pb2.CreateKeyRequest, context: Context
    ) -> tenant_pb2.CreateKeyResponse:
        """Make a key and show its secret this once."""
        role, expires_at = role_from(request.role), expiry_from(request)
        key, secret = await self._run(self._keys.create, request.tenant_id, role, expires_at, **self._once(request))
        return tenant_pb2.CreateKeyResponse(key=key_to(key), secret=secret)

    async def ListKeys(  # noqa: N802
        self, request: tenant_pb2.ListKeysRequest, context: Context
    ) -> tenant_pb2.ListKeysResponse:
        """Return a tenant's keys by pages, without secrets."""
        self._check_open()
        page = await self._run(self._keys.list, request.tenant_id, request.page_size, request.page_token)
        return tenant_pb2.ListKeysResponse(
            keys=[key_to(key) for key in page.items], next_page_token=page.next_page_token
        )

    async def RevokeKey(  # noqa: N802
        self, request: tenant_pb2.RevokeKeyRequest, context: Context
    ) -> tenant_pb2.RevokeKeyResponse:
        """Revoke a key, from the next call on."""
        key = await self._run(self._keys.revoke, request.key_id, **self._once(request))
        return tenant_pb2.RevokeKeyResponse(key=key_to(key))

    def _once(self, request: Any) -> dict[str, str]:
        """Return what makes a change happen once: its id, in the namespace of the caller's tenant."""
        self._check_open()
        return {"request_id": request.request_id, "scope": current_caller().tenant_id}
