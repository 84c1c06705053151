"""How `motley demo-train` lays out what it saw: the jobs, the requests beside them, and answers to words held out.

Knows nothing of what is right but what each reply says. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from motley_client.demo_scene import shorten
from motley_client.demo_train_courses import MIN_EXACT_MATCH
from motley_client.demo_train_job import Watched, percentage
from motley_client.demo_train_load import Asked, latency_of
from motley_client.demo_wave import Reply

LIMIT_SECONDS = 360  # what the training is said to take at most on two slow cores; other machines differ


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


def job_table(trained: Sequence[Watched]) -> Table:
    """Lay out what the jobs came to, a column for each."""
    seconds = sum(one.total_seconds or 0.0 for one in trained)
    table = Table(
        title="The jobs",
        caption=f"{seconds:.0f} seconds in all; {LIMIT_SECONDS} are the aim on two slow cores",
    )
    table.add_column("", no_wrap=True)
    columns = [list(_figures(watched)) for watched in trained]
    for watched in trained:
        table.add_column(watched.job.spec.adapter_name, no_wrap=True)
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(figure for _, figure in row))
    return table


def _figures(watched: Watched) -> Iterable[tuple[str, str]]:
    """Yield what a job came to, each figure with its name; one that nobody told is empty."""
    job, found, version, progress = watched.job, watched.job.evaluation, watched.job.version, watched.job.progress
    yield "method", "" if job.spec.method is None else job.spec.method.value
    yield "state", "unknown" if job.state is None else job.state.value
    yield "digest", "" if version is None else shorten(version.digest)
    yield "steps", "" if progress is None else f"{progress.step} of {job.spec.batch_size}"
    yield "held-out loss before", "" if found is None else f"{found.loss_before:.2f}"
    yield "held-out loss after", "" if found is None else f"{found.loss_after:.2f}"
    yield "exact match before", "" if found is None else percentage(found.exact_match_before)
    yield "exact match after", "" if found is None else percentage(found.exact_match_after)
    yield "the gate asks for", f"{MIN_EXACT_MATCH:.1%}"
    yield "seconds of its steps", _seconds(watched.step_seconds)
    yield "seconds, all in all", _seconds(watched.total_seconds)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def _cell(reply: Reply) -> str:
    answer = escape(repr(reply.answer)[1:-1])
    return f"[green]{answer}[/green]" if reply.is_right else f"[red]({answer})[/red]"
