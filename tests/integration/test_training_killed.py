"""A training whose process, worker and server are ended by SIGKILL: it goes on, and publishes the same bytes once."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from job_folders import reversals, write_dataset
from mortal_training import MortalTraining, check_history, eventually, trained_undisturbed
from motley_client import (
    ChannelScore,
    GoatSettings,
    JobEvent,
    JobState,
    LoramPruning,
    LoramSettings,
    LoraSettings,
    MethodSettings,
    OptimizerSettings,
    PublishSettings,
    S2ftSettings,
    Stage,
    TrainingJob,
    TrainingMethod,
    TrainingSpec,
)

SAMPLES = reversals(40)
LEASE_SECONDS = 4.0
NUM_INSTANTS = 5
SETTINGS: dict[TrainingMethod, MethodSettings] = {
    TrainingMethod.LORA: LoraSettings(rank=4, dropout=0.1),
    TrainingMethod.S2FT: S2ftSettings(o_share=0.34, down_share=0.1, score=ChannelScore.GRADIENT),
    TrainingMethod.GOAT: GoatSettings(rank=8, experts=4, target_modules=("q_proj", "down_proj")),
    TrainingMethod.LORAM: LoramSettings(LoraSettings(rank=4), LoramPruning.STRUCTURED),
}


def spec_of(folder: Path, name: str, method: TrainingMethod = TrainingMethod.LORA, steps: int = 24) -> TrainingSpec:
    """Return a training that keeps a checkpoint after every second step, and write its data."""
    return TrainingSpec(
        dataset=write_dataset(folder / "lines", SAMPLES),
        settings=SETTINGS[method],
        publish=PublishSettings(name),
        steps=steps,
        batch_size=8,
        micro_batch_size=4,
        seed=7,
        checkpoint_steps=2,
        optimizer=OptimizerSettings(4e-3),
    )


async def begin(house: MortalTraining, spec: TrainingSpec) -> TrainingJob:
    """Have the job queued."""
    [data] = (house.folder / "lines").iterdir()
    await house.client.upload_dataset(data)
    return await house.client.create_training_job(spec)


async def check_outcome(house: MortalTraining, job: TrainingJob, watched: list[JobEvent], digest: str) -> TrainingJob:
    """Check what a job came to that was watched over all kills, and return it as it is."""
    ended = await house.client.get_training_job(job.id)
    assert (ended.state, ended.reason, ended.message) == (JobState.SUCCEEDED, "", "")
    check_history(watched, await house.watch(job.id), ended)
    [version] = await house.versions(job.spec.publish.adapter_name)
    assert (version.digest, version.labels) == (digest, {"motley.job": job.id})
    return ended


def test_a_training_that_loses_its_process_its_worker_and_its_server_publishes_the_same_bytes_once(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        spec = spec_of(tmp_path, "learned")
        async with MortalTraining(tmp_path, LEASE_SECONDS) as house:
            undisturbed = trained_undisturbed(tmp_path / "undisturbed", SAMPLES, spec)
            digest, _ = await asyncio.gather(undisturbed, house.start_server())
            await house.start_worker()
            job = await begin(house, spec)
            watching = asyncio.create_task(house.watch(job.id))
            await eventually(lambda: house.checkpoints(job.id))
            assert house.kill_job()
            await house.goes_on(job.id)
            house.kill_worker()
            await house.start_worker()
            await house.goes_on(job.id)
            house.kill_server()
            await house.start_server()
            watched = await watching
            ended = await check_outcome(house, job, watched, digest)
            assert ended.attempts >= 2
            assert sum(isinstance(one.event, Stage) and "SIGKILL" in one.event.text for one in watched) == 1

    asyncio.run(scenario())


@pytest.mark.soak
@pytest.mark.parametrize("victim", ["job", "worker", "server"])
@pytest.mark.parametrize("method", SETTINGS)
def test_whatever_is_killed_at_random_instants_the_same_bytes_are_published_once(
    tmp_path: Path, method: TrainingMethod, victim: str
) -> None:
    """The instants are between a job's creation and the moment at which an undisturbed one has ended."""
    draw = random.Random(f"{method.value} {victim}")

    async def strike(house: MortalTraining) -> bool:
        """Kill the victim, and tell whether there was one: a job's process may have ended, or not have begun."""
        if victim == "job":
            return house.kill_job()
        if victim == "worker":
            house.kill_worker()
            await house.start_worker()
        else:
            house.kill_server()
            await house.start_server()
        return True

    async def scenario() -> None:
        async with MortalTraining(tmp_path, LEASE_SECONDS) as house:
            await house.start_server()
            await house.start_worker()
            began = time.monotonic()
            first = await begin(house, spec_of(tmp_path, "undisturbed", method, steps=60))
            watched = await house.watch(first.id)
            seconds = time.monotonic() - began
            ended = await house.client.get_training_job(first.id)
            assert ended.version is not None
            digest = ended.version.digest
            await check_outcome(house, first, watched, digest)
            num_struck = number = 0
            while num_struck < NUM_INSTANTS:
                assert number < 4 * NUM_INSTANTS, f"of {number} strikes {num_struck} found a victim"
                instant, number = draw.uniform(0, seconds), number + 1
                job = await begin(house, spec_of(tmp_path, f"struck-{number}", method, steps=60))
                watching = asyncio.create_task(house.watch(job.id))
                await asyncio.sleep(instant)
                before = (await house.client.get_training_job(job.id)).progress
                step = 0 if before is None else before.step
                is_struck = await strike(house)
                num_struck += is_struck
                watched = await watching
                ended = await check_outcome(house, job, watched, digest)
                if is_struck and victim == "job":
                    assert any(isinstance(one.event, Stage) and "SIGKILL" in one.event.text for one in watched)
                print(
                    f"{method.value}, {victim} after {instant:.2f} s of {seconds:.2f} s, about step {step}: "
                    f"{'killed' if is_struck else 'no process was there'}; {ended.attempts} leases"
                )

    asyncio.run(scenario())
