"""How a client's calls wait and end: one channel, one timeout, and every failure a typed error.

Owns the channel of a client, blocking (`Connection`) or on a loop (`AsyncConnection`), from its making to its closing.
Knows nothing of requests and results: the clients' own modules build on it. A `Connection` may be shared by threads; an
`AsyncConnection` belongs to the loop it was made on.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from motley_client.channel import credentials_of, options_of
from motley_client.endpoint import DEFAULT_ADDRESS, Endpoint
from motley_client.errors import from_rpc_error

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Connection:
    """Hold a channel whose calls block."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        key: str | None = None,
        timeout: float | None = None,
        *,
        ca_file: Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._endpoint = Endpoint(address, key, ca_file, insecure)
        self._timeout = timeout
        credentials = credentials_of(self._endpoint)
        self._channel = (
            grpc.insecure_channel(address, options_of(self._endpoint))
            if credentials is None
            else grpc.secure_channel(address, credentials, options_of(self._endpoint))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connection."""
        self._channel.close()

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout: float | None
    ) -> _Response:
        try:
            return method(request, timeout=self._effective(timeout), metadata=self._endpoint.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error

    def _effective(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout


class AsyncConnection:
    """Hold a channel whose calls are awaited."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        key: str | None = None,
        timeout: float | None = None,
        *,
        ca_file: Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._endpoint = Endpoint(address, key, ca_file, insecure)
        self._timeout = timeout
        credentials = credentials_of(self._endpoint)
        self._channel = (
            grpc.aio.insecure_channel(address, options_of(self._endpoint))
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options_of(self._endpoint))
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the connection."""
        await self._channel.close()

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout: float | None
    ) -> _Response:
        try:
            return await method(request, timeout=self._effective(timeout), metadata=self._endpoint.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error

    def _effective(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
