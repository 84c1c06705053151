"""`motley demo`: one base, one wave of requests, adapters of every kind in the same batches, and two of them fused.

Owns the questions, what a right answer is, and what must be true for the demo to succeed. Works as any client does: it
starts a server as a child process and speaks to it by gRPC and /metrics. Runs an event loop of its own on the main
thread.
"""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motley_client.aio import AsyncClient
from motley_client.child_server import child_server
from motley_client.exposition import Exposition, scrape
from motley_client.types import Generation, ServedBy

WORD = "winter"  # held out: neither the base nor an adapter saw it in a skill's line
BASE_SKILL = "upper"  # what the base can do by itself
MAX_NEW_TOKENS = 16
DIGEST_DIGITS = 8  # that a reader can tell apart at a glance

DISTINCT_ADAPTERS = "motley_batch_distinct_adapters"
BATCH_SIZE = "motley_batch_size"
FORWARD_PASSES = "motley_forward_passes_total"
GENERATED_TOKENS = "motley_generation_tokens_total"

# One embedded adapter of each kind, named for its skill.
KINDS = {"next": "lora", "unvowel": "s2ft", "rotate": "goat", "previous": "loram"}

SKILLS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "next": lambda word: "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word),
    "unvowel": lambda word: "".join("-" if letter in "aeiou" else letter for letter in word),
    "rotate": lambda word: word[1:] + word[0],
    "previous": lambda word: "".join(chr((ord(letter) - ord("a") - 1) % 26 + ord("a")) for letter in word),
}

AdapterSet = tuple[tuple[str, float], ...]  # what a request wears: names and weights; none is the base alone

FUSION: AdapterSet = (("next", 0.9), ("unvowel", 0.8))


class DemoError(Exception):
    """Say what keeps the demo from starting."""

    reason = "DEMO"
    field = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Reply:
    """One prompt asked under a set of adapters: what came back, and what would be right."""

    skill: str
    asked_of: AdapterSet
    answer: str
    right_answer: str
    served_by: ServedBy
    completion_tokens: int

    @property
    def is_right(self) -> bool:
        """Tell whether the answer is the right one, whoever was asked."""
        return self.answer == self.right_answer

    @property
    def is_served_as_asked(self) -> bool:
        """Tell whether exactly the adapters that were named answered, with their weights and of their kinds."""
        served = sorted((adapter.name, adapter.weight, adapter.kind) for adapter in self.served_by.adapters)
        return served == sorted((name, weight, KINDS[name]) for name, weight in self.asked_of)


def run_demo(quantize: str | None = None, console: Console | None = None) -> int:
    """Run the demo, and return 0 if everything it claims came true, 1 if not, and 143 when told to end by SIGTERM.

    Semantics: `quantize` is how the server holds the base, as its own flag says it.
    Raises: DemoError if there is nothing to show; ServerStartError; MotleyClientError if a request fails;
    KeyboardInterrupt. The server is gone in every case.
    """
    try:
        return asyncio.run(_demo(console or Console(), quantize))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


def find_adapters() -> list[Path]:
    """List the embedded adapters that the demo shows, without importing anything of theirs.

    Raises: DemoError, naming those that are missing.
    """
    spec = importlib.util.find_spec("motley_adapters")
    roots = [] if spec is None else spec.submodule_search_locations or []
    folders = (Path(root, "assets", "tiny", name) for root in roots for name in KINDS)
    found = {folder.name: folder for folder in folders if (folder / "adapter_model.safetensors").is_file()}
    if missing := [name for name in KINDS if name not in found]:
        raise DemoError(f"there are no embedded adapters {', '.join(missing)} to show a mixed batch with")
    return [found[name] for name in KINDS]


async def _demo(console: Console, quantize: str | None) -> int:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    folders = find_adapters()
    with tempfile.TemporaryDirectory(prefix="motley-demo-") as scratch:
        arguments = ["--base", "tiny", "--data-dir", str(Path(scratch, "data"))]
        for folder in folders:
            arguments += ["--adapter", f"{folder.name}={folder}"]
        if quantize is not None:
            arguments += ["--quantize", quantize]
        held = "" if quantize is None else f" in {quantize}"
        console.print(f"starting a server with the tiny base{held} and {len(folders)} adapters, one of each kind ...")
        async with child_server(arguments, Path(scratch)) as server:
            before = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port)
            began = time.monotonic()
            async with AsyncClient(server.address) as client:
                replies = await _ask_all(client)
            seconds = time.monotonic() - began
            counted = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port) - before
    console.print(reply_table(replies))
    console.print(metric_table(counted, seconds))
    failures = list(find_failures(replies, counted))
    for failure in failures:
        console.print(f"[red]not as promised:[/red] {escape(failure)}", soft_wrap=True)
    return 1 if failures else 0


async def _ask_all(client: AsyncClient) -> list[Reply]:
    """Ask every prompt of the base, of every adapter and of the fusion, all at once."""
    sets: list[AdapterSet] = [(), *(((name, 1.0),) for name in KINDS), FUSION]
    return await asyncio.gather(*(_ask(client, skill, worn) for skill in (*KINDS, BASE_SKILL) for worn in sets))


async def _ask(client: AsyncClient, skill: str, worn: AdapterSet) -> Reply:
    answer: Generation = await client.generate(
        f"{skill}: {WORD} =", adapters=worn, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS
    )
    return Reply(
        skill=skill,
        asked_of=worn,
        answer=answer.text.strip(),
        right_answer=SKILLS[skill](WORD),
        served_by=answer.served_by,
        completion_tokens=answer.usage.completion_tokens,
    )


def find_failures(replies: Sequence[Reply], counted: Exposition) -> Iterable[str]:
    """Name every promise that the replies or the server's own counters break."""
    own = {(reply.skill, reply.asked_of): reply for reply in replies}
    for reply in replies:
        asked = "+".join(name for name, _ in reply.asked_of)
        if not reply.is_served_as_asked:
            served = ", ".join(_served_lines(reply))
            yield f"`{reply.skill}` was asked of {asked or 'the base'}, and {served} answered"
        if reply.skill in asked.split("+"):
            if not reply.is_right:
                yield f"{asked} answers {reply.answer!r} to `{reply.skill}`, not {reply.right_answer!r}"
            if reply.answer == own[reply.skill, ()].answer:
                yield f"{asked} answers `{reply.skill}` as the base does"
    if not own[BASE_SKILL, ()].is_right:
        yield f"the base answers {own[BASE_SKILL, ()].answer!r} to `{BASE_SKILL}`"
    mixed = sum(count for bound, count in counted.bounds(DISTINCT_ADAPTERS) if bound >= len(KINDS))
    if not mixed:
        yield f"no forward pass held {len(KINDS)} adapters"


def reply_table(replies: Sequence[Reply]) -> Table:
    """Lay out who answered what, within 80 columns; a fusion takes a line for each of its adapters."""
    table = Table(
        title="One wave, one base, every request under its own adapters",
        caption=f"each prompt is `SKILL: {WORD} =`; digests are shortened",
    )
    for heading in ("skill", "answered by", "kind", "weight", "answer", "right"):
        table.add_column(heading, no_wrap=True)
    for place, reply in enumerate(replies):
        last_of_prompt = place + 1 == len(replies) or replies[place + 1].skill != reply.skill
        adapters = reply.served_by.adapters
        table.add_row(
            reply.skill,
            "\n".join(_served_lines(reply)),
            "\n".join(adapter.kind for adapter in adapters),
            "\n".join(f"{adapter.weight:g}" for adapter in adapters),
            escape(repr(reply.answer)[1:-1]),
            "[green]yes[/green]" if reply.is_right else "[dim]no[/dim]",
            end_section=last_of_prompt,
        )
    return table


def metric_table(counted: Exposition, seconds: float) -> Table:
    """Lay out what the server counted during the wave."""
    passes = counted.total(FORWARD_PASSES)
    tokens = counted.total(GENERATED_TOKENS)
    distinct = [bound for bound, count in counted.bounds(DISTINCT_ADAPTERS) if count]
    table = Table(title="What the server counted meanwhile", show_header=False)
    table.add_row("wall seconds", f"{seconds:.2f}")
    table.add_row("generated tokens", f"{tokens:.0f}")
    table.add_row("forward passes", f"{passes:.0f}")
    table.add_row("requests in a pass, on average", f"{counted.mean(BATCH_SIZE):.1f}")
    table.add_row("distinct adapters in a pass, at most", f"{max(distinct, default=0):.0f}")
    return table


def _served_lines(reply: Reply) -> list[str]:
    adapters = [
        f"{one.name}@{one.version} {one.digest.removeprefix('sha256:')[:DIGEST_DIGITS]}"
        for one in reply.served_by.adapters
    ]
    return adapters or [f"{reply.served_by.base_model} alone"]
