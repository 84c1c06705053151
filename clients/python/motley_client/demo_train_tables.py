"""How `motley demo-train` lays out what it saw: the job, the requests beside it, and answers to words held out.

Knows nothing of what is right but what each reply says. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from motley_client.demo_scene import shorten
from motley_client.demo_train_job import LIMIT_SECONDS, MIN_EXACT_MATCH, Watched, exact_match
from motley_client.demo_train_load import Asked, latency_of
from motley_client.demo_wave import Reply


def load_table(phases: Mapping[str, Sequence[Asked]]) -> Table:
    """Lay out the steady requests, by when they were asked."""
    table = Table(title="Requests to the base and its adapters")
    for heading in ("asked", "requests", "failed", "wrong", "p50", "p95"):
        table.add_column(heading, justify="left" if heading == "asked" else "right", no_wrap=True)
    for phase, asked in phases.items():
        latency = latency_of(asked)
        times = () if latency is None else (latency.p50_seconds, latency.p95_seconds)
        failed = sum(one.reply is None for one in asked)
        wrong = sum(one.reply is not None and not one.reply.is_right for one in asked)
        table.add_row(phase, *map(str, (len(asked), failed, wrong)), *(f"{1000 * seconds:.0f} ms" for seconds in times))
    return table


def word_table(replies: Sequence[Reply]) -> Table:
    """Lay out the answers to single words, a line for each and a column for each who was asked.

    Semantics: an answer that is wrong is in brackets.
    """
    table = Table(title="Other words, each adapter asked for its own skill")
    asked = list(dict.fromkeys((reply.asked_of, reply.skill) for reply in replies))
    table.add_column("word", no_wrap=True)
    for worn, skill in asked:
        table.add_column("+".join(name for name, _ in worn) or f"base, {skill}", no_wrap=True)
    answers = {(reply.word, reply.asked_of, reply.skill): reply for reply in replies}
    for word in dict.fromkeys(reply.word for reply in replies):
        table.add_row(word, *(_cell(answers[word, *who]) for who in asked))
    return table


def job_table(watched: Watched) -> Table:
    """Lay out what the job came to."""
    job, found = watched.job, watched.job.evaluation
    table = Table(title="The job", show_header=False)
    table.add_row("id", job.id)
    table.add_row("state", "unknown" if job.state is None else job.state.value)
    if job.version is not None:
        table.add_row("published", f"{job.version.name}@{job.version.version} {shorten(job.version.digest)}")
    if job.progress is not None:
        table.add_row("steps", f"{job.progress.step} of {job.spec.batch_size} samples")
    if found is not None:
        table.add_row("held-out loss", f"{found.loss_before:.2f} before, {found.loss_after:.2f} after")
        table.add_row("exact match", f"{exact_match(found)}; the gate asks for {MIN_EXACT_MATCH:.0%}")
    if job.start_time is not None:
        table.add_row("seconds in the queue", f"{(job.start_time - job.create_time).total_seconds():.1f}")
    if watched.step_seconds is not None:
        table.add_row("seconds of its steps", f"{watched.step_seconds:.1f}")
    if job.end_time is not None:
        total = (job.end_time - job.create_time).total_seconds()
        table.add_row("seconds, all in all", f"{total:.1f}; on two slow cores {LIMIT_SECONDS} are the aim")
    return table


def _cell(reply: Reply) -> str:
    answer = escape(repr(reply.answer)[1:-1])
    return f"[green]{answer}[/green]" if reply.is_right else f"[red]({answer})[/red]"
