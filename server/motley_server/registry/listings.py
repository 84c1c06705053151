"""What a tenant sees of the adapters that it may use: one of them, all by pages, and the versions of one by pages.

Versions on pages are without their ranks and files, which are empty there. It reads, and changes nothing. It runs
inside transactions that others began, on the database's threads.
"""

from __future__ import annotations

from sqlalchemy import Connection, and_, or_, select

from motley_server.registry import pages
from motley_server.registry.adapter_rows import records_of, version_seen_by
from motley_server.registry.filters import conditions_of
from motley_server.registry.names import is_name
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterRecord, AdapterVersion, Page
from motley_server.registry.schema import adapter_versions, adapters
from motley_server.registry.visibility import BRIEF_COLUMNS, is_of, latest_seen_by


def require_visible(connection: Connection, tenant_id: str, owner: str, name: str) -> AdapterRecord:
    """Return an adapter that a tenant may use.

    Raises: NotFoundError (reason=ADAPTER_NOT_FOUND).
    """
    row = None
    if is_name(owner) and is_name(name):
        query = latest_seen_by(tenant_id).where(is_of(adapters, owner, name))
        row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise adapter_not_found(name if owner == tenant_id else f"{owner}/{name}", "name")
    return records_of(connection, [row], tenant_id)[0]


def page_of_adapters(
    connection: Connection, page_secret: bytes, tenant_id: str, page_size: int, page_token: str, filter: str
) -> Page[AdapterRecord]:
    """Return the next adapters that a tenant may use, by owner and name.

    Raises: InvalidArgumentError (reason=BAD_FILTER, BAD_PAGE_TOKEN or OUT_OF_RANGE).
    """
    size = pages.page_size(page_size)
    conditions = conditions_of(filter)
    listing = f"adapters of {tenant_id} where {filter}"
    position = pages.decode_position(page_secret, listing, page_token)
    query = latest_seen_by(tenant_id, BRIEF_COLUMNS).where(*conditions)
    query = query.order_by(adapters.c.owner, adapters.c.name).limit(size + 1)
    if position is not None:
        owner, name = position
        same_owner = and_(adapters.c.owner == owner, adapters.c.name > name)
        query = query.where(or_(adapters.c.owner > owner, same_owner))
    rows = connection.execute(query).mappings().all()
    found = tuple(records_of(connection, rows[:size], tenant_id))
    if len(rows) <= size:
        return Page(found, "")
    return Page(found, pages.encode_position(page_secret, listing, [found[-1].owner, found[-1].name]))


def page_of_versions(
    connection: Connection, page_secret: bytes, tenant_id: str, owner: str, name: str, page_size: int, page_token: str
) -> Page[AdapterVersion]:
    """Return the next versions of an adapter, the newest first; whoever calls has looked whether they may be seen.

    Raises: InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
    """
    size = pages.page_size(page_size)
    listing = f"versions of {owner}/{name}"
    position = pages.decode_position(page_secret, listing, page_token)
    query = select(*BRIEF_COLUMNS).where(is_of(adapter_versions, owner, name))
    query = query.order_by(adapter_versions.c.version.desc()).limit(size + 1)
    if position is not None:
        query = query.where(adapter_versions.c.version < position[0])
    found = tuple(version_seen_by(tenant_id, row) for row in connection.execute(query).mappings())
    if len(found) <= size:
        return Page(found, "")
    return Page(found[:size], pages.encode_position(page_secret, listing, [found[size - 1].version]))
