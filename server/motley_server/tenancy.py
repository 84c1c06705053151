"""Tenants and keys as the server starts: their registry opened, and the first key of all.

It knows the configuration and the registry, not how callers show their keys. Runs on the event loop's thread.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass

from motley_server.asked import Role
from motley_server.audit import ControlAction, write_down
from motley_server.config import ServerConfig
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.names import LOCAL_TENANT
from motley_server.registry.tenants import Tenants

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Who is kept, and where."""

    database: Database
    tenants: Tenants
    keys: Keys


def open_tenancy(config: ServerConfig) -> Tenancy:
    """Open the registry that the configuration names, and make it if it is not there.

    Raises: DatabaseError; OSError if the data directory cannot be made.
    """
    if not config.database:
        config.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database.open(config.database_url)
    return Tenancy(database, Tenants(database), Keys(database))


async def first_admin_key(tenancy: Tenancy) -> str | None:
    """Make a key for the first admin, and return its text; None if there is an admin's key already.

    Semantics: whoever loses the text makes another key from this machine, without `auth`.
    """
    database, keys = tenancy.database, tenancy.keys
    if await database.run(keys.has_admin):
        return None
    key, text = await database.run(keys.create, LOCAL_TENANT, Role.ADMIN, request_id=f"first-start-{uuid.uuid4().hex}")
    write_down(ControlAction("first start", "OK", tenant_id=LOCAL_TENANT, target={"key_id": key.id}))
    return text


def tell_exposure(config: ServerConfig) -> None:
    """Say in the log who is served, and what protects the wire."""
    if config.auth:
        log.info("every call needs a key, but for health checks")
    else:
        log.info("a caller without a key is tenant %r with every role; --auth asks all for one", LOCAL_TENANT)
    if config.listen.is_loopback:
        return
    if not config.auth:
        log.warning("insecure: anybody who reaches %s is served", config.listen)
    if config.tls.cert is None:
        log.warning("insecure: what is said to %s, keys included, travels without encryption", config.listen)
