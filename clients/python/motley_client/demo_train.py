"""`motley demo-train`: an adapter trained beside a server that goes on serving, published, and answering at once.

Owns the order of events: a server and a worker as child processes, requests all the while, the job, the wave that its
adapter takes part in, what is printed and the exit code. Runs an event loop of its own on the main thread.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motley_client.aio import AsyncClient
from motley_client.child_server import ChildServer, child_server
from motley_client.child_worker import ChildWorker, child_worker
from motley_client.demo_scene import KINDS, AdapterSet, Scene, find_adapters, server_arguments
from motley_client.demo_tables import metric_table, reply_table
from motley_client.demo_train_job import Watched, has_succeeded, submit, watch
from motley_client.demo_train_lessons import HELD_OUT, SKILL
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
    """How the training went, and the requests before it and beside it."""

    watched: Watched
    before: Sequence[Asked]
    during: Sequence[Asked]


@dataclass(frozen=True, slots=True)
class Wave:
    """One wave with the new adapter in it, over a scene: every prompt on the demo's word, and others on other words."""

    scene: Scene
    replies: Sequence[Reply]
    others: Sequence[Reply]
    counted: Exposition
    seconds: float


def run_demo_train(console: Console | None = None) -> int:
    """Run the demo, and return 0 if everything it claims came true, 1 if not, and 143 when told to end by SIGTERM.

    Raises: DemoError if there is nothing to show, or the worker ends; ServerStartError; MotleyClientError if the server
    goes away or refuses the job; KeyboardInterrupt. The server and the worker are gone in every case.
    """
    return run_terminable(_demo(console or Console()))


async def _demo(console: Console) -> int:
    kinds = {name: kind for name, kind in KINDS.items() if name != SKILL}
    arguments = server_arguments("tiny", find_adapters(kinds))
    scene = Scene(f"the tiny base and {len(kinds)} adapters", kinds, (), arguments)
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
            wave = await _send_wave(scene, client, server) if has_succeeded(trained.watched.job) else None
    for table in _tables(trained, wave):
        console.print(table)
    failures = list(_find_failures(trained, wave))
    for failure in failures:
        console.print(f"[red]not as promised:[/red] {escape(failure)}", soft_wrap=True)
    return 1 if failures else 0


async def _train(scene: Scene, client: AsyncClient, worker: ChildWorker, console: Console) -> Trained:
    """Have the adapter trained while the base and the adapters of the scene are asked all the time."""
    async with steady_requests(client, scene.kinds) as asked:
        await asyncio.sleep(QUIET_SECONDS)
        num_before = len(asked)
        console.print(f"training {SKILL}, a skill that none of them has, while requests go on ...")
        job = await submit(client)
        watched = await worker.while_it_runs(watch(client, job, console))
    return Trained(watched, asked[:num_before], asked[num_before:])


async def _send_wave(scene: Scene, client: AsyncClient, server: ChildServer) -> Wave:
    """Send one wave to the base, the adapters that were there, and the new one."""
    scene = replace(scene, kinds={**scene.kinds, SKILL: KINDS[SKILL]})
    own: list[tuple[str, AdapterSet]] = [(BASE_SKILL, ()), *((name, ((name, 1.0),)) for name in scene.kinds)]
    others = [ask(client, skill, word, worn) for word in HELD_OUT if word != WORD for skill, worn in own]
    before = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port)
    began = time.monotonic()
    replies, answers = await asyncio.gather(ask_all(client, scene), asyncio.gather(*others))
    seconds = time.monotonic() - began
    counted = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port) - before
    return Wave(scene, replies, answers, counted, seconds)


def _tables(trained: Trained, wave: Wave | None) -> Iterable[Table]:
    yield load_table({"before the training": trained.before, "while it ran": trained.during})
    if wave is not None:
        yield reply_table(wave.replies)
        yield word_table(wave.others)
        yield metric_table(wave.counted, wave.seconds)
    yield job_table(trained.watched)


def _find_failures(trained: Trained, wave: Wave | None) -> Iterable[str]:
    asked = [*trained.before, *trained.during]
    yield from job_failures(trained.watched)
    yield from load_failures(asked)
    if wave is not None:
        yield from find_failures(wave.scene, wave.replies, wave.counted)
        yield from answer_failures(wave.others)
        yield from identity_failures(trained.watched, asked, [*wave.replies, *wave.others])
