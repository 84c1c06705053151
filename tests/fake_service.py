"""What services in memory share: they remember calls, refuse and lose answers when told to, and keep request ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
from certificates import Certificates
from fake_motley_server import rich_status
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

FIRST_SECOND = 1_800_000_000  # everything happens a second after what came before
DEFAULT_PAGE = 2

_Response = TypeVar("_Response", bound=Message)
_Fake = TypeVar("_Fake")


def refusal(code: grpc.StatusCode, reason: str, field: str = "") -> status_pb2.Status:
    """Make the status of a typed error, as a server sends it."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="motley.dev", metadata={"field": field} if field else {})
    return rich_status(code, f"{reason} it is", info)


class FakeService:
    """Answer calls by `do`.

    Semantics: `refusals` are taken one a call, before anything is done; `losses` counts the calls whose answer is lost
    after everything is done. A repeated request id gets the first answer, as `_remembered` leaves it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.credentials: list[str | None] = []
        self.refusals: list[status_pb2.Status] = []
        self.losses = 0
        self._answers: dict[str, Message] = {}
        self._seconds = FIRST_SECOND

    def enter(self, name: str, request: Any, context: Any) -> None:
        """Remember a call, and refuse it if that was asked for."""
        self.calls.append((name, request))
        self.credentials.append(dict(context.invocation_metadata()).get("authorization"))
        if self.refusals:
            self.abort(context, self.refusals.pop(0))

    def do(self, name: str, request: Any, context: Any, act: Callable[[], _Response]) -> _Response:
        """Answer a call by what `act` returns, once for each request id."""
        self.enter(name, request, context)
        request_id = getattr(request, "request_id", "")
        answer: Any = self._answers.get(request_id) or act()
        if request_id and request_id not in self._answers:
            self._answers[request_id] = self._remembered(type(answer).FromString(answer.SerializeToString()))
        if self.losses:
            self.losses -= 1
            self.abort(context, rich_status(grpc.StatusCode.UNAVAILABLE, "cut off"))
        return answer  # type: ignore[no-any-return]

    def abort(self, context: Any, status: status_pb2.Status) -> NoReturn:
        """End a call with a status."""
        if status.details:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(next(code for code in grpc.StatusCode if code.value[0] == status.code), status.message)
        raise AssertionError("abort returned")

    def now(self) -> int:
        """Return the next second."""
        self._seconds += 1
        return self._seconds

    def _remembered(self, answer: Message) -> Message:
        return answer


def page(names: Sequence[str], request: Any) -> tuple[Sequence[str], str]:
    """Return a request's page of names, and the token of the next."""
    start = int(request.page_token or 0)
    end = start + (request.page_size or DEFAULT_PAGE)
    return names[start:end], str(end) if end < len(names) else ""


@contextmanager
def serving_service(
    add: Callable[[_Fake, grpc.Server], None], fake: _Fake, certificates: Certificates | None = None
) -> Iterator[str]:
    """Serve on loopback while the block runs, by TLS where there are certificates; yield the address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    add(fake, server)
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (certificates.server_key.read_bytes(), certificates.server.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(timeout=10)
