"""Who may call what: one table from every RPC's full method name to the roles that may, and which calls are audited.

Health is open to anybody, so that probes need no key. A method that no table names may be called by nobody. Pure data
and one check; runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from motley_server.asked import Role
from motley_server.errors import PermissionDeniedError

_EVERYBODY: Final = frozenset(Role)
_USERS: Final = frozenset({Role.USER, Role.PUBLISHER, Role.ADMIN})
_PUBLISHERS: Final = frozenset({Role.PUBLISHER, Role.ADMIN})
_ADMINS: Final = frozenset({Role.ADMIN})

OPEN_METHODS: Final = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List"))


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method, and whether each call of it is written down."""

    roles: frozenset[Role]
    is_audited: bool = False


def _rules(service: str, roles: frozenset[Role], names: str, *, is_audited: bool = False) -> dict[str, Rule]:
    return {f"/motley.v1.{service}/{name}": Rule(roles, is_audited) for name in names.split()}


RULES: Mapping[str, Rule] = MappingProxyType({
    **_rules("InferenceService", _USERS, "Generate GenerateStream Score Tokenize Detokenize"),
    **_rules("AdapterService", _USERS, "GetAdapter ListAdapters ListAdapterVersions"),
    **_rules("AdapterService", _PUBLISHERS, "GetUpload DownloadAdapter"),
    **_rules(
        "AdapterService", _PUBLISHERS,
        "UploadAdapter AbortUpload SetAlias RollbackAlias ShareAdapter DeleteAdapterVersion PinAdapter UnpinAdapter",
        is_audited=True,
    ),
    **_rules("ServerService", _EVERYBODY, "GetServerInfo GetCapacity"),
    **_rules("ServerService", _ADMINS, "Drain", is_audited=True),
    **_rules("TenantService", _ADMINS, "GetTenant ListTenants ListKeys"),
    **_rules(
        "TenantService", _ADMINS, "CreateTenant UpdateTenant DeleteTenant CreateKey RevokeKey", is_audited=True
    ),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(_EVERYBODY),
})  # fmt: skip

_NOBODY: Final = Rule(frozenset())


def rule_of(method: str) -> Rule:
    """Return the rule of a full method name; nobody may call one without."""
    return RULES.get(method, _NOBODY)


def check_roles(method: str, roles: frozenset[Role]) -> None:
    """Refuse a caller none of whose roles may call this method.

    Raises: PermissionDeniedError (reason=WRONG_ROLE), naming the roles that may.
    """
    allowed = rule_of(method).roles
    if not allowed & roles:
        names = " or ".join(role.value for role in Role if role in allowed)
        what = f"a key of role {names}" if names else "what no role has"
        raise PermissionDeniedError(f"{method[1:]} needs {what}", reason="WRONG_ROLE")
