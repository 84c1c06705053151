"""Twenty jobs of two tenants in the queue while fifty streams are served: nobody fails, nobody is in another's way."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from job_folders import reversals
from motley_bases.checkpoint import resolve_base
from motley_client import (
    AsyncClient,
    Gate,
    JobState,
    LoraSettings,
    MotleyClientError,
    NotFoundError,
    OptimizerSettings,
    PermissionDeniedError,
    PublishSettings,
    ResourceExhaustedError,
    S2ftSettings,
    TrainingJob,
    TrainingSpec,
    UnauthenticatedError,
)
from motley_client.child_process import child_process
from motley_client.child_server import ChildServer, child_server
from motley_client.exposition import scrape
from motley_client.types_worker import JobEnding, LeaseEnd
from motley_client.worker_calls import LeaseClient, WorkerClient
from motley_server.asked import Role
from motley_server.config import resolve
from motley_server.registry.records import Quota
from motley_server.tenancy import open_tenancy
from peft_adapters import make_adapter

pytestmark = pytest.mark.soak

TENANTS = ("acme", "blue")
NUM_JOBS = 10  # of each tenant, and so many it may have
NUM_STREAMS = 50
CONFIG = "log_level = 'error'\n[engine]\nkv_cache_bytes = 67108864\nthreads = 1\n"
SECONDS = 840.0


@dataclass
class House:
    """A server that asks for keys, a client of each tenant's, and what has come of the jobs so far."""

    server: ChildServer
    folder: Path
    worker_key: str
    clients: dict[str, AsyncClient]
    datasets: dict[str, str] = field(default_factory=dict)
    published: dict[str, dict[str, str]] = field(default_factory=lambda: {tenant: {} for tenant in TENANTS})

    async def submit(self, tenant: str, spec: TrainingSpec) -> TrainingJob:
        return await self.clients[tenant].create_training_job(spec)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[House]:
    (folder / "motley.toml").write_text(CONFIG)
    keys = make_keys(folder / "data")
    arguments = ["--config", str(folder / "motley.toml"), "--data-dir", str(folder / "data"), "--auth"]
    async with (
        child_server([*arguments, "--base", "tiny", "--dtype", "float32"], folder) as server,
        AsyncExitStack() as s,
    ):
        clients = {
            tenant: await s.enter_async_context(AsyncClient(server.address, keys[tenant], timeout=120))
            for tenant in TENANTS
        }
        house = House(server, folder, keys["worker"], clients)
        for place, tenant in enumerate(TENANTS):
            uploaded = await clients[tenant].upload_dataset(reversals(40, start=100 * place))
            house.datasets[tenant] = uploaded.digest
        yield house


def make_keys(data: Path) -> dict[str, str]:
    tenancy = open_tenancy(resolve({}, {"data_dir": str(data)}))
    try:
        for tenant in TENANTS:
            tenancy.tenants.create(tenant, quota=Quota(training_jobs=NUM_JOBS))
        keys = {tenant: tenancy.keys.create(tenant, Role.PUBLISHER)[1] for tenant in TENANTS}
        tenancy.keys.create("local", Role.ADMIN)
        return keys | {"worker": tenancy.keys.create("local", Role.WORKER)[1]}
    finally:
        tenancy.database.close()


def specs_of(dataset: str) -> list[tuple[TrainingSpec, JobState]]:
    """Return what a tenant asks for, and what should come of it; the last is cancelled while it waits."""

    def spec(name: str, settings: LoraSettings | S2ftSettings, rate: float = 4e-3, **more: Any) -> TrainingSpec:
        return TrainingSpec(
            dataset=dataset, settings=settings, publish=PublishSettings(name), steps=6, batch_size=8,
            checkpoint_steps=1, optimizer=OptimizerSettings(rate), **more,
        )  # fmt: skip

    lora, s2ft = LoraSettings(rank=4), S2ftSettings(o_share=0.34, down_share=0.1)
    return [
        *((spec(f"lora-{number}", LoraSettings(rank=number)), JobState.SUCCEEDED) for number in range(1, 6)),
        *((spec(f"s2ft-{number}", s2ft), JobState.SUCCEEDED) for number in range(2)),
        (spec("gated", lora, rate=1e-6, gate=Gate(min_exact_match=1.0)), JobState.REJECTED),
        (spec("burst", lora, rate=1e9), JobState.FAILED),
        (spec("late", lora), JobState.CANCELLED),
    ]


@dataclass
class Load:
    """Streams that follow one another, each under what its tenant has by then."""

    house: House
    num_answered: Counter[str] = field(default_factory=Counter)
    num_adapted: int = 0
    failures: list[str] = field(default_factory=list)
    is_over: bool = False

    async def keep_asking(self, place: int) -> None:
        tenant, number = TENANTS[place % 2], place
        client, published = self.house.clients[tenant], self.house.published[tenant]
        while not self.is_over:
            number += 1
            names = ["", *published]
            name = names[number % len(names)]
            try:
                served = [
                    (one.name, one.digest)
                    async for part in client.stream(
                        f"upper: {number:03d} =", adapters=[name] if name else [], max_new_tokens=40, ignore_eos=True
                    )
                    if part.served_by is not None
                    for one in part.served_by.adapters
                ]
            except MotleyClientError as error:
                self.failures.append(f"{tenant} under {name!r}: {error!r}")
                continue
            if served != ([(name, published[name])] if name else []):
                self.failures.append(f"{tenant} under {name!r} was served by {served}")
            self.num_answered[tenant] += 1
            self.num_adapted += bool(name)


async def refused(kind: type[MotleyClientError], *calls: Awaitable[object]) -> None:
    for call in calls:
        with pytest.raises(kind):
            await call


async def check_what_a_worker_may(house: House, adapter: Path) -> None:
    """Lease a job as a stranger would, and try everything else, by its key, by its token, and after its end."""
    spec = TrainingSpec(
        dataset=house.datasets["acme"], settings=LoraSettings(), publish=PublishSettings("spare"), steps=1
    )
    job = await house.submit("acme", spec)
    address, denied = house.server.address, PermissionDeniedError
    async with WorkerClient(address, house.worker_key) as worker, AsyncClient(address, house.worker_key) as by_key:
        await worker.register_worker("stranger", ["lora"], job.base_fingerprint, "cpu", "0")
        await refused(
            denied,
            by_key.generate("upper: a ="), by_key.get_adapter("spare"), by_key.upload_adapter("spare", adapter),
            by_key.get_training_job(job.id), by_key.create_training_job(spec), by_key.training_capabilities(),
            by_key.upload_dataset(reversals(9)), by_key.get_tenant("acme"), by_key.create_key("acme", "admin"),
            by_key.drain(),
        )  # fmt: skip
        lease = await worker.lease_job("stranger", 10)
        assert lease is not None
        async with LeaseClient(address, lease.token) as held, AsyncClient(address, lease.token) as by_token:
            await refused(
                denied,
                held.upload_adapter("other", adapter, upload_id=lease.upload_id),
                held.upload_adapter("spare", adapter, upload_id="other"),
                held.upload_adapter("spare", adapter, upload_id=lease.upload_id, aliases=["prod"]),
                by_token.generate("upper: a ="), by_token.set_alias("spare", "default", 1),
                by_token.get_training_job(job.id), by_token.list_keys("acme").__anext__(),
            )  # fmt: skip
            await refused(NotFoundError, held.fetch_dataset(house.datasets["blue"], house.folder / "theirs"))
            await held.report_job([], 0, JobEnding(LeaseEnd.FAILED, "STRANGER", "it never trained"))
            await refused(
                UnauthenticatedError,
                held.upload_adapter("spare", adapter, upload_id=lease.upload_id),
                held.fetch_dataset(house.datasets["acme"], house.folder / "ours"),
                held.report_job([], 0),
            )
    assert (await house.clients["acme"].get_training_job(job.id)).reason == "STRANGER"
    await refused(NotFoundError, house.clients["acme"].get_adapter("spare"))


async def check_that_nothing_is_seen(house: House, jobs: dict[str, list[TrainingJob]]) -> None:
    """Check that neither tenant meets anything of the other's."""
    for tenant, other in (TENANTS, TENANTS[::-1]):
        client, theirs = house.clients[tenant], jobs[other][0]
        seen = {one.id async for one in client.list_training_jobs()}
        assert seen >= {one.id for one in jobs[tenant]}
        assert not seen & {one.id for one in jobs[other]}
        assert [one.digest async for one in client.list_datasets()] == [house.datasets[tenant]]
        await refused(
            NotFoundError,
            client.get_training_job(theirs.id), client.cancel_training_job(theirs.id),
            client.watch_training_job(theirs.id).__anext__(), client.get_dataset(house.datasets[other]),
            house.submit(tenant, specs_of(house.datasets[other])[0][0]), client.get_adapter(f"{other}/lora-1"),
        )  # fmt: skip


async def follow(house: House, tenant: str, job: TrainingJob) -> TrainingJob:
    """Watch a job to its end, and have its tenant's streams take what it has published."""
    client = house.clients[tenant]
    async for _ in client.watch_training_job(job.id, timeout=SECONDS):
        pass
    ended = await client.get_training_job(job.id)
    if ended.version is not None:
        house.published[tenant][ended.version.name] = ended.version.digest
    return ended


async def queue(house: House) -> dict[str, list[TrainingJob]]:
    """Have each tenant queue as much as it may, the first all of it before the second, and cancel the last."""
    jobs = {}
    for tenant in TENANTS:
        specs = [spec for spec, _ in specs_of(house.datasets[tenant])]
        jobs[tenant] = [await house.submit(tenant, spec) for spec in specs]
        with pytest.raises(ResourceExhaustedError) as full:
            await house.submit(tenant, specs[0])
        assert full.value.reason == "QUOTA_TRAINING_JOBS"
        await house.clients[tenant].cancel_training_job(jobs[tenant][-1].id)
    return jobs


def waits_of(jobs: list[TrainingJob]) -> list[float]:
    """Return how long jobs have waited for their worker, in seconds."""
    return [(one.start_time - one.create_time).total_seconds() for one in jobs if one.start_time is not None]


def test_twenty_jobs_of_two_tenants_are_trained_in_turns_while_fifty_streams_are_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        adapter = make_adapter(resolve_base("tiny"), tmp_path / "adapter", seed=1)
        async with running(tmp_path) as house, asyncio.timeout(SECONDS):
            await check_what_a_worker_may(house, adapter)
            load = Load(house)
            streams = [asyncio.create_task(load.keep_asking(place)) for place in range(NUM_STREAMS)]
            jobs = await queue(house)
            key, work = {"MOTLEY_KEY": house.worker_key}, ["--base", "tiny", "--work-dir", str(tmp_path / "work")]
            command = ["worker", "--server", house.server.address, *work]
            async with child_process(command, tmp_path / "worker.log", grace_seconds=10, variables=key):
                following = [follow(house, tenant, job) for tenant in TENANTS for job in jobs[tenant]]
                found = await asyncio.gather(*following)
            load.is_over = True
            await asyncio.gather(*streams)
            await check_that_nothing_is_seen(house, jobs)
            waited = scrape("127.0.0.1", house.server.metrics_port)

        ended = {tenant: found[place * NUM_JOBS :][:NUM_JOBS] for place, tenant in enumerate(TENANTS)}
        assert load.failures == []
        wanted = [state for _, state in specs_of("")]
        assert [[job.state for job in ended[tenant]] for tenant in TENANTS] == [wanted, wanted]
        assert {job.reason for jobs in ended.values() for job in jobs} == {"", "GATE_NOT_PASSED", "LOSS_NOT_FINITE"}
        order = sorted((job.start_time, tenant) for tenant in TENANTS for job in ended[tenant] if job.start_time)
        assert all(one != other for (_, one), (_, other) in pairwise(order)), order
        name, waits = "motley_training_wait_seconds", {tenant: waits_of(ended[tenant]) for tenant in TENANTS}
        assert waited.total(f"{name}_count") == sum(map(len, waits.values())) + 1  # the stranger's
        assert load.num_adapted > NUM_STREAMS
        with capsys.disabled():
            print(f"\n{sum(load.num_answered.values())} streams answered, {load.num_adapted} under trained adapters")
            for tenant, seconds in waits.items():
                middle = statistics.median(seconds)
                print(f"{tenant}: waited {min(seconds):.1f} to {max(seconds):.1f} s, median {middle:.1f} s")
            print(f"mean by the server's metrics {waited.mean(name):.1f} s")

    asyncio.run(scenario())
