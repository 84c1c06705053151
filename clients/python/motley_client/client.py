"""The client for ordinary, blocking Python.

Owns the calls that ask for answers and for the server's state; those for tenants are in `tenant_calls`, those for
adapters in `adapter_calls`, `upload` and `download`, those for training in `training_calls`, `dataset_upload` and
`job_watch`. What they say is in `convert`, how they wait and end in `connection`. A `Client` may be shared by
threads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from typing import Unpack

import grpc
from motley.v1 import inference_pb2, server_pb2
from motley.v1.inference_pb2_grpc import InferenceServiceStub
from motley.v1.server_pb2_grpc import ServerServiceStub

from motley_client import convert
from motley_client.download import DownloadCalls
from motley_client.errors import from_rpc_error
from motley_client.job_watch import WatchCalls
from motley_client.tenant_calls import TenantCalls
from motley_client.types import (
    AdapterChoice,
    Capacity,
    ChatMessage,
    DrainResult,
    Generation,
    Sampling,
    Score,
    ServerInfo,
    StreamPart,
)


class Client(TenantCalls, DownloadCalls, WatchCalls):
    """Ask a Motley server, blocking until it has answered.

    Semantics: every method takes `timeout`, which stands in for the client's own; None means to wait as long as it
    takes. See `Endpoint` for the rest.
    Units: timeouts in seconds.
    Raises: MotleyClientError, by every method, in the subclass of the status code.
    """

    @cached_property
    def _inference(self) -> InferenceServiceStub:
        return InferenceServiceStub(self._channel)

    @cached_property
    def _server(self) -> ServerServiceStub:
        return ServerServiceStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[ChatMessage] | None = None,
        token_ids: Iterable[int] | None = None,
        adapters: Sequence[AdapterChoice] = (),
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Return the whole answer to a prompt, a conversation or token ids."""
        request = convert.generate_request(convert.prompt_message(prompt, messages, token_ids), adapters, sampling)
        return convert.generation(self._call(self._inference.Generate, request, timeout))

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[ChatMessage] | None = None,
        token_ids: Iterable[int] | None = None,
        adapters: Sequence[AdapterChoice] = (),
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[StreamPart, None, None]:
        """Yield the answer as it is made; closing the generator cancels the request."""
        request = convert.stream_request(convert.prompt_message(prompt, messages, token_ids), adapters, sampling)
        return self._stream(request, timeout)

    def score(
        self,
        prompt: str | None,
        continuations: Iterable[str],
        *,
        messages: Iterable[ChatMessage] | None = None,
        token_ids: Iterable[int] | None = None,
        adapters: Sequence[AdapterChoice] = (),
        timeout: float | None = None,
    ) -> Score:
        """Return how likely each continuation is after the prompt."""
        request = convert.score_request(convert.prompt_message(prompt, messages, token_ids), continuations, adapters)
        return convert.score(self._call(self._inference.Score, request, timeout))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[ChatMessage] | None = None,
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """Return the ids that a prompt becomes, special tokens included."""
        request = inference_pb2.TokenizeRequest(prompt=convert.prompt_message(prompt, messages, None))
        return tuple(self._call(self._inference.Tokenize, request, timeout).ids)

    def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None) -> str:
        """Return the text of token ids."""
        return self._call(self._inference.Detokenize, convert.detokenize_request(token_ids), timeout).text

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return what the server is, and its limits."""
        return convert.server_info(self._call(self._server.GetServerInfo, server_pb2.GetServerInfoRequest(), timeout))

    def capacity(self, ranks: Iterable[int] = (), *, timeout: float | None = None) -> Capacity:
        """Return what is in use, and what is left; `adapter_fits` tells of the ranks asked for, or of some."""
        request = server_pb2.GetCapacityRequest(ranks=ranks)
        return convert.capacity(self._call(self._server.GetCapacity, request, timeout))

    def drain(self, grace_seconds: float | None = None, *, timeout: float | None = None) -> DrainResult:
        """Let running requests finish and the server end; return when they have.

        Semantics: what still runs after `grace_seconds` is cancelled; None leaves that to the server's configuration.
        """
        return convert.drain_result(self._call(self._server.Drain, convert.drain_request(grace_seconds), timeout))

    def _stream(
        self, request: inference_pb2.GenerateStreamRequest, timeout: float | None
    ) -> Generator[StreamPart, None, None]:
        call = self._inference.GenerateStream(
            request, timeout=self._effective(timeout), metadata=self._endpoint.metadata
        )
        try:
            for response in call:
                yield convert.stream_part(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error
        finally:
            call.cancel()
