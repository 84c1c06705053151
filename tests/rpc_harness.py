"""The server's shell over a scripted engine: real gRPC on a free port of loopback, no base and no torch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from motley.v1 import adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, server_pb2_grpc, tenant_pb2_grpc
from motley_adapters.errors import AdapterFormatError
from motley_bases.spec import BaseSpec, GenerationDefaults, LayerSpec
from motley_server.admission import Admission, AdmissionLimits
from motley_server.asked import ChatTurn
from motley_server.errors import FailedPreconditionError
from motley_server.facts import ServerFacts
from motley_server.library.control import AdapterControl
from motley_server.library.holds import Holds, key_of
from motley_server.library.housekeeping import Housekeeping
from motley_server.library.observer import LibraryObserver
from motley_server.library.sets import AdapterSets
from motley_server.library.uploads import AdapterRegistry, UploadDesk, content_of
from motley_server.library.whereabouts import Whereabouts
from motley_server.metrics import Metrics
from motley_server.quotas import Quotas
from motley_server.registry.adapters import Adapters
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collector
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.records import AdapterVersion, Quota, Visibility
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads
from motley_server.rpc.adapters import AdapterLibrary
from motley_server.rpc.identity import KeyIdentity, TenantQuotas
from motley_server.rpc.server import Backend, RpcServer, RpcSettings
from motley_server.rpc.tenants import TenantRegistry
from motley_server.tls import TlsFiles
from scripted_engine import ScriptedEngine

VOCABULARY = 128
BOS, EOS = 1, 2
CONTEXT = 256
MIB = 2**20


def make_base(generation: GenerationDefaults | None = None) -> BaseSpec:
    """Return the facts of a base that does not exist."""
    return BaseSpec(
        name="paper",
        architecture="PaperForCausalLM",
        fingerprint="sha256:" + "f" * 64,
        dtype="float32",
        vocab_size=VOCABULARY,
        hidden_size=8,
        context_length=CONTEXT,
        layers=(LayerSpec(2, 1, 4, None),),
        linears=MappingProxyType({}),
        embedding_path="model.embed_tokens",
        lm_head_path="lm_head",
        other_modules=frozenset(),
        generation=generation or GenerationDefaults(eos_token_ids=(EOS,)),
        tied_embeddings=True,
        has_chat_template=True,
    )


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


class LeaseBook:
    """Count leases; giving one back twice is an error, as with the real cache."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.nbytes = 4096

    def acquire(self, digest: str) -> BookedLease:
        self.held.append(digest)
        return BookedLease(self, digest)


class BookedLease:
    """One lease of a LeaseBook."""

    def __init__(self, book: LeaseBook, digest: str) -> None:
        self._book, self._digest, self._is_released = book, digest, False

    def release(self) -> None:
        assert not self._is_released, "released twice"
        self._is_released = True
        self._book.held.remove(self._digest)


def digest_of(letter: str) -> str:
    """Return a digest that is easy to read."""
    return "sha256:" + letter * 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an adapter that does not exist."""

    digest: str
    kind: str = "lora"
    trained_on: str = "undeclared"
    serves_on: str = "undeclared"
    nbytes: int = 1000
    ranks: Mapping[str, int] = field(default_factory=lambda: {"q_proj": 8})
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Looked:
    """What an inspection found."""

    spec: Facts
    outline: None = None


class PaperIntake:
    """Know adapters that do not exist: by digest those of the catalog, and any upload by its config file's text.

    An upload whose adapter_config.json is not one of the kinds' names is refused.
    """

    def __init__(self, leases: LeaseBook) -> None:
        self.facts: dict[str, Facts] = {}
        self.forgotten: list[str] = []
        self._leases = leases

    async def inspect(self, directory: Path) -> Looked:
        text = (directory / "adapter_config.json").read_text(errors="replace")
        if text not in ("lora", "s2ft", "goat", "loram"):
            raise AdapterFormatError("that is no adapter", reason="BAD_JSON", field="adapter_config.json")
        contents = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
        return Looked(Facts(f"sha256:{hashlib.sha256(contents).hexdigest()}", kind=text))

    def accept(self, version: AdapterVersion, inspection: Looked) -> None:
        self.facts[version.digest] = inspection.spec

    async def introduce(self, version: AdapterVersion) -> Facts:
        return self.facts[version.digest]

    def lease(self, digest: str) -> BookedLease:
        return self._leases.acquire(digest)

    def forget(self, bundle: str) -> frozenset[str]:
        self.forgotten.append(bundle)
        return frozenset()


class PaperLibrary:
    """The library over a real registry and a real store, with adapters that do not exist.

    It has `zeta` twice, `alpha`, `twin` with alpha's digest, one public, one of another tenant, three of S2FT.
    """

    def __init__(self, folder: Path, engine: ScriptedEngine, leases: LeaseBook, observer: LibraryObserver) -> None:
        self.folder = folder
        path = folder / "registry.sqlite3"
        path.write_bytes(_written_registry())
        self.tenancy = open_registry(path)
        database = self.tenancy.database
        self.registry = AdapterRegistry(database, Adapters(database), Uploads(database), BundleStore(folder / "files"))
        self.intake = PaperIntake(leases)
        self.holds = Holds()
        intake: Any = self.intake
        self.sets = AdapterSets(database, self.registry.adapters, self.holds, intake, count_overlaps)
        self.desk = UploadDesk(self.registry, intake, observer)
        self.control = AdapterControl(self.registry, self.holds, intake, engine)
        collector = Collector(self.registry.store, self.registry.adapters, self.registry.uploads, database.now)
        self.housekeeping = Housekeeping(
            self.registry, collector, self.holds, self.desk, intake, engine.forget, observer
        )
        self._engine = engine
        self.intake.facts.update((facts.digest, facts) for _, _, facts in catalog())

    @property
    def surface(self) -> AdapterLibrary:
        return AdapterLibrary(self.registry, self.desk, self.control, self.whereabouts)

    def whereabouts(self, version: AdapterVersion) -> Whereabouts:
        is_deleting = self.holds.is_deleting(key_of(version))
        return Whereabouts(is_deleting, is_on_device=self._engine.is_on_device(version.digest))

    async def stop(self) -> None:
        await self.desk.stop()
        self.registry.store.close()
        self.registry.database.close()


def catalog() -> list[tuple[str, str, Facts]]:
    """Return whose adapters a paper library has, in the order of their making."""
    return [
        *((owner, name, Facts(digest_of(letter))) for owner, name, letter in (
            ("local", "zeta", "1"), ("local", "zeta", "2"), ("local", "alpha", "9"), ("local", "twin", "9"),
            ("public", "shared", "5"), ("other", "secret", "6"),
        )),
        *(("local", f"many{index}", Facts(f"sha256:{index:064x}")) for index in range(9)),
        *(("local", name, Facts(digest_of(letter), "s2ft", channels={"down_proj": channels})) for name, letter, channels
          in (("columns", "a", (1, 2, 3)), ("rows", "b", (2, 3, 4)), ("apart", "c", (9,)))),
    ]  # fmt: skip


@cache
def _written_registry() -> bytes:
    """Return a registry's file with the catalog in it, written once: every commit waits for the disk."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "registry.sqlite3"
        tenancy = open_registry(path)
        tenancy.tenants.create("other")
        adapters = Adapters(tenancy.database)
        for owner, name, facts in catalog():
            files = (BundleFile("adapter_config.json", 4, hashlib.sha256(facts.digest.encode()).hexdigest()),)
            content: Any = facts
            adapters.publish(owner, name, content_of(content, files), ("default",), quota=Quota())
        adapters.share("public", "public", "shared", Visibility.PUBLIC)
        with tenancy.database.writing() as connection:  # the tests count tenants, and this one is only there to own
            connection.exec_driver_sql("delete from tenants where id = 'other'")
        tenancy.database.close()
        return path.read_bytes()


def count_overlaps(specs: Sequence[Facts]) -> dict[str, int]:
    """Count as the adapters' own function does, where every channel is of the same Linear and side."""
    held = {one.digest: set(one.channels["down_proj"]) for one in specs}
    return {
        digest: sum(any(channel in held[other] for other in held if other != digest) for channel in channels)
        for digest, channels in held.items()
    }


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
) -> AsyncIterator[Shell]:
    """Serve a scripted engine and connect to it; under TLS, callers bring a channel of their own."""
    engine = ScriptedEngine(reader_queue_events=reader_queue_events)
    base, tokenizer, leases, folder = make_base(), LetterTokenizer(), LeaseBook(), TemporaryDirectory()
    metrics = Metrics("1.2.3", base)
    library = PaperLibrary(Path(folder.name), engine, leases, metrics)
    metrics.follow(engine.stats, lambda: leases.nbytes)
    limits = AdmissionLimits(CONTEXT, max_prompt_bytes, default_max_new_tokens=8)
    admission = Admission(engine, base, tokenizer, library.sets, limits, metrics, Quotas(metrics))
    facts = ServerFacts(
        version="1.2.3", base=base, quantization="none", device="cpu", kernel="grouped", adapter_kinds=("lora",),
        context_length=CONTEXT, max_message_bytes=max_message_bytes, max_prompt_bytes=max_prompt_bytes, max_running=64,
        max_waiting=256, adapter_cache_bytes=8192, adapter_arena_bytes=2048,
    )  # fmt: skip
    registry = library.tenancy
    identity = KeyIdentity(registry.database, registry.keys, registry.quotas, demands_key=auth)
    rpc = RpcServer(
        Backend(engine, admission, library.surface, leases, facts, metrics, registry, identity.identify),
        RpcSettings(max_message_bytes, stall_seconds, drain_seconds=5.0, reflection=reflection, tls=tls),
    )
    port = await rpc.start("127.0.0.1:0")
    options = [("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Shell(engine, tokenizer, leases, metrics, admission, library, registry, rpc, channel, port)
    finally:
        await rpc.stop(0)
        engine.cancelled.extend(request.request_id for request in engine.submitted)
        engine.may_step.set()
        await engine.stop()
        admission.close()
        await library.stop()
        folder.cleanup()


def open_registry(path: Path) -> TenantRegistry:
    """Open a registry in a file."""
    database = Database.open(f"sqlite:///{path}")
    tenants = Tenants(database)
    return TenantRegistry(database, tenants, Keys(database), TenantQuotas(database, tenants))


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
