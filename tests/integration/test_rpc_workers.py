"""WorkerService over the wire: who may lend a hand, who waits for a job, and who is lent which."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from adapter_calls import refused
from google.protobuf.duration_pb2 import Duration
from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec
from motley_server.registry.job_records import Leased
from motley_server.rpc.worker_terms import terms_of
from rpc_harness import Shell, eventually, make_base, serving
from training_calls import (
    DATA,
    FINGERPRINT,
    at_work,
    create,
    get,
    hands_of,
    lease,
    queue,
    register,
    send,
    spec_with,
    whole_dataset,
    worker_key,
)

Code = grpc.StatusCode
pb = training_pb2


async def met(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    refusal = await refused(call)
    return refusal.code, refusal.reason


def lora(**fields: Any) -> pb.RegisterWorkerRequest:
    said = {"name": "w", "methods": [pb.TRAINING_METHOD_LORA], "base_fingerprint": FINGERPRINT} | fields
    return pb.RegisterWorkerRequest(**said)


def test_a_worker_is_told_how_the_base_is_held_and_for_how_long_a_lease_is() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            answer = await register(shell)
            assert (answer.quantization, answer.dtype) == ("none", "float32")
            assert answer.lease_duration == Duration(seconds=30)

    asyncio.run(scenario())


def test_a_lease_repeats_the_digest_of_the_terms_and_other_terms_have_another() -> None:
    async def digests(base: BaseSpec) -> tuple[str, str]:
        async with serving(base=base) as shell:
            told = await register(shell)
            await queue(shell)
            held = await lease(shell)
            assert held is not None
            return told.terms_digest, held.terms_digest

    async def scenario() -> None:
        plain = make_base()
        told, held = await digests(plain)
        assert told == held
        assert re.fullmatch("sha256:[0-9a-f]{64}", told)
        assert (await digests(replace(plain, quantization="nf4")))[1] not in ("", told)

    asyncio.run(scenario())


def test_every_term_is_in_the_digest() -> None:
    base, seconds = make_base(), timedelta(seconds=30)
    ways = [(base, seconds), (base, seconds * 2)]
    ways += [(replace(base, **{name: "other"}), seconds) for name in ("fingerprint", "quantization", "dtype")]
    assert len({terms_of(*way).terms_digest for way in ways}) == 5
    assert terms_of(make_base(), seconds) == terms_of(base, seconds)


def test_a_worker_of_another_key_is_lent_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            mine, theirs = await worker_key(shell), await worker_key(shell)
            await queue(shell)
            await register(shell, metadata=mine)
            for options in ({"metadata": theirs}, {}):
                refusal = await refused(lease(shell, **options))
                assert (refusal.code, refusal.reason, refusal.field) == (
                    Code.PERMISSION_DENIED, "WORKER_OF_ANOTHER_KEY", "worker",
                )  # fmt: skip
            assert await lease(shell, metadata=mine) is not None

    asyncio.run(scenario())


BAD_WORKERS: dict[str, tuple[pb.RegisterWorkerRequest, grpc.StatusCode, str, str]] = {
    "no name": (lora(name=""), Code.INVALID_ARGUMENT, "INVALID_WORKER", "name"),
    "a name of slashes": (lora(name="../x"), Code.INVALID_ARGUMENT, "INVALID_WORKER", "name"),
    "no method": (lora(methods=[]), Code.INVALID_ARGUMENT, "METHOD_REQUIRED", "methods"),
    "a method without a name": (lora(methods=[0]), Code.INVALID_ARGUMENT, "METHOD_REQUIRED", "methods"),
    "a method of tomorrow": (lora(methods=[77]), Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "methods[0]"),
    "a device of lines": (lora(device="a\nb"), Code.INVALID_ARGUMENT, "INVALID_WORKER", "device"),
    "another base": (
        lora(base_fingerprint="sha256:" + "0" * 64), Code.FAILED_PRECONDITION, "BASE_MISMATCH", "base_fingerprint",
    ),
    "no base": (lora(base_fingerprint=""), Code.FAILED_PRECONDITION, "BASE_MISMATCH", "base_fingerprint"),
}  # fmt: skip


def test_a_worker_that_fits_nothing_is_refused() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for name, (request, code, reason, field) in BAD_WORKERS.items():
                refusal = await refused(shell.workers.RegisterWorker(request))
                assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field), name

    asyncio.run(scenario())


def test_a_job_goes_to_a_worker_that_can_do_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell, spec_with(method=pb.TRAINING_METHOD_S2FT))
            await shell.workers.RegisterWorker(lora())
            assert await lease(shell, "w") is None
            held = await lease_of(shell)
            assert (held.job.id, held.job.state, held.job.worker) == (job.id, pb.JOB_STATE_RUNNING, "worker-1")
            assert held.job.spec == job.spec
            assert (held.job.attempts, held.job.HasField("start_time")) == (1, True)
            assert held.token.startswith("mj_")
            assert held.expire_time.ToDatetime() > held.job.start_time.ToDatetime()

    async def lease_of(shell: Shell) -> pb.Lease:
        return (await hands_of(shell)).held

    asyncio.run(scenario())


def test_who_never_registered_is_lent_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(lease(shell))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "WORKER_NOT_REGISTERED", "worker")
            await register(shell)
            for wait in (Duration(seconds=61), Duration(seconds=-1)):
                bad = await refused(shell.workers.LeaseJob(pb.LeaseJobRequest(worker="worker-1", wait=wait)))
                assert (bad.reason, bad.field) == ("OUT_OF_RANGE", "wait")

    asyncio.run(scenario())


def test_a_worker_that_waits_is_woken_by_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await register(shell)
            await send(shell, whole_dataset(DATA))
            waiting = asyncio.create_task(lease(shell, wait=60))
            await eventually(lambda: shell.training.job_desk.num_waiting == 1)
            await asyncio.sleep(0.05)  # it has looked, and waits
            job = await create(shell)
            held = await asyncio.wait_for(waiting, 5)
            assert held is not None
            assert held.job.id == job.id

    monkeypatch.setattr("motley_server.training.jobs.LOOK_SECONDS", 60.0)
    asyncio.run(scenario())


def test_a_worker_waits_as_long_as_it_says_and_no_longer() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await register(shell)
            began = asyncio.get_running_loop().time()
            assert await lease(shell, wait=0.2) is None
            assert 0.2 <= asyncio.get_running_loop().time() - began < 1

    asyncio.run(scenario())


def test_two_workers_that_wait_are_lent_two_jobs() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await register(shell, "a")
            await register(shell, "b")
            await send(shell, whole_dataset(DATA))
            waiting = [asyncio.create_task(lease(shell, name, wait=30)) for name in "ab"]
            await eventually(lambda: shell.training.job_desk.num_waiting == 2)
            made = {(await create(shell, spec_with(seed=seed))).id for seed in range(2)}
            found = await asyncio.wait_for(asyncio.gather(*waiting), 5)
            assert {one.job.id for one in found if one is not None} == made

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["while it waits", "while a job is being lent to it"])
def test_a_worker_that_is_gone_before_it_is_answered_holds_no_job(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell) if moment != "while it waits" else None
            await register(shell)
            lent, may_go_on = asyncio.Event(), asyncio.Event()
            run = shell.training.job_desk._run

            async def slow(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                answer = await run(function, *args, **kwargs)
                if isinstance(answer, Leased):
                    lent.set()
                    await may_go_on.wait()
                return answer

            monkeypatch.setattr(shell.training.job_desk, "_run", slow)
            duration = Duration(seconds=60)
            call = shell.workers.LeaseJob(pb.LeaseJobRequest(worker="worker-1", wait=duration))
            if job is None:
                await eventually(lambda: shell.training.job_desk.num_waiting == 1)
            else:
                await asyncio.wait_for(lent.wait(), 5)
            call.cancel()
            await eventually(lambda: shell.training.job_desk.num_waiting == 0)
            may_go_on.set()
            monkeypatch.undo()
            job = job or await queue(shell)
            held = await lease(shell, wait=5)
            assert held is not None
            assert held.job.id == job.id
            assert (await get(shell, job.id)).state == pb.JOB_STATE_RUNNING

    asyncio.run(scenario())


def test_a_draining_server_lends_nothing_and_hears_what_runs() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            await register(shell, "worker-2")
            waiting = asyncio.create_task(met(lease(shell, "worker-2", wait=60)))
            await eventually(lambda: shell.training.job_desk.num_waiting == 1)
            await shell.rpc.lifecycle.drain(1)
            assert await asyncio.wait_for(waiting, 5) == (Code.UNAVAILABLE, "DRAINING")
            assert await met(lease(shell, "worker-2")) == (Code.UNAVAILABLE, "DRAINING")
            assert await met(register(shell)) == (Code.UNAVAILABLE, "DRAINING")
            assert await met(work.publish()) == (Code.UNAVAILABLE, "DRAINING")
            await work.report(pb.JobEvent(checkpoint_step=1))
            assert await work.fetch() == DATA

    asyncio.run(scenario())
