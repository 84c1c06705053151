"""The scheduler, without a model: a fake pass computes what was scheduled and appends a token to whoever caught up."""

from __future__ import annotations

from counting_observer import CountingObserver
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.block_pool import BlockPool
from motley_server.engine.scheduler import Scheduled, Scheduler
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import GenerateRequest, SamplingParams

BLOCK_SIZE = 4


def make_scheduler(
    *, num_blocks: int = 64, max_running: int = 8, token_budget: int = 16, prefix_cache: bool = True
) -> tuple[Scheduler, CountingObserver]:
    observer = CountingObserver()
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, observer, max_running=max_running, token_budget=token_budget, prefix_cache=prefix_cache)
    return scheduler, observer


def make_sequence(name: str, prompt: list[int], seed: bytes = b"base") -> Sequence:
    return Sequence(GenerateRequest(name, "local", tuple(prompt), SamplingParams(max_new_tokens=8)), 0, seed)


def run_pass(scheduler: Scheduler, *, num_new: int = 8) -> list[Scheduled]:
    """Compute one pass; a sequence with `num_new` answered tokens is done."""
    batch = scheduler.schedule()
    scheduler.complete(batch)
    for entry in batch:
        sequence = entry.sequence
        if sequence.num_uncomputed_tokens == 0:
            sequence.token_ids.append(sequence.num_tokens)
            if sequence.num_output_tokens == num_new:
                scheduler.remove(sequence)
    scheduler.check_integrity()
    return batch


def shape(batch: list[Scheduled]) -> dict[str, int]:
    return {entry.sequence.request.request_id: entry.num_tokens for entry in batch}


def test_a_prompt_beyond_the_budget_is_computed_in_chunks() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence("long", list(range(40))))
    assert [shape(run_pass(scheduler)) for _ in range(4)] == [{"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}]


def test_a_stream_goes_on_in_every_pass_while_a_long_prompt_is_computed() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence("stream", [1, 2, 3]))
    run_pass(scheduler)
    scheduler.add(make_sequence("long", list(range(100, 160))))
    assert [shape(run_pass(scheduler)) for _ in range(3)] == [{"stream": 1, "long": 15}] * 3


def test_a_prefix_is_shared_only_under_the_same_seed() -> None:
    scheduler, observer = make_scheduler(token_budget=64)
    prompt = list(range(13))
    scheduler.add(make_sequence("first", prompt))
    run_pass(scheduler)
    scheduler.add(make_sequence("same", prompt))
    scheduler.add(make_sequence("other", prompt, seed=b"adapter"))
    assert shape(run_pass(scheduler)) == {"first": 1, "same": 1, "other": 13}
    assert observer.num_hit_tokens == 12


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler, _ = make_scheduler(token_budget=64)
    prompt = list(range(8))
    scheduler.add(make_sequence("first", prompt))
    run_pass(scheduler)
    scheduler.add(make_sequence("again", prompt))
    assert shape(run_pass(scheduler))["again"] == 4


def test_the_youngest_is_preempted_when_blocks_run_out_and_comes_back_first() -> None:
    scheduler, observer = make_scheduler(num_blocks=4, token_budget=32)
    old, young = make_sequence("old", list(range(8))), make_sequence("young", list(range(50, 58)))
    scheduler.add(old)
    scheduler.add(young)
    assert shape(run_pass(scheduler, num_new=99)) == {"old": 8, "young": 8}
    assert shape(run_pass(scheduler, num_new=99)) == {"old": 1}
    assert observer.num_preemptions == 1
    assert list(scheduler.waiting) == [young]
    assert young.num_computed_tokens == 0


def test_removing_a_waiting_or_running_sequence_gives_everything_back() -> None:
    scheduler, _ = make_scheduler(max_running=1)
    running, waiting = make_sequence("running", [1] * 9), make_sequence("waiting", [2] * 9)
    scheduler.add(running)
    scheduler.add(waiting)
    run_pass(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_work


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=10),
    num_blocks=st.integers(13, 40),
    token_budget=st.integers(1, 48),
    max_running=st.integers(1, 6),
    prefix_cache=st.booleans(),
)
def test_every_sequence_finishes_whatever_the_sizes(
    prompts: list[tuple[int, int, int]], num_blocks: int, token_budget: int, max_running: int, prefix_cache: bool
) -> None:
    scheduler, _ = make_scheduler(
        num_blocks=num_blocks, token_budget=token_budget, max_running=max_running, prefix_cache=prefix_cache
    )
    for index, (length, kind, _) in enumerate(prompts):
        scheduler.add(make_sequence(str(index), [kind] * length))
    for _ in range(4000):
        if not scheduler.has_work:
            break
        batch = run_pass(scheduler)
        assert sum(entry.num_tokens for entry in batch) <= token_budget
        assert len(scheduler.running) <= max_running
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0
