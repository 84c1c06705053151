"""Who may call what: one table from every RPC's full method name to the roles that may, and which calls are audited.

Health is open to anybody, so that probes need no key. A method that no table names may be called by nobody. The token
of a lease stands for no role: it opens the few methods that say so, and what of each is a matter of the lease. Pure
data and one check; runs on the event loop's thread.
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
_WORKERS: Final = frozenset({Role.WORKER, Role.ADMIN})
_ADMINS: Final = frozenset({Role.ADMIN})
_NO_ROLE: Final[frozenset[Role]] = frozenset()

OPEN_METHODS: Final = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List"))


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method, whether each call of it is written down, and whether a lease's token opens it."""

    roles: frozenset[Role]
    is_audited: bool = False
    takes_lease: bool = False


def _rules(
    service: str, roles: frozenset[Role], names: str, *, is_audited: bool = False, takes_lease: bool = False
) -> dict[str, Rule]:
    return {f"/motley.v1.{service}/{name}": Rule(roles, is_audited, takes_lease) for name in names.split()}


RULES: Mapping[str, Rule] = MappingProxyType({
    **_rules("InferenceService", _USERS, "Generate GenerateStream Score Tokenize Detokenize"),
    **_rules("AdapterService", _USERS, "GetAdapter ListAdapters ListAdapterVersions"),
    **_rules("AdapterService", _PUBLISHERS, "GetUpload DownloadAdapter", takes_lease=True),
    **_rules("AdapterService", _PUBLISHERS, "UploadAdapter AbortUpload", is_audited=True, takes_lease=True),
    **_rules(
        "AdapterService", _PUBLISHERS,
        "SetAlias RollbackAlias ShareAdapter DeleteAdapterVersion PinAdapter UnpinAdapter",
        is_audited=True,
    ),
    **_rules("ServerService", _EVERYBODY, "GetServerInfo", takes_lease=True),
    **_rules("ServerService", _EVERYBODY, "GetCapacity"),
    **_rules("ServerService", _ADMINS, "Drain", is_audited=True),
    **_rules("TenantService", _ADMINS, "GetTenant ListTenants ListKeys"),
    **_rules(
        "TenantService", _ADMINS, "CreateTenant UpdateTenant DeleteTenant CreateKey RevokeKey", is_audited=True
    ),
    **_rules(
        "TrainingService", _PUBLISHERS,
        "GetDataset ListDatasets GetTrainingJob ListTrainingJobs WatchTrainingJob GetTrainingCapabilities",
    ),
    **_rules(
        "TrainingService", _PUBLISHERS, "UploadDataset DeleteDataset CreateTrainingJob CancelTrainingJob",
        is_audited=True,
    ),
    **_rules("WorkerService", _WORKERS, "RegisterWorker", is_audited=True),
    # Of these two the service itself writes down what is not the answer to a mere question or a sign of life.
    **_rules("WorkerService", _WORKERS, "LeaseJob"),
    **_rules("WorkerService", _NO_ROLE, "ReportJob", takes_lease=True),
    **_rules("WorkerService", _NO_ROLE, "FetchDataset", takes_lease=True),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(_EVERYBODY),
})  # fmt: skip

_NOBODY: Final = Rule(_NO_ROLE)


def rule_of(method: str) -> Rule:
    """Return the rule of a full method name; nobody may call one without."""
    return RULES.get(method, _NOBODY)


def check_roles(method: str, roles: frozenset[Role], *, has_lease: bool = False) -> None:
    """Refuse a caller none of whose roles may call this method, and one with a lease, whatever its roles, for most.

    Raises: PermissionDeniedError (reason=WRONG_ROLE), naming the roles that may; (reason=LEASE_REQUIRED) for what takes
    a lease and nothing else; (reason=OUTSIDE_LEASE).
    """
    rule = rule_of(method)
    if has_lease and not rule.takes_lease:
        raise PermissionDeniedError(f"the token of a lease does not open {method[1:]}", reason="OUTSIDE_LEASE")
    if has_lease or rule.roles & roles:
        return
    if rule.takes_lease and not rule.roles:
        raise PermissionDeniedError(f"{method[1:]} needs the token of a lease", reason="LEASE_REQUIRED")
    names = " or ".join(role.value for role in Role if role in rule.roles)
    what = f"a key of role {names}" if names else "what no role has"
    raise PermissionDeniedError(f"{method[1:]} needs {what}", reason="WRONG_ROLE")
