"""The server's shell over a scripted engine: real gRPC on a free port of loopback, no base and no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from motley.v1 import (
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2_grpc,
    tenant_pb2_grpc,
    training_pb2_grpc,
)
from motley_bases.spec import BaseSpec, GenerationDefaults, LayerSpec
from motley_server.admission import Admission, AdmissionLimits
from motley_server.asked import ChatTurn
from motley_server.errors import FailedPreconditionError
from motley_server.facts import ServerFacts
from motley_server.metrics import Metrics
from motley_server.quotas import Quotas
from motley_server.rpc.identity import KeyIdentity
from motley_server.rpc.server import Backend, RpcServer, RpcSettings
from motley_server.rpc.tenants import TenantRegistry
from motley_server.tls import TlsFiles
from motley_server.training.opening import Training, TrainingLimits
from paper_library import LeaseBook, PaperLibrary
from scripted_engine import ScriptedEngine

VOCABULARY = 128
BOS, EOS = 1, 2
CONTEXT = 256
MIB = 2**20
LINEARS = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 8), "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (16, 32), "mlp.up_proj": (16, 32), "mlp.down_proj": (32, 16),
}  # fmt: skip
MAX_DATASET_BYTES = 3 * MIB


def make_base(generation: GenerationDefaults | None = None) -> BaseSpec:
    """Return the facts of a base that does not exist."""
    return BaseSpec(
        name="paper",
        architecture="PaperForCausalLM",
        fingerprint="sha256:" + "f" * 64,
        dtype="float32",
        vocab_size=VOCABULARY,
        hidden_size=16,
        context_length=CONTEXT,
        layers=(LayerSpec(2, 1, 8, None),),
        linears=MappingProxyType(
            {
                **{f"model.layers.0.{name}": sides for name, sides in LINEARS.items()},
                "lm_head": (16, VOCABULARY),
            }
        ),
        embedding_path="model.embed_tokens",
        lm_head_path="lm_head",
        other_modules=frozenset(),
        generation=generation or GenerationDefaults(eos_token_ids=(EOS,)),
        tied_embeddings=True,
        has_chat_template=True,
    )


def make_facts(base: BaseSpec, max_message_bytes: int, max_prompt_bytes: int) -> ServerFacts:
    """Return the facts of a server that serves a base that does not exist."""
    return ServerFacts(
        version="1.2.3", base=base, ledger=PaperLedger(), device="cpu", kernel="grouped", adapter_kinds=("lora",),
        context_length=CONTEXT, max_message_bytes=max_message_bytes, max_prompt_bytes=max_prompt_bytes, max_running=64,
        max_waiting=256, adapter_cache_bytes=8192, adapter_arena_bytes=2048,
    )  # fmt: skip


@dataclass(frozen=True)
class PaperLedger:
    """What the base that does not exist would take."""

    weight_bytes: int = 4000
    kv_bytes_per_token: int = 60
    linears: tuple[tuple[int, int], ...] = ((8, 8),)

    def adapter_bytes(self, rank: int) -> int:
        """Count 64 bytes for each rank."""
        return 64 * rank


class LetterTokenizer:
    """One token a character, its id the code point."""

    def __init__(self, *, has_template: bool = True) -> None:
        self.has_template = has_template
        self.broken = False

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.broken:
            raise RuntimeError("secret of the house")
        return [BOS] * add_special_tokens + [ord(letter) % VOCABULARY for letter in text]

    def render_chat(self, turns: Sequence[ChatTurn]) -> str:
        if not self.has_template:
            raise FailedPreconditionError("no template", reason="NO_CHAT_TEMPLATE", field="prompt.chat")
        return chr(BOS) + "".join(f"{turn.role}:{turn.content};" for turn in turns)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True, slots=True)
class Shell:
    """A running server and ways to talk to it."""

    engine: ScriptedEngine
    tokenizer: LetterTokenizer
    leases: LeaseBook
    metrics: Metrics
    admission: Admission
    library: PaperLibrary
    registry: TenantRegistry
    training: Training
    rpc: RpcServer
    channel: grpc.aio.Channel
    port: int

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def server(self) -> server_pb2_grpc.ServerServiceAsyncStub:
        return server_pb2_grpc.ServerServiceStub(self.channel)

    @property
    def tenants(self) -> tenant_pb2_grpc.TenantServiceAsyncStub:
        return tenant_pb2_grpc.TenantServiceStub(self.channel)

    @property
    def adapters(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def jobs(self) -> training_pb2_grpc.TrainingServiceAsyncStub:
        return training_pb2_grpc.TrainingServiceStub(self.channel)

    @property
    def workers(self) -> training_pb2_grpc.WorkerServiceAsyncStub:
        return training_pb2_grpc.WorkerServiceStub(self.channel)

    def count(self, name: str, **labels: str) -> float:
        """Return a sample of the metrics, 0 if it is not there."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def serving(
    *,
    reader_queue_events: int = 1024,
    stall_seconds: float = 3.0,
    max_prompt_bytes: int = MIB,
    max_message_bytes: int = 16 * MIB,
    reflection: bool = True,
    auth: bool = False,
    tls: TlsFiles | None = None,
    base: BaseSpec | None = None,
    trains: bool = True,
    folder: Path | None = None,
    max_job_duration: timedelta | None = None,
) -> AsyncIterator[Shell]:
    """Serve a scripted engine and connect to it; under TLS, callers bring a channel of their own.

    Nothing happens on timers: leases expire when a test says so. A `folder` is gone on with, and stays.
    """
    engine = ScriptedEngine(reader_queue_events=reader_queue_events)
    base, tokenizer, leases, own = base or make_base(), LetterTokenizer(), LeaseBook(), TemporaryDirectory()
    metrics = Metrics("1.2.3", base)
    folder = folder or Path(own.name)
    library = PaperLibrary(folder, engine, leases, metrics)
    metrics.follow(engine.stats, lambda: leases.nbytes)
    limits = AdmissionLimits(CONTEXT, max_prompt_bytes, default_max_new_tokens=8)
    admission = Admission(engine, base, tokenizer, library.sets, limits, metrics, Quotas(metrics))
    facts = make_facts(base, max_message_bytes, max_prompt_bytes)
    registry = library.tenancy
    bounds = TrainingLimits(MAX_DATASET_BYTES, timedelta(seconds=30), 8 * MAX_DATASET_BYTES, max_job_duration)
    training = Training(folder, registry.database, bounds, metrics)
    identity = KeyIdentity(
        registry.database, registry.keys, registry.quotas, demands_key=auth, leases=training.leases if trains else None
    )
    surface = replace(library.surface, leases=training.leases)
    backend = Backend(engine, admission, surface, leases, facts, metrics, registry, identity.identify)
    rpc = RpcServer(
        replace(backend, training=training if trains else None),
        RpcSettings(max_message_bytes, stall_seconds, drain_seconds=5.0, reflection=reflection, tls=tls),
    )
    port = await rpc.start("127.0.0.1:0")
    options = [("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Shell(engine, tokenizer, leases, metrics, admission, library, registry, training, rpc, channel, port)
    finally:
        await rpc.stop(0)
        engine.cancelled.extend(request.request_id for request in engine.submitted)
        engine.may_step.set()
        await engine.stop()
        admission.close()
        await training.stop()
        await library.stop()
        own.cleanup()


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something becomes true, for a few seconds at most."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a failed call said."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str
    details: dict[str, Message]
    request_id: str


KINDS = ("ErrorInfo", "RequestInfo", "BadRequest", "ResourceInfo", "PreconditionFailure", "QuotaFailure", "RetryInfo")


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Read a failed call's status and all its details."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    details: dict[str, Message] = {}
    for packed in status.details:
        kind = packed.TypeName().rpartition(".")[2]
        assert kind in KINDS
        assert kind not in details
        details[kind] = getattr(error_details_pb2, kind).FromString(packed.value)
    info = details["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "motley.dev"
    return Refusal(
        error.code(),
        status.message,
        info.reason,
        info.metadata.get("field", ""),
        details,
        str(trailers["x-request-id"]),
    )


def text_request(text: str = "hello", **sampling: object) -> inference_pb2.GenerateRequest:
    """Make a request to continue a text."""
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=text),
        sampling=inference_pb2.SamplingParams(**sampling),  # type: ignore[arg-type]
    )
