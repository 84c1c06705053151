"""The requests that go on while `motley demo-train` trains: the base and the adapters are asked all the time.

Owns who asks what and how often, and what counts as an answer. Works as any client does. Runs on the caller's event
loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle

from motley_client.aio import AsyncClient
from motley_client.demo_train_lessons import HELD_OUT
from motley_client.demo_wave import Reply, ask
from motley_client.errors import MotleyClientError

BASE_SKILLS = ("upper", "copy")  # of which the base alone is asked
PAUSE_SECONDS = 0.1  # from an answer to the next question of the same asker
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and what became of it: a reply, or why there is none.

    Units: `began` on the monotonic clock, in seconds.
    """

    skill: str
    word: str
    adapter: str
    began: float
    seconds: float
    reply: Reply | None
    error: str

    @property
    def prompt(self) -> str:
        """Name the question, and who was asked."""
        return f"`{self.skill}: {self.word} =` of {self.adapter or 'the base'}"


@dataclass(frozen=True, slots=True)
class Latency:
    """How long answers took: half of them at most `p50_seconds`, 95 of 100 at most `p95_seconds`."""

    p50_seconds: float
    p95_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """The requests that go on: what was asked so far, and how to have one more adapter asked."""

    asked: list[Asked]
    add: Callable[[str], None]


@asynccontextmanager
async def steady_requests(client: AsyncClient, adapters: Iterable[str]) -> AsyncIterator[Load]:
    """Ask the base and the adapters, each its own skill, while the block runs.

    Semantics: one request of each at a time, with a pause in between. One that fails is noted, and the next is asked.
    When the block has ended well, what is under way is waited for.
    """
    asked: list[Asked] = []
    is_over = asyncio.Event()
    askers: list[asyncio.Task[None]] = []

    def add(adapter: str) -> None:
        askers.append(asyncio.create_task(_ask_on(client, adapter, asked, is_over)))

    for adapter in ("", *adapters):
        add(adapter)
    try:
        yield Load(asked, add)
        is_over.set()
        await asyncio.gather(*askers)
    finally:
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)


def latency_of(asked: Iterable[Asked]) -> Latency | None:
    """Return how long the answers took, None if there is none."""
    seconds = sorted(one.seconds for one in asked if one.reply is not None)
    if not seconds:
        return None
    p50, p95 = (seconds[min(int(share * len(seconds)), len(seconds) - 1)] for share in (0.5, 0.95))
    return Latency(p50, p95)


async def _ask_on(client: AsyncClient, adapter: str, asked: list[Asked], is_over: asyncio.Event) -> None:
    questions = _questions(adapter)
    while not is_over.is_set():
        asked.append(await _ask_once(client, adapter, *next(questions)))
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await is_over.wait()
        except TimeoutError:
            continue


def _questions(adapter: str) -> Iterator[tuple[str, str]]:
    skills = (adapter,) if adapter else BASE_SKILLS
    return cycle([(skill, word) for word in HELD_OUT for skill in skills])


async def _ask_once(client: AsyncClient, adapter: str, skill: str, word: str) -> Asked:
    began, reply, error = time.monotonic(), None, ""
    try:
        worn = ((adapter, 1.0),) if adapter else ()
        reply = await ask(client, skill, word, worn, timeout=TIMEOUT_SECONDS)
    except MotleyClientError as failure:
        error = f"{failure.message} ({failure.reason})"
    return Asked(skill, word, adapter, began, time.monotonic() - began, reply, error)
