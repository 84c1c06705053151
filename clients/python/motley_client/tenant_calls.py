"""The calls that administer tenants and their keys, of both clients side by side.

Owns what is asked of TenantService and how lists are walked; what calls say is in `convert_tenants`, how they wait and
end in `connection`. The caller's key needs the role `admin`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from motley.v1.tenant_pb2_grpc import TenantServiceStub

from motley_client import convert_tenants as convert
from motley_client.connection import AsyncConnection, Connection
from motley_client.types import Key, NewKey, Quota, Role, Tenant

if TYPE_CHECKING:  # of the stubs alone
    from motley.v1.tenant_pb2_grpc import TenantServiceAsyncStub


class TenantCalls(Connection):
    """Administer tenants, blocking.

    Semantics: a change that meets an unavailable server is tried again under the one request id of its call, so that it
    happens once; `request_id` stands in for that id where a caller repeats a call by itself.
    """

    @cached_property
    def _tenants(self) -> TenantServiceStub:
        return TenantServiceStub(self._channel)

    def create_tenant(
        self,
        tenant_id: str,
        display_name: str = "",
        quota: Quota | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Tenant:
        """Make a tenant, without keys."""
        request = convert.create_tenant_request(tenant_id, display_name, quota, request_id)
        return convert.tenant(self._call(self._tenants.CreateTenant, request, timeout).tenant)

    def get_tenant(self, tenant_id: str, *, timeout: float | None = None) -> Tenant:
        """Return one tenant."""
        request = convert.get_tenant_request(tenant_id)
        return convert.tenant(self._call(self._tenants.GetTenant, request, timeout).tenant)

    def list_tenants(self, *, page_size: int | None = None, timeout: float | None = None) -> Iterator[Tenant]:
        """Yield every tenant, fetching a page when the iteration gets there; `timeout` is a page's."""
        request = convert.list_tenants_request(page_size)
        while True:
            response = self._call(self._tenants.ListTenants, request, timeout)
            yield from map(convert.tenant, response.tenants)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def update_tenant(
        self,
        tenant_id: str,
        *,
        display_name: str | None = None,
        quota: Quota | None = None,
        lift: Iterable[str] = (),
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Tenant:
        """Change what is given, and of the quota what is set; with `etag`, only if the tenant is as it was seen.

        Semantics: `lift` names fields of Quota that go back to no limit, or to the weight 1.
        """
        request = convert.update_tenant_request(tenant_id, display_name, quota, lift, etag, request_id)
        return convert.tenant(self._call(self._tenants.UpdateTenant, request, timeout).tenant)

    def delete_tenant(self, tenant_id: str, *, request_id: str | None = None, timeout: float | None = None) -> None:
        """Delete a tenant that owns no adapters, and its keys."""
        self._call(self._tenants.DeleteTenant, convert.delete_tenant_request(tenant_id, request_id), timeout)

    def create_key(
        self,
        tenant_id: str,
        role: Role = Role.USER,
        *,
        expire_time: datetime | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> NewKey:
        """Make a key and return it with its secret, which no later call tells again.

        Raises: DataLossError, with reason SECRET_LOST, if the key was made and the connection lost its secret.
        """
        request = convert.create_key_request(tenant_id, role, expire_time, request_id)
        return convert.new_key(self._call(self._tenants.CreateKey, request, timeout))

    def list_keys(self, tenant_id: str, *, page_size: int | None = None, timeout: float | None = None) -> Iterator[Key]:
        """Yield every key of a tenant, fetching a page when the iteration gets there; `timeout` is a page's."""
        request = convert.list_keys_request(tenant_id, page_size)
        while True:
            response = self._call(self._tenants.ListKeys, request, timeout)
            yield from map(convert.key, response.keys)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def revoke_key(self, key_id: str, *, request_id: str | None = None, timeout: float | None = None) -> Key:
        """Revoke a key, from the next request on."""
        request = convert.revoke_key_request(key_id, request_id)
        return convert.key(self._call(self._tenants.RevokeKey, request, timeout).key)


class AsyncTenantCalls(AsyncConnection):
    """Administer tenants, awaiting; each method does what its namesake of `TenantCalls` does."""

    @cached_property
    def _tenants(self) -> TenantServiceAsyncStub:
        return TenantServiceStub(self._channel)

    async def create_tenant(
        self,
        tenant_id: str,
        display_name: str = "",
        quota: Quota | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Tenant:
        """Make a tenant, without keys."""
        request = convert.create_tenant_request(tenant_id, display_name, quota, request_id)
        return convert.tenant((await self._call(self._tenants.CreateTenant, request, timeout)).tenant)

    async def get_tenant(self, tenant_id: str, *, timeout: float | None = None) -> Tenant:
        """Return one tenant."""
        request = convert.get_tenant_request(tenant_id)
        return convert.tenant((await self._call(self._tenants.GetTenant, request, timeout)).tenant)

    async def list_tenants(
        self, *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[Tenant]:
        """Yield every tenant, fetching a page when the iteration gets there; `timeout` is a page's."""
        request = convert.list_tenants_request(page_size)
        while True:
            response = await self._call(self._tenants.ListTenants, request, timeout)
            for message in response.tenants:
                yield convert.tenant(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def update_tenant(
        self,
        tenant_id: str,
        *,
        display_name: str | None = None,
        quota: Quota | None = None,
        lift: Iterable[str] = (),
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Tenant:
        """Change what is given, and of the quota what is set; with `etag`, only if the tenant is as it was seen.

        Semantics: `lift` names fields of Quota that go back to no limit, or to the weight 1.
        """
        request = convert.update_tenant_request(tenant_id, display_name, quota, lift, etag, request_id)
        return convert.tenant((await self._call(self._tenants.UpdateTenant, request, timeout)).tenant)

    async def delete_tenant(
        self, tenant_id: str, *, request_id: str | None = None, timeout: float | None = None
    ) -> None:
        """Delete a tenant that owns no adapters, and its keys."""
        await self._call(self._tenants.DeleteTenant, convert.delete_tenant_request(tenant_id, request_id), timeout)

    async def create_key(
        self,
        tenant_id: str,
        role: Role = Role.USER,
        *,
        expire_time: datetime | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> NewKey:
        """Make a key and return it with its secret, which no later call tells again.

        Raises: DataLossError, with reason SECRET_LOST, if the key was made and the connection lost its secret.
        """
        request = convert.create_key_request(tenant_id, role, expire_time, request_id)
        return convert.new_key(await self._call(self._tenants.CreateKey, request, timeout))

    async def list_keys(
        self, tenant_id: str, *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[Key]:
        """Yield every key of a tenant, fetching a page when the iteration gets there; `timeout` is a page's."""
        request = convert.list_keys_request(tenant_id, page_size)
        while True:
            response = await self._call(self._tenants.ListKeys, request, timeout)
            for message in response.keys:
                yield convert.key(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def revoke_key(self, key_id: str, *, request_id: str | None = None, timeout: float | None = None) -> Key:
        """Revoke a key, from the next request on."""
        request = convert.revoke_key_request(key_id, request_id)
        return convert.key((await self._call(self._tenants.RevokeKey, request, timeout)).key)
