"""`motley demo-train`: adapters trained beside a server that goes on serving, published, and answering at once.

Owns the order of events: a server and a worker as child processes, requests all the while, one job after the other, the
wave that their adapters take part in, what is printed and the exit code. Runs an event loop of its own on the main
thread.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motley_client.aio import AsyncClient
from motley_client.child_server import ChildServer, child_server
from motley_client.child_worker import ChildWorker, child_worker
from motley_client.demo_scene import KINDS, AdapterSet, Scene, find_adapters, server_arguments
from motley_client.demo_tables import metric_table, reply_table
from motley_client.demo_train_courses import COURSES
from motley_client.demo_train_job import Watched, has_succeeded, submit, watch
from motley_client.demo_train_lessons import HELD_OUT
from motley_client.demo_train_load import Asked, steady_requests
from motley_client.demo_train_tables import job_table, load_table, word_table
from motley_client.demo_train_verdict import answer_failures, identity_failures, job_failures, load_failures
from motley_client.demo_verdict import find_failures
from motley_client.demo_wave import BASE_SKILL, WORD, Reply, ask, ask_all
from motley_client.exposition import Exposition, scrape
from motley_client.terminable import run_terminable

QUIET_SECONDS = 4.0  # in which requests are timed before anything is trained


@dataclass(frozen=True, slots=True)
class Trained:
    """How the jobs went, one after the other, and the requests before them and beside each, by its adapter."""

    jobs: Sequence[Watched]
    before: Sequence[Asked]
    beside: dict[str, Sequence[Asked]]

    @property
    def asked(self) -> list[Asked]:
        """List all requests, in the order of their answers."""
        return [*self.before, *chain.from_iterable(self.beside.values())]

    @property
    def is_complete(self) -> bool:
        """Tell whether every job has published what it was to."""
        return len(self.jobs) == len(COURSES) and all(has_succeeded(watched.job) for watched in self.jobs)


@dataclass(frozen=True, slots=True)
class Wave:
    """One wave with the new adapters in it, over a scene: prompts on the demo's word, and others on other words."""

    scene: Scene
    replies: Sequence[Reply]
    others: Sequence[Reply]
    counted: Exposition
    seconds: float


def run_demo_train(console: Console | None = None) -> int:
    """Run the demo, and return 0 if everything it claims came true, 1 if not, and 143 when told to end by SIGTERM.

    Raises: DemoError if there is nothing to show, or the worker ends; ServerStartError; MotleyClientError if the server
    goes away or refuses a job; KeyboardInterrupt. The server and the worker are gone in every case.
    """
    return run_terminable(_demo(console or Console()))


async def _demo(console: Console) -> int:
    taught = {course.skill for course in COURSES}
    kinds = {name: kind for name, kind in KINDS.items() if name not in taught}
    scene = Scene("the tiny base and a LoRA", kinds, (), server_arguments("tiny", find_adapters(kinds)))
    with tempfile.TemporaryDirectory(prefix="motley-demo-") as scratch:
        folder = Path(scratch)
        console.print(f"starting a server with {scene.summary}, and a worker beside it ...")
        async with (
            child_server([*scene.server_arguments, "--data-dir", str(folder / "data")], folder) as server,
            AsyncClient(server.address) as client,
            child_worker(client, server.address, folder) as worker,
        ):
            scene = replace(scene, base_fingerprint=(await client.info()).base_fingerprint)
            trained = await _train(scene, client, worker, console)
            wave = await _send_wave(scene, client, server) if trained.is_complete else None
    for table in _tables(trained, wave):
        console.print(table)
    failures = list(_find_failures(trained, wave))
    for failure in failures:
        console.print(f"[red]not as promised:[/red] {escape(failure)}", soft_wrap=True)
    return 1 if failures else 0


async def _train(scene: Scene, client: AsyncClient, worker: ChildWorker, console: Console) -> Trained:
    """Have one adapter after the other trained, until a job fails, while those that are there are asked all the time.

    Semantics: an adapter that is published is asked from then on.
    """
    jobs: list[Watched] = []
    beside: dict[str, Sequence[Asked]] = {}
    async with steady_requests(client, scene.kinds) as load:
        await asyncio.sleep(QUIET_SECONDS)
        before = tuple(load.asked)
        for course in COURSES:
            first = len(load.asked)
            console.print(f"training {course.skill}, a skill that none of them has, while requests go on ...")
            job = await submit(client, course)
            jobs.append(await worker.while_it_runs(watch(client, job, console)))
            beside[course.skill] = load.asked[first:]
            if not has_succeeded(jobs[-1].job):
                break
            load.add(course.skill)
    return Trained(jobs, before, beside)


async def _send_wave(scene: Scene, client: AsyncClient, server: ChildServer) -> Wave:
    """Send one wave to the base, the adapter that was there, and the new ones."""
    scene = replace(scene, kinds=KINDS)
    own: list[tuple[str, AdapterSet]] = [(BASE_SKILL, ()), *((name, ((name, 1.0),)) for name in scene.kinds)]
    others = [ask(client, skill, word, worn) for word in HELD_OUT if word != WORD for skill, worn in own]
    before = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port)
    began = time.monotonic()
    replies, answers = await asyncio.gather(ask_all(client, scene), asyncio.gather(*others))
    seconds = time.monotonic() - began
    counted = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port) - before
    return Wave(scene, replies, answers, counted, seconds)


def _tables(trained: Trained, wave: Wave | None) -> Iterable[Table]:
    phases = {f"while {name} was trained": asked for name, asked in trained.beside.items()}
    yield load_table({"before any training": trained.before, **phases})
    if wave is not None:
        yield reply_table(wave.replies)
        yield word_table(wave.others)
        yield metric_table(wave.counted, wave.seconds)
    yield job_table(trained.jobs)


def _find_failures(trained: Trained, wave: Wave | None) -> Iterable[str]:
    for watched in trained.jobs:
        yield from job_failures(watched)
    yield from load_failures(trained.asked)
    if wave is not None:
        yield from find_failures(wave.scene, wave.replies, wave.counted)
        yield from answer_failures(wave.others)
        yield from identity_failures(trained.jobs, trained.asked, [*wave.replies, *wave.others])
