"""What must be true for `motley demo-train` to succeed, beside what must be for `motley demo`.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from motley_client.demo_train_courses import MIN_EXACT_MATCH
from motley_client.demo_train_job import Watched, has_succeeded
from motley_client.demo_train_load import Asked
from motley_client.demo_wave import Reply

Identity = tuple[str, int, str]  # name, version, digest


def job_failures(watched: Watched) -> Iterable[str]:
    """Name every promise that the job breaks."""
    job = watched.job
    if not has_succeeded(job):
        why = f": {job.reason}: {job.message}" if job.reason else ""
        yield f"the job {job.id} is {job.state.value if job.state else 'in a state unknown here'}{why}"
    if job.evaluation is None:
        yield f"nobody told what held-out samples say of {job.spec.adapter_name}"
    elif not (job.evaluation.exact_match_after or 0.0) >= MIN_EXACT_MATCH:
        found = job.evaluation.exact_match_after
        share = "none is known to be" if found is None else f"{found:.1%} are"
        yield f"of the held-out answers of {job.spec.adapter_name} {share} right"


def load_failures(asked: Sequence[Asked]) -> Iterable[str]:
    """Name every promise that the steady requests break: no failure, and answers as right as without training."""
    failed = [one for one in asked if one.reply is None]
    wrong = [one for one in asked if one.reply is not None and not one.reply.is_right]
    if not asked:
        yield "nothing was asked while it was trained"
    if failed:
        yield f"{len(failed)} of {len(asked)} requests failed, the first being {failed[0].prompt}: {failed[0].error}"
    if wrong and wrong[0].reply is not None:
        said = f"{wrong[0].prompt}: {wrong[0].reply.answer!r}"
        yield f"{len(wrong)} of {len(asked)} answers were wrong, the first being that to {said}"


def answer_failures(replies: Sequence[Reply]) -> Iterable[str]:
    """Name the answers that are wrong, where all should be right."""
    for reply in replies:
        if not reply.is_right:
            asked = "+".join(name for name, _ in reply.asked_of) or "the base"
            yield f"{asked} answers {reply.answer!r} to `{reply.skill}: {reply.word} =`, not {reply.right_answer!r}"


def identity_failures(trained: Iterable[Watched], asked: Sequence[Asked], replies: Sequence[Reply]) -> Iterable[str]:
    """Name the adapters that answered by another version than they should.

    Semantics: that is the one which a job has published, and of every other adapter the one that answered first.
    """
    versions = [watched.job.version for watched in trained]
    published = [(version.name, version.version, version.digest) for version in versions if version is not None]
    served = [_identities(reply) for reply in (*(one.reply for one in asked if one.reply is not None), *replies)]
    expected: dict[str, Identity] = {}
    for identity in (*published, *chain(*served)):
        expected.setdefault(identity[0], identity)
    for name, number, digest in dict.fromkeys(chain(*served)):
        _, right_number, right_digest = expected[name]
        if (number, digest) != (right_number, right_digest):
            yield f"{name}@{number} {digest} answered, and not {name}@{right_number} {right_digest}"


def _identities(reply: Reply) -> list[Identity]:
    return [(adapter.name, adapter.version, adapter.digest) for adapter in reply.served_by.adapters]
