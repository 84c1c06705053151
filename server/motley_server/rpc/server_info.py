"""ServerService: what this server is, what it can still take, and emptying it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import grpc
from motley.v1 import server_pb2, server_pb2_grpc
from motley_adapters.peft_config import MAX_RANK

from motley_server.engine.api import EngineFront
from motley_server.errors import InvalidArgumentError
from motley_server.facts import ServerFacts
from motley_server.library.sets import MAX_ADAPTERS
from motley_server.lifecycle import Lifecycle
from motley_server.memory import SHOWN_RANKS
from motley_server.sampling import MAX_CANDIDATES, MAX_LOGPROBS

Context = grpc.aio.ServicerContext[Any, Any]
MAX_DRAIN = timedelta(days=1)
MAX_RANKS = 16  # that one call asks about


class AdapterBytes(Protocol):
    """Who knows how much memory adapters take."""

    @property
    def nbytes(self) -> int:
        """Return the bytes that are held."""


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Say what is served, and stop when told to."""

    def __init__(self, facts: ServerFacts, engine: EngineFront, adapters: AdapterBytes, lifecycle: Lifecycle) -> None:
        self._facts = facts
        self._engine = engine
        self._adapters = adapters
        self._lifecycle = lifecycle

    async def GetServerInfo(  # noqa: N802
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.GetServerInfoResponse:
        """Say what is served and within which limits."""
        facts = self._facts
        return server_pb2.GetServerInfoResponse(
            version=facts.version,
            base_model=facts.base.name,
            base_fingerprint=facts.base.fingerprint,
            architecture=facts.base.architecture,
            dtype=facts.base.dtype,
            quantization=facts.base.quantization,
            pruned_from=facts.base.pruned_from or "",
            device=facts.device,
            kernel=facts.kernel,
            adapter_kinds=facts.adapter_kinds,
            limits=server_pb2.Limits(
                max_message_bytes=facts.max_message_bytes,
                max_prompt_bytes=facts.max_prompt_bytes,
                context_length=facts.context_length,
                max_adapters_per_request=MAX_ADAPTERS,
                max_candidates=MAX_CANDIDATES,
                max_logprobs=MAX_LOGPROBS,
                max_running_requests=facts.max_running,
                max_waiting_requests=facts.max_waiting,
            ),
        )

    async def GetCapacity(  # noqa: N802
        self, request: server_pb2.GetCapacityRequest, context: Context
    ) -> server_pb2.GetCapacityResponse:
        """Say what is in use and what is left."""
        ledger, device_bytes = self._facts.ledger, self._facts.adapter_arena_bytes
        ranks = _checked_ranks(request.ranks) if request.ranks else SHOWN_RANKS
        stats = self._engine.stats()
        return server_pb2.GetCapacityResponse(
            kv_bytes_total=stats.num_total_blocks * stats.kv_bytes_per_block,
            kv_bytes_used=stats.num_used_blocks * stats.kv_bytes_per_block,
            kv_tokens_total=stats.num_total_blocks * stats.block_size,
            kv_tokens_free=(stats.num_total_blocks - stats.num_used_blocks) * stats.block_size,
            adapter_bytes_total=self._facts.adapter_cache_bytes,
            adapter_bytes_used=self._adapters.nbytes,
            running_requests=stats.num_running,
            waiting_requests=stats.num_waiting,
            weight_bytes=ledger.weight_bytes,
            kv_bytes_per_token=ledger.kv_bytes_per_token,
            adapter_device_bytes_total=device_bytes,
            adapter_fits=[_fit(rank, ledger.adapter_bytes(rank), device_bytes) for rank in ranks if ledger.linears],
        )

    async def Drain(  # noqa: N802
        self, request: server_pb2.DrainRequest, context: Context
    ) -> server_pb2.DrainResponse:
        """Stop as SIGTERM does, and say how the running requests ended."""
        timeout: float | None = None
        if request.HasField("timeout"):
            timeout = request.timeout.seconds + request.timeout.nanos / 1e9
            if not 0 <= timeout <= MAX_DRAIN.total_seconds():
                message = f"{timeout:g} s is not within 0 and {MAX_DRAIN.total_seconds():g}"
                raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="timeout")
        report = await self._lifecycle.drain(timeout)
        return server_pb2.DrainResponse(finished_requests=report.num_finished, cancelled_requests=report.num_cancelled)


def _checked_ranks(ranks: Sequence[int]) -> Sequence[int]:
    if len(ranks) > MAX_RANKS or not all(1 <= rank <= MAX_RANK for rank in ranks):
        message = f"at most {MAX_RANKS} ranks from 1 to {MAX_RANK} can be asked for"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="ranks")
    return ranks


def _fit(rank: int, num_bytes: int, device_bytes: int) -> server_pb2.AdapterFit:
    return server_pb2.AdapterFit(rank=rank, bytes=num_bytes, count=device_bytes // num_bytes)
