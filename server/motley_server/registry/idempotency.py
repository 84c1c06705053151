"""What was answered to a request that came with an id of its caller's choosing, so that its repeat changes nothing.

For a day, an id of one scope (the caller's tenant) means one method with one content. The answer is kept in the
transaction that did the work: both are there, or neither is. It knows no tenants and no keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, select

from motley_server.errors import AlreadyExistsError, InvalidArgumentError
from motley_server.registry.schema import requests

KEPT = timedelta(days=1)
MAX_CHARACTERS = 128

Answer = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as far as its repeat must be the same; without an id, each is a new one."""

    scope: str
    request_id: str
    content_sha256: bytes

    @classmethod
    def of(cls, method: str, scope: str, request_id: str, **content: object) -> Request:
        """Make it from what it asks for, in values that JSON has.

        Raises: InvalidArgumentError (reason=INVALID_REQUEST_ID).
        """
        if len(request_id) > MAX_CHARACTERS or not request_id.isprintable():
            message = f"a request id is at most {MAX_CHARACTERS} printable characters"
            raise InvalidArgumentError(message, reason="INVALID_REQUEST_ID", field="request_id")
        canonical = json.dumps([method, content], sort_keys=True, allow_nan=False)
        return cls(scope, request_id, hashlib.sha256(canonical.encode()).digest())

    def earlier_answer(self, connection: Connection, now: datetime) -> Answer | None:
        """Return what the same request was answered before; None if it is new.

        Raises: AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        if not self.request_id:
            return None
        row = connection.execute(
            select(requests.c.content_sha256, requests.c.answer).where(
                self._is_kept(), requests.c.answered_at > now - KEPT
            )
        ).one_or_none()
        if row is None:
            return None
        if row.content_sha256 != self.content_sha256:
            message = "this request id was used for another request within the last day"
            raise AlreadyExistsError(message, reason="REQUEST_ID_REUSED", field="request_id")
        answer: Answer = json.loads(row.answer)
        return answer

    def keep_answer(self, connection: Connection, now: datetime, answer: Answer) -> None:
        """Note the answer to a request, in the place of an earlier one, and forget those of more than a day ago."""
        connection.execute(delete(requests).where(requests.c.answered_at <= now - KEPT))
        if self.request_id:
            connection.execute(delete(requests).where(self._is_kept()))
            connection.execute(
                requests.insert().values(
                    scope=self.scope,
                    request_id=self.request_id,
                    content_sha256=self.content_sha256,
                    answer=json.dumps(answer, allow_nan=False),
                    answered_at=now,
                )
            )

    def _is_kept(self) -> ColumnElement[bool]:
        return and_(requests.c.scope == self.scope, requests.c.request_id == self.request_id)


def forget_scope(connection: Connection, scope: str) -> None:
    """Forget every request of a scope, whose name may be another's one day."""
    connection.execute(delete(requests).where(requests.c.scope == scope))
