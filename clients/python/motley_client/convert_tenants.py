"""Tenants, quotas and keys: Python values to protobuf requests, protobuf responses to Python values.

Owns both directions of TenantService as `convert` does those of the other services. Knows nothing of channels. Pure
functions but for the request ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from motley.v1 import tenant_pb2

from motley_client.convert_fields import checked, fill_page_size, fill_request_id, moment, timestamp
from motley_client.errors import DataLossError
from motley_client.types import Key, NewKey, Quota, Role, Tenant

_ROLES = {
    tenant_pb2.ROLE_USER: Role.USER,
    tenant_pb2.ROLE_PUBLISHER: Role.PUBLISHER,
    tenant_pb2.ROLE_WORKER: Role.WORKER,
    tenant_pb2.ROLE_ADMIN: Role.ADMIN,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_QUOTA_FIELDS = tuple(field.name for field in tenant_pb2.Quota.DESCRIPTOR.fields)


def create_tenant_request(
    tenant_id: str, display_name: str, quota: Quota | None, request_id: str | None
) -> tenant_pb2.CreateTenantRequest:
    """Make a request for a new tenant."""
    request = checked("id", tenant_pb2.CreateTenantRequest, id=tenant_id)
    request.MergeFrom(checked("display_name", tenant_pb2.CreateTenantRequest, display_name=display_name))
    if quota is not None:
        request.quota.CopyFrom(_quota_message(quota))
    fill_request_id(request, request_id)
    return request


def get_tenant_request(tenant_id: str) -> tenant_pb2.GetTenantRequest:
    """Make a request for one tenant."""
    return checked("id", tenant_pb2.GetTenantRequest, id=tenant_id)


def list_tenants_request(page_size: int | None) -> tenant_pb2.ListTenantsRequest:
    """Make a request for the first page of tenants; None leaves its size to the server."""
    request = tenant_pb2.ListTenantsRequest()
    fill_page_size(request, page_size)
    return request


def update_tenant_request(
    tenant_id: str,
    display_name: str | None,
    quota: Quota | None,
    lift: Iterable[str],
    etag: str | None,
    request_id: str | None,
) -> tenant_pb2.UpdateTenantRequest:
    """Make a request to change what is given and leave the rest."""
    request = checked("id", tenant_pb2.UpdateTenantRequest, id=tenant_id)
    request.MergeFrom(checked("display_name", tenant_pb2.UpdateTenantRequest, display_name=display_name))
    request.MergeFrom(checked("lift", tenant_pb2.UpdateTenantRequest, lift=lift))
    request.MergeFrom(checked("etag", tenant_pb2.UpdateTenantRequest, etag=etag))
    if quota is not None:
        request.quota.CopyFrom(_quota_message(quota))
    fill_request_id(request, request_id)
    return request


def delete_tenant_request(tenant_id: str, request_id: str | None) -> tenant_pb2.DeleteTenantRequest:
    """Make a request to delete a tenant."""
    request = checked("id", tenant_pb2.DeleteTenantRequest, id=tenant_id)
    fill_request_id(request, request_id)
    return request


def create_key_request(
    tenant_id: str, role: Role, expire_time: datetime | None, request_id: str | None
) -> tenant_pb2.CreateKeyRequest:
    """Make a request for a new key; None never expires.

    Raises: InvalidArgumentError for a time without a zone, which would mean another instant on another machine.
    """
    request = checked("tenant_id", tenant_pb2.CreateKeyRequest, tenant_id=tenant_id)
    request.MergeFrom(checked("role", _of_role, role=role))
    if expire_time is not None:
        request.expire_time.CopyFrom(checked("expire_time", timestamp, time=expire_time))
    fill_request_id(request, request_id)
    return request


def list_keys_request(tenant_id: str, page_size: int | None) -> tenant_pb2.ListKeysRequest:
    """Make a request for the first page of a tenant's keys; None leaves its size to the server."""
    request = checked("tenant_id", tenant_pb2.ListKeysRequest, tenant_id=tenant_id)
    fill_page_size(request, page_size)
    return request


def revoke_key_request(key_id: str, request_id: str | None) -> tenant_pb2.RevokeKeyRequest:
    """Make a request to revoke a key."""
    request = checked("key_id", tenant_pb2.RevokeKeyRequest, key_id=key_id)
    fill_request_id(request, request_id)
    return request


def tenant(message: tenant_pb2.Tenant) -> Tenant:
    """Read a tenant."""
    return Tenant(
        id=message.id,
        display_name=message.display_name,
        quota=_quota(message.quota),
        create_time=moment(message.create_time),
        etag=message.etag,
    )


def key(message: tenant_pb2.Key) -> Key:
    """Read a key."""
    return Key(
        id=message.id,
        tenant_id=message.tenant_id,
        role=_ROLES.get(message.role),
        create_time=moment(message.create_time),
        expire_time=moment(message.expire_time) if message.HasField("expire_time") else None,
        revoke_time=moment(message.revoke_time) if message.HasField("revoke_time") else None,
    )


def new_key(response: tenant_pb2.CreateKeyResponse) -> NewKey:
    """Read a key just made.

    Raises: DataLossError if the secret is gone: it was told in the answer to an earlier attempt, which never arrived.
    """
    if not response.secret:
        raise DataLossError(
            f"key {response.key.id} was made, but the answer with its secret was lost: revoke it and create another",
            reason="SECRET_LOST",
        )
    return NewKey(key(response.key), response.secret)


def _quota_message(quota: Quota) -> tenant_pb2.Quota:
    message = tenant_pb2.Quota()
    for name in _QUOTA_FIELDS:
        message.MergeFrom(checked(f"quota.{name}", tenant_pb2.Quota, **{name: getattr(quota, name)}))
    return message


def _quota(message: tenant_pb2.Quota) -> Quota:
    return Quota(**{"weight": 1.0} | {field.name: value for field, value in message.ListFields()})


def _of_role(role: Role) -> tenant_pb2.CreateKeyRequest:
    return tenant_pb2.CreateKeyRequest(role=_ROLE_NUMBERS[Role(role)])
