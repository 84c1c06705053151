"""Between TenantService's messages and the registry's plain records.

Reads fields and nothing else: whether their values make sense is the registry's business, but for what has no plain
value at all (a role without a name, a time outside the calendar).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from motley.v1 import tenant_pb2

from motley_server.asked import Role
from motley_server.errors import InvalidArgumentError
from motley_server.registry.records import Key, Quota, Tenant

QUOTA_FIELDS: Final = tuple(field.name for field in tenant_pb2.Quota.DESCRIPTOR.fields)
ROLES: Final[Mapping[int, Role]] = MappingProxyType({
    tenant_pb2.ROLE_USER: Role.USER,
    tenant_pb2.ROLE_PUBLISHER: Role.PUBLISHER,
    tenant_pb2.ROLE_WORKER: Role.WORKER,
    tenant_pb2.ROLE_ADMIN: Role.ADMIN,
})  # fmt: skip
ROLE_NUMBERS: Final[Mapping[Role, Any]] = MappingProxyType({role: number for number, role in ROLES.items()})


def quota_from(message: tenant_pb2.Quota) -> Quota:
    """Read a quota; what is not set is no limit, or the usual weight."""
    given: dict[str, Any] = {name: getattr(message, name) for name in set_fields(message)}
    return Quota(**given)


def set_fields(message: tenant_pb2.Quota) -> list[str]:
    """Return the names of the fields that are set."""
    return [name for name in QUOTA_FIELDS if message.HasField(name)]  # type: ignore[arg-type]


def changed_fields(request: tenant_pb2.UpdateTenantRequest) -> list[str]:
    """Return the names of the quota's fields that an update sets or lifts.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, UNKNOWN_QUOTA or SET_AND_LIFTED).
    """
    if len(request.lift) > len(QUOTA_FIELDS):
        message = f"{len(request.lift)} items; {len(QUOTA_FIELDS)} are allowed"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="lift")
    fields = set_fields(request.quota)
    for index, name in enumerate(request.lift):
        if name not in QUOTA_FIELDS:
            message = f"{name[:140]!r} is no quota; these are: {', '.join(QUOTA_FIELDS)}"
            raise InvalidArgumentError(message, reason="UNKNOWN_QUOTA", field=f"lift[{index}]")
        if name in fields:
            message = f"{name!r} is set and lifted by one request"
            raise InvalidArgumentError(message, reason="SET_AND_LIFTED", field=f"lift[{index}]")
    return [*fields, *request.lift]


def quota_to(quota: Quota) -> tenant_pb2.Quota:
    """Write a quota; no limit is an unset field."""
    values: dict[str, Any] = {name: getattr(quota, name) for name in QUOTA_FIELDS}
    return tenant_pb2.Quota(**{name: value for name, value in values.items() if value is not None})


def tenant_to(tenant: Tenant) -> tenant_pb2.Tenant:
    """Write a tenant."""
    return tenant_pb2.Tenant(
        id=tenant.id,
        display_name=tenant.display_name,
        quota=quota_to(tenant.quota),
        create_time=_timestamp(tenant.created_at),
        etag=tenant.etag,
    )


def key_to(key: Key) -> tenant_pb2.Key:
    """Write a key, which has no secret here."""
    return tenant_pb2.Key(
        id=key.id,
        tenant_id=key.tenant_id,
        role=ROLE_NUMBERS[key.role],
        create_time=_timestamp(key.created_at),
        expire_time=_timestamp(key.expires_at),
        revoke_time=_timestamp(key.revoked_at),
    )


def role_from(number: int) -> Role:
    """Read a role.

    Raises: InvalidArgumentError (reason=ROLE_REQUIRED) for the one that means none.
    """
    if number not in ROLES:
        raise InvalidArgumentError("say what the key may do", reason="ROLE_REQUIRED", field="role")
    return ROLES[number]


def expiry_from(request: tenant_pb2.CreateKeyRequest) -> datetime | None:
    """Read when a key shall expire; None is never.

    Raises: InvalidArgumentError (reason=INVALID_EXPIRY) for what is no time.
    """
    if not request.HasField("expire_time"):
        return None
    try:
        return request.expire_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        message = "a time between the years 1 and 9999, with nanos from 0 to 999999999"
        raise InvalidArgumentError(message, reason="INVALID_EXPIRY", field="expire_time") from error


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
