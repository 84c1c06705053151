"""The server put together, in one place: base, adapters, engine, metrics, gRPC, signals.

Everything that needs torch is imported inside functions, after `prepare_process` has set what torch and its libraries
read when they are loaded. Runs on the main thread, and then on its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import signal
import sys
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from motley_server.admission import Admission, AdmissionLimits
from motley_server.audit import AUDIT_LOGGER
from motley_server.config import MIB, EngineConfig, ServerConfig
from motley_server.config_values import Address
from motley_server.engine.api import EngineFront
from motley_server.engine.settings import EngineSettings
from motley_server.errors import MotleyError
from motley_server.facts import ServerFacts
from motley_server.memory import ledger_line, ledger_of
from motley_server.metrics import HttpEndpoint, Metrics
from motley_server.quotas import Quotas
from motley_server.registry.bundles import BundleStoreError
from motley_server.registry.database import Database, DatabaseError
from motley_server.rpc.adapters import AdapterLibrary
from motley_server.rpc.identity import KeyIdentity, TenantQuotas
from motley_server.rpc.server import Backend, RpcServer, RpcSettings
from motley_server.rpc.tenants import TenantRegistry
from motley_server.tenancy import Tenancy, first_admin_key, open_tenancy, tell_exposure
from motley_server.tls import TlsError, TlsFiles, read_tls
from motley_server.tokenizer import CheckpointTokenizer
from motley_server.training.opening import Training, TrainingLimits

if TYPE_CHECKING:
    import torch
    from motley_adapters.cache import AdapterCache
    from motley_adapters.errors import AdapterError
    from motley_bases.base import Base
    from motley_bases.errors import BaseError

    from motley_server.library.opening import Library, Shelf

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 5.0
MIN_CACHED_TOKENS = 16  # less than this serves nobody, and warming up takes half of it


class StartError(Exception):
    """Say in one line why the server cannot start with what it was given."""


def prepare_process(environ: MutableMapping[str, str], log_level: str) -> None:
    """Set what must be set before torch is loaded, and send the log to stderr."""
    # Waiting threads must not spin beside other processes, but for microseconds between two products (ADRs 0007, 0011).
    environ.setdefault("OMP_WAIT_POLICY", "passive")
    environ.setdefault("GOMP_SPINCOUNT", "5000")
    environ["HF_HUB_OFFLINE"] = "1"  # nothing is ever fetched, whatever a library would like
    logging.basicConfig(
        stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)  # whatever the level of the rest


@dataclass(frozen=True, slots=True)
class App:
    """A server that listens, and all that must be stopped with it."""

    config: ServerConfig
    port: int
    engine: EngineFront
    library: Library
    rpc: RpcServer
    tenancy: Tenancy
    metrics: Metrics
    endpoint: HttpEndpoint | None
    resources: contextlib.AsyncExitStack

    async def stop(self) -> None:
        """Stop what was started, the last first; requests that still run fail."""
        await self.resources.aclose()


async def build(config: ServerConfig) -> App:
    """Load everything, start the engine, warm it up, and listen.

    Raises: StartError for a base, an adapter or sizes that cannot be served; OSError for an address that is taken.
    Nothing is left running then.
    """
    async with contextlib.AsyncExitStack() as resources:
        return await _build(config, resources)


async def _build(config: ServerConfig, resources: contextlib.AsyncExitStack) -> App:
    import torch

    from motley_server.library.opening import Library

    tls = _read_tls(config)
    tenancy = _open_tenancy(config)
    resources.callback(tenancy.database.close)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _single_threaded(config.engine.threads):
        base = _load_base(config, device)
        shelf = _open_shelf(config, tenancy.database, base)
        resources.callback(shelf.registry.store.close)
        _put_named(config, shelf)
    version = _version()
    metrics = Metrics(version, base.spec)
    endpoint = None
    if config.metrics is not None:
        endpoint = metrics.serve(config.metrics)
        resources.push_async_callback(asyncio.to_thread, endpoint.stop)
    engine = _start_engine(config, base, shelf.cache, metrics)
    resources.push_async_callback(engine.stop)
    metrics.follow(engine.stats, lambda: shelf.cache.nbytes)
    library = Library(shelf, engine, metrics, demands_base=config.require_declared_base)
    resources.push_async_callback(library.stop)
    await library.start(config.limits.collect_seconds)
    training = await _start_training(config, tenancy.database, metrics, resources)
    facts = _facts(config, base, engine, version, str(device))
    limits = AdmissionLimits(facts.context_length, config.limits.max_prompt_bytes, config.limits.max_new_tokens)
    tokenizer = CheckpointTokenizer(base.tokenizer)
    admission = Admission(engine, base.spec, tokenizer, library.sets, limits, metrics, Quotas(metrics))
    resources.callback(admission.close)
    quotas = TenantQuotas(tenancy.database, tenancy.tenants)
    leases = None if training is None else training.leases
    identity = KeyIdentity(tenancy.database, tenancy.keys, quotas, demands_key=config.auth, leases=leases)
    registry = TenantRegistry(tenancy.database, tenancy.tenants, tenancy.keys, quotas)
    adapters = AdapterLibrary(library.registry, library.desk, library.control, library.whereabouts, leases)
    backend = Backend(engine, admission, adapters, shelf.cache, facts, metrics, registry, identity.identify, training)
    rpc = RpcServer(backend, _rpc_settings(config, tls))
    resources.push_async_callback(rpc.stop, STOP_GRACE_SECONDS)
    port = await rpc.start(str(config.listen))
    return App(config, port, engine, library, rpc, tenancy, metrics, endpoint, resources.pop_all())


async def run(config: ServerConfig) -> int:
    """Serve until SIGTERM, SIGINT or a Drain, and return the exit status.

    Semantics: 0 after a drain; 1 if the engine died, or is so stuck that it had to be left behind.
    """
    app = await build(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.rpc.lifecycle.interrupt)
    tell_exposure(config)
    if app.endpoint is not None and config.metrics is not None:
        log.info("metrics at http://%s/metrics", Address(config.metrics.host, app.endpoint.port))
    if config.auth and (key := await first_admin_key(app.tenancy)) is not None:
        print(f"the first admin's key, shown this once: {key}", flush=True)
    print(f"ready on {Address(config.listen.host, app.port)}", flush=True)
    drained = asyncio.ensure_future(app.rpc.lifecycle.wait_drained())
    died = asyncio.ensure_future(app.engine.wait_ended())
    await asyncio.wait({drained, died}, return_when=asyncio.FIRST_COMPLETED)
    is_clean = drained.done()
    for waiting in (drained, died):
        waiting.cancel()
    await app.stop()
    return 0 if is_clean and app.engine.has_ended else 1


@contextlib.contextmanager
def _single_threaded(threads: int) -> Iterator[None]:
    """Load with one thread, so that this thread's pool stays empty, and leave the engine's count behind."""
    import torch

    wanted = threads or torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(wanted)


def _read_tls(config: ServerConfig) -> TlsFiles | None:
    if config.tls.cert is None or config.tls.key is None:
        return None
    try:
        return read_tls(config.tls.cert, config.tls.key)
    except TlsError as error:
        raise StartError(str(error)) from error


def _open_tenancy(config: ServerConfig) -> Tenancy:
    try:
        return open_tenancy(config)
    except DatabaseError as error:
        raise StartError(f"{error.reason}: {error}") from error
    except OSError as error:
        raise StartError(f"data_dir: {error}") from error


def _load_base(config: ServerConfig, device: torch.device) -> Base:
    from motley_bases.errors import BaseError
    from motley_bases.loader import load_base, resolve_base

    began, cache = time.monotonic(), config.data_dir / "fingerprints"
    try:
        base = load_base(
            resolve_base(config.base),
            dtype=config.dtype,
            device=device,
            quantize=config.quantize,
            cache_directory=cache,
        )
    except BaseError as error:
        raise StartError(f"base {config.base}: {_tell(error)}") from error
    spec = base.spec
    log.info(
        "base %s, %s, %s, quantization %s, on %s, fingerprint %s%s, loaded in %.1f s",
        spec.name, spec.architecture, spec.dtype, spec.quantization, device, spec.fingerprint,
        f", pruned from {spec.pruned_from}" if spec.pruned_from else "", time.monotonic() - began,
    )  # fmt: skip
    log.info("ledger: %s", ledger_line(ledger_of(base), config.engine))
    return base


def _open_shelf(config: ServerConfig, database: Database, base: Base) -> Shelf:
    from motley_server.library.opening import open_shelf

    try:
        return open_shelf(config, database, base)
    except BundleStoreError as error:
        raise StartError(f"data_dir: {error.reason}: {error}") from error


async def _start_training(
    config: ServerConfig, database: Database, metrics: Metrics, resources: contextlib.AsyncExitStack
) -> Training | None:
    if not config.training.enabled:
        return None
    try:
        training = Training(config.data_dir, database, _training_limits(config), metrics)
    except BundleStoreError as error:
        raise StartError(f"data_dir: {error.reason}: {error}") from error
    resources.push_async_callback(training.stop)
    training.start(config.limits.collect_seconds)
    return training


def _training_limits(config: ServerConfig) -> TrainingLimits:
    asked = config.training
    return TrainingLimits(
        asked.max_dataset_bytes,
        timedelta(seconds=asked.lease_seconds),
        max_dataset_bytes_total=asked.max_dataset_bytes_total,
        max_job_duration=timedelta(seconds=asked.max_job_seconds) or None,
        ended_jobs_kept=timedelta(days=asked.keep_jobs_days) or None,
    )


def _put_named(config: ServerConfig, shelf: Shelf) -> None:
    from motley_adapters.errors import AdapterError

    from motley_server.library.opening import put_named

    for name, directory in config.adapters.items():
        try:
            put_named(shelf, name, directory)
        except (AdapterError, MotleyError) as error:
            raise StartError(f"adapter {name} in {directory}: {_tell(error)}") from error


def _start_engine(config: ServerConfig, base: Base, adapters: AdapterCache, metrics: Metrics) -> EngineFront:
    from motley_server.engine.engine import start_engine

    sizes = config.engine
    _check_kv_cache(base, sizes)
    settings = EngineSettings(
        kv_cache_bytes=sizes.kv_cache_bytes,
        adapter_arena_bytes=sizes.adapter_arena_bytes,
        block_size=sizes.block_size,
        max_running=sizes.max_running,
        max_waiting=sizes.max_waiting,
        token_budget=sizes.token_budget,
        prefix_cache=sizes.prefix_cache,
        reader_queue_events=sizes.reader_queue_events,
    )
    began = time.monotonic()
    engine = start_engine(base, adapters, settings, metrics)
    stats = engine.stats()
    log.info(
        "memory: %.1f MiB of KV cache for %d tokens; adapters %.1f of %.1f MiB on the host, %.1f MiB for them on the "
        "device; warm after %.1f s",
        stats.num_total_blocks * stats.kv_bytes_per_block / MIB,
        stats.num_total_blocks * stats.block_size,
        adapters.nbytes / MIB,
        sizes.adapter_cache_bytes / MIB,
        stats.num_arena_bytes / MIB,
        time.monotonic() - began,
    )
    return engine


def _check_kv_cache(base: Base, sizes: EngineConfig) -> None:
    from motley_bases.kv_cache import bytes_per_block

    num_blocks = -(-MIN_CACHED_TOKENS // sizes.block_size)
    wanted = num_blocks * bytes_per_block(base.spec, sizes.block_size, base.dtype)
    if sizes.kv_cache_bytes < wanted:
        message = f"{sizes.kv_cache_bytes} bytes hold not even {MIN_CACHED_TOKENS} tokens of this base, {wanted} would"
        raise StartError(f"engine.kv_cache_bytes: {message}")


def _facts(config: ServerConfig, base: Base, engine: EngineFront, version: str, device: str) -> ServerFacts:
    from motley_adapters.reader import KIND_READERS

    stats = engine.stats()
    return ServerFacts(
        version=version,
        base=base.spec,
        ledger=ledger_of(base),
        device=device,
        kernel="triton" if base.device.type == "cuda" else "grouped",
        adapter_kinds=tuple(KIND_READERS),
        context_length=min(base.spec.context_length, stats.num_total_blocks * stats.block_size),
        max_message_bytes=config.limits.max_message_bytes,
        max_prompt_bytes=config.limits.max_prompt_bytes,
        max_running=config.engine.max_running,
        max_waiting=config.engine.max_waiting,
        adapter_cache_bytes=config.engine.adapter_cache_bytes,
        adapter_arena_bytes=config.engine.adapter_arena_bytes,
    )


def _rpc_settings(config: ServerConfig, tls: TlsFiles | None) -> RpcSettings:
    limits = config.limits
    return RpcSettings(
        limits.max_message_bytes, limits.health_stall_seconds, limits.drain_seconds, config.reflection, tls
    )


def _tell(error: BaseError | AdapterError | MotleyError) -> str:
    where = f" ({error.field})" if error.field else ""
    return f"{error.reason}{where}: {error.message}"


def _version() -> str:
    try:
        return importlib.metadata.version("motley")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that was not installed
