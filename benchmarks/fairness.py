"""Two tenants at one server, one at ten times the load: whose tokens, and how long to the first one.

The work: `motley serve --auth` as a child process over a random bf16 Llama of 12 M parameters, two tenants of equal
weight, and each one's requests over gRPC with its own key, under no adapter. Prompts of 16 to 64 tokens, answers of 8
to 48, drawn anew for every request. `quiet` keeps 24 requests in flight where the engine runs 16 at once, so that some
of its own always wait; or it is light: four, with pauses. `loud` is away, keeps 24 too, or 240. The default queue holds
them all: a refused request would end the measurement.

All settings take turns, `--rounds` times, in alternating order. Tokens are counted where they arrive, within a window
that begins once the queue is full. First-token times are of the requests sent within it, each waited for, so that none
is left out for being slow. What grows is compared within a round, and the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from machine import write_result
from motley_client import AsyncClient
from motley_client.child_server import child_server
from rich.console import Console
from rich.table import Table

MAX_RUNNING, MAX_WAITING = 16, 256
BACKLOG = 24  # requests in flight: some wait, even with the engine to themselves
VOCABULARY = 8192
PROMPT_TOKENS, ANSWER_TOKENS = (16, 64), (8, 48)
PAUSE_SECONDS = 0.2  # of the light tenant, at most, between two requests
SETTLE_SECONDS, PATIENCE_SECONDS = 1.5, 60.0
TENANTS = ("quiet", "loud")
# One thread computes; the other core is left to the server's event loop and to these clients.
CONFIG = f"log_level = 'error'\n[engine]\nmax_running = {MAX_RUNNING}\nmax_waiting = {MAX_WAITING}\nthreads = 1\n"


@dataclass(frozen=True, slots=True)
class Setting:
    """How many requests each tenant keeps in flight; the light one pauses between them."""

    quiet: int
    loud: int
    is_light: bool = False


EQUAL, TEN_TIMES = "beside its equal", "beside ten times"
SETTINGS = {
    "alone": Setting(BACKLOG, 0),
    EQUAL: Setting(BACKLOG, BACKLOG),
    TEN_TIMES: Setting(BACKLOG, 10 * BACKLOG),
    "light, alone": Setting(4, 0, is_light=True),
    f"light, {EQUAL}": Setting(4, BACKLOG, is_light=True),
    f"light, {TEN_TIMES}": Setting(4, 10 * BACKLOG, is_light=True),
}


def make_base(directory: Path) -> Path:
    """Save a random base: small enough for many requests, large enough that its passes are what takes time."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(directory)
    return directory


@dataclass
class Tenant:
    """One tenant's requests, and what came of those of the window."""

    client: AsyncClient
    draw: random.Random
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    num_waiting: int = 0  # for their first token
    least_waiting: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    window: tuple[float, float] = (math.inf, math.inf)
    num_owed: int = 0  # sent within the window, first token not there yet

    def begin(self, seconds: float) -> None:
        """Begin the window."""
        now = time.monotonic()
        self.window = (now, now + seconds)
        self.num_prompt_tokens = self.num_answer_tokens = 0
        self.least_waiting = self.num_waiting
        self.first_token_seconds = []

    async def keep_asking(self, pause_seconds: float) -> None:
        """Send one request after the other, until cancelled."""
        while True:
            await asyncio.sleep(self.draw.uniform(0, pause_seconds))
            await self._ask()

    def _is_open(self, moment: float) -> bool:
        return self.window[0] <= moment < self.window[1]

    async def _ask(self) -> None:
        prompt = [self.draw.randrange(10, VOCABULARY) for _ in range(self.draw.randint(*PROMPT_TOKENS))]
        num_new = self.draw.randint(*ANSWER_TOKENS)
        sent, is_first = time.monotonic(), True
        is_counted = self._is_open(sent)
        self.num_owed += is_counted
        self.num_waiting += 1
        stream = self.client.stream(token_ids=prompt, max_new_tokens=num_new, ignore_eos=True)
        async with aclosing(stream) as parts:
            async for part in parts:
                now = time.monotonic()
                num_tokens = sum(len(candidate.token_ids) for candidate in part.candidates)
                if num_tokens and is_first:
                    is_first = False
                    self._note_first(now, now - sent if is_counted else None, len(prompt))
                if self._is_open(now):
                    self.num_answer_tokens += num_tokens

    def _note_first(self, now: float, seconds: float | None, num_prompt_tokens: int) -> None:
        self.num_waiting -= 1
        if seconds is not None:
            self.num_owed -= 1
            self.first_token_seconds.append(seconds)
        if self._is_open(now):
            self.least_waiting = min(self.least_waiting, self.num_waiting)
            self.num_prompt_tokens += num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """What one setting came to in one round; shares are quiet's, of both tenants' tokens."""

    answer_share: float
    prompt_share: float
    tokens_per_second: float  # of answers, both tenants'
    least_waiting: int  # of quiet's requests, at any of its first tokens
    first_token_seconds: tuple[float, ...]

    def quantile(self, fraction: float) -> float:
        """Return the first-token time that so many of the requests did not exceed."""
        return nearest_rank(self.first_token_seconds, fraction)


def nearest_rank(values: tuple[float, ...], fraction: float) -> float:
    """Return the smallest value that at least this fraction of them does not exceed."""
    return sorted(values)[math.ceil(fraction * len(values)) - 1]


@asynccontextmanager
async def two_tenants(folder: Path) -> AsyncIterator[list[AsyncClient]]:
    """Serve the base to two tenants, and yield a client for each."""
    (folder / "motley.toml").write_text(CONFIG)
    arguments = ["--base", str(make_base(folder / "base")), "--config", str(folder / "motley.toml")]
    arguments += ["--data-dir", str(folder / "data")]
    async with child_server(arguments, folder) as server, AsyncClient(server.address) as local:  # as anybody may here
        for name in TENANTS:
            await local.create_tenant(name)
        secrets = [(await local.create_key(name)).secret for name in TENANTS]
    async with (
        child_server([*arguments, "--auth"], folder) as server,
        AsyncClient(server.address, secrets[0]) as quiet,
        AsyncClient(server.address, secrets[1]) as loud,
    ):
        yield [quiet, loud]


async def measure(clients: list[AsyncClient], setting: Setting, seconds: float, seed: int) -> Measured:
    """Keep both tenants at their load, and measure a window of it."""
    quiet, loud = (
        Tenant(client, random.Random(f"{seed}/{name}")) for name, client in zip(TENANTS, clients, strict=True)
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loud.keep_asking(0)) for _ in range(setting.loud)]
        pause = PAUSE_SECONDS if setting.is_light else 0
        tasks += [group.create_task(quiet.keep_asking(pause)) for _ in range(setting.quiet)]
        await asyncio.sleep(SETTLE_SECONDS)
        for tenant in (quiet, loud):
            tenant.begin(seconds)
        await asyncio.sleep(seconds)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while quiet.num_owed:
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
    while (capacity := await clients[0].capacity()).running_requests or capacity.waiting_requests:
        await asyncio.sleep(0.02)
    num_answer_tokens = quiet.num_answer_tokens + loud.num_answer_tokens
    return Measured(
        quiet.num_answer_tokens / num_answer_tokens,
        quiet.num_prompt_tokens / (quiet.num_prompt_tokens + loud.num_prompt_tokens),
        num_answer_tokens / seconds,
        quiet.least_waiting,
        tuple(quiet.first_token_seconds),
    )


async def measure_all(rounds: int, seconds: float) -> dict[str, list[Measured]]:
    """Let all settings take turns, forwards and backwards."""
    measured: dict[str, list[Measured]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        async with two_tenants(Path(folder)) as clients:
            await measure(clients, SETTINGS[TEN_TIMES], 1.0, seed=-1)  # warm
            for number in range(rounds):
                for name in list(SETTINGS)[:: -1 if number % 2 else 1]:
                    measured[name].append(await measure(clients, SETTINGS[name], seconds, seed=number))
    return measured


def growth(later: list[Measured], earlier: list[Measured], fraction: float) -> float:
    """Return by what factor a quantile of the first-token time grew: the median over the rounds."""
    pairs = zip(later, earlier, strict=True)
    return statistics.median(one.quantile(fraction) / other.quantile(fraction) for one, other in pairs)


def summarize(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Work out every setting's row: medians over the rounds, and growth over the same quiet elsewhere."""
    rows = {}
    for name, rounds in measured.items():
        light = "light, " if SETTINGS[name].is_light else ""
        rows[name] = {
            "quiet_in_flight": SETTINGS[name].quiet,
            "loud_in_flight": SETTINGS[name].loud,
            "answer_share": statistics.median(one.answer_share for one in rounds),
            "prompt_share": statistics.median(one.prompt_share for one in rounds),
            "tokens_per_second": statistics.median(one.tokens_per_second for one in rounds),
            "least_waiting": min(one.least_waiting for one in rounds),
            "num_requests": sum(len(one.first_token_seconds) for one in rounds),
            **{
                f"first_token_{label}_ms": 1e3 * statistics.median(one.quantile(fraction) for one in rounds)
                for label, fraction in (("p50", 0.5), ("p99", 0.99))
            },
            "p99_over_alone": growth(rounds, measured[f"{light}alone"], 0.99),
            "p99_over_equal": growth(rounds, measured[f"{light}{EQUAL}"], 0.99),
            "rounds": [
                {"answer_share": one.answer_share, "first_token_p99_ms": 1e3 * one.quantile(0.99)} for one in rounds
            ],
        }
    return rows


def show(rows: dict[str, Any]) -> None:
    """Print the table."""
    columns = ("quiet", "in flight", "share, answers", "prompts", "p50 ms", "p99 ms", "p99 over alone", "over equal")
    table = Table(*columns, "tokens/s", "requests", "fewest waiting")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['quiet_in_flight']} : {row['loud_in_flight']}", f"{row['answer_share']:.1%}",
            f"{row['prompt_share']:.1%}", f"{row['first_token_p50_ms']:.0f}", f"{row['first_token_p99_ms']:.0f}",
            f"{row['p99_over_alone']:.2f}", f"{row['p99_over_equal']:.2f}", f"{row['tokens_per_second']:.0f}",
            str(row["num_requests"]), str(row["least_waiting"]),
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    arguments = parser.parse_args()
    rows = summarize(asyncio.run(measure_all(arguments.rounds, arguments.seconds)))
    show(rows)
    sizes = {"max_running": MAX_RUNNING, "max_waiting": MAX_WAITING}
    path = write_result("fairness", {**sizes, "window_seconds": arguments.seconds, "settings": rows})
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
