"""The audit trail: one line of JSON for every control action, on the logger `motley.audit`.

Lines come whatever the log's level is. What is written down never includes a secret or a prompt. Any thread may write.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

AUDIT_LOGGER = "motley.audit"

log = logging.getLogger(AUDIT_LOGGER)


@dataclass(frozen=True, slots=True)
class ControlAction:
    """Who did what to which object, and how it ended.

    Semantics: `method` is the full name of the RPC, or what the server did itself; `code` is a gRPC code's name.
    Tenant and key are empty where nobody was recognised.
    """

    method: str
    code: str
    request_id: str = ""
    tenant_id: str = ""
    key_id: str = ""
    target: Mapping[str, str | int] = field(default_factory=dict)


def write_down(action: ControlAction) -> None:
    """Write one line about an action."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tenant": action.tenant_id,
        "key": action.key_id,
        "method": action.method,
        "object": dict(action.target),
        "code": action.code,
        "request_id": action.request_id,
    }
    log.info("%s", json.dumps(line))
