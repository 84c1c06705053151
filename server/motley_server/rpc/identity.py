"""From a call's credentials to a tenant and its roles.

There are no keys yet: every caller is tenant `local` with every role, which is why the configuration keeps the server
on loopback unless told otherwise. Keys replace `identify_local` with a function of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from motley_server.asked import Role

LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True)
class Identity:
    """A tenant, and what it may do."""

    tenant_id: str
    roles: frozenset[Role]


Identify = Callable[[Mapping[str, str | bytes]], Identity]


def identify_local(metadata: Mapping[str, str | bytes]) -> Identity:
    """Take anybody for the local tenant."""
    return Identity(LOCAL_TENANT, frozenset(Role))
