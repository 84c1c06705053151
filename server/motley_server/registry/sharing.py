"""Sharing: who besides its owner may use an adapter, all of its versions alike.

A share is with a tenant that is there, and goes with it, so that nobody inherits it by taking its name. It knows no
ownership: whoever calls has looked. It runs inside transactions that others began, on the database's threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, select, update

from motley_server.errors import InvalidArgumentError
from motley_server.registry.records import Visibility
from motley_server.registry.schema import adapters, shares, tenants
from motley_server.registry.tenants import tenant_not_found
from motley_server.registry.visibility import is_of

MAX_TENANTS = 1000


def check_sharing(owner: str, visibility: Visibility, tenant_ids: Sequence[str]) -> None:
    """Refuse tenants without Visibility.TENANTS, that without tenants, too many, twice one, and the owner.

    Raises: InvalidArgumentError (reason=INVALID_SHARING).
    """
    if visibility is not Visibility.TENANTS:
        problem = "tenants are named for VISIBILITY_TENANTS only" if tenant_ids else ""
    elif not 0 < len(tenant_ids) <= MAX_TENANTS:
        problem = f"it takes 1 to {MAX_TENANTS} tenants to share with, not {len(tenant_ids)}"
    elif len(set(tenant_ids)) < len(tenant_ids):
        problem = "a tenant is named twice"
    else:
        problem = "the owner need not be named" if owner in tenant_ids else ""
    if problem:
        raise InvalidArgumentError(problem, reason="INVALID_SHARING", field="tenants")


def share_adapter(
    connection: Connection, owner: str, name: str, visibility: Visibility, tenant_ids: Sequence[str] = ()
) -> None:
    """Replace who may use an adapter.

    Raises: NotFoundError (reason=TENANT_NOT_FOUND).
    """
    named = [id for id in tenant_ids if id.isprintable()]  # the others are nobody, and PostgreSQL refuses some
    known = set(connection.execute(select(tenants.c.id).where(tenants.c.id.in_(named))).scalars())
    for number, tenant_id in enumerate(tenant_ids):
        if tenant_id not in known:
            raise tenant_not_found(tenant_id, f"tenants[{number}]")
    connection.execute(delete(shares).where(is_of(shares, owner, name)))
    connection.execute(update(adapters).where(is_of(adapters, owner, name)).values(visibility=visibility.value))
    if tenant_ids:
        rows = [{"owner": owner, "name": name, "tenant": tenant_id} for tenant_id in tenant_ids]
        connection.execute(shares.insert(), rows)
