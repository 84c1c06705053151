"""Quotas at admission: what a request counts for, and that whatever its end its place is given back, once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from admission_door import Door, asking, caller, open_door
from motley_server.asked import AskedAdapter, AskedGeneration, AskedSampling, AskedScoring, TextPrompt, TokenPrompt
from motley_server.errors import InternalError, MotleyError, NotFoundError, ResourceExhaustedError, UnavailableError
from motley_server.registry.records import Quota

ONE = Quota(requests_in_flight=1)


def tokens(number: int) -> Quota:
    return Quota(tokens_per_minute=number)


def run(scenario: Callable[[Door], Awaitable[None]]) -> None:
    """Run a scenario, then end the engine and see that nothing of it is left."""

    async def frame() -> None:
        door = open_door()
        await scenario(door)
        door.engine.may_step.set()
        await door.engine.stop()
        assert door.quotas.num_in_flight("local") == 0
        assert door.leases.held == []
        await door.close()

    asyncio.run(frame())


def num_left(door: Door, capacity: int) -> int:
    """Return how many tokens of a minute's could be admitted now."""
    for number in range(capacity, 0, -1):
        try:
            place = door.quotas.admit("local", tokens(capacity), number)
        except ResourceExhaustedError:
            continue
        place.leave()
        return number
    return 0


async def refused(call: Awaitable[object]) -> str:
    with pytest.raises(MotleyError) as caught:
        await call
    return caught.value.reason


def test_a_request_counts_its_prompt_once_and_every_candidates_answer() -> None:
    async def scenario(door: Door) -> None:
        asked = asking(text="hello", sampling=AskedSampling(max_new_tokens=10, n=3))  # 6 and 30
        assert await refused(door.admission.generate(asked, caller(quota=tokens(35)))) == "QUOTA_TOKENS_PER_MINUTE"
        door.engine.may_step.clear()
        admitted = await door.admission.generate(asked, caller(quota=tokens(36)))
        assert num_left(door, 36) == 0
        door.engine.may_step.set()
        assert [event async for event in admitted.events][-1].usage is not None

    run(scenario)


def test_the_default_length_of_an_answer_is_reserved_too() -> None:
    async def scenario(door: Door) -> None:
        asked = asking(text="hello")  # 6, and 8 of the configuration
        assert await refused(door.admission.generate(asked, caller(quota=tokens(13)))) == "QUOTA_TOKENS_PER_MINUTE"
        await door.admission.generate(asked, caller(quota=tokens(14)))

    run(scenario)


def test_a_cancelled_request_pays_for_its_prompt_and_what_was_generated_and_gives_back_the_rest() -> None:
    async def scenario(door: Door) -> None:
        asked = asking(text="hello", sampling=AskedSampling(max_new_tokens=50))
        admitted = await door.admission.generate(asked, caller(quota=tokens(100)))
        await anext(admitted.events)
        door.engine.may_step.clear()
        await asyncio.sleep(0)
        assert (num_left(door, 100), door.quotas.num_in_flight("local")) == (44, 1)
        [request] = door.engine.submitted
        await admitted.events.aclose()
        door.engine.may_step.set()
        await door.engine.stop()
        num_generated = 100 - 6 - num_left(door, 100)
        assert 1 <= num_generated < 10
        assert door.engine.num_ends[request.request_id] == 1

    run(scenario)


def test_a_request_is_in_flight_until_the_engine_ends_it_however_slow_its_reader() -> None:
    async def scenario(door: Door) -> None:
        admitted = await door.admission.generate(asking(), caller(quota=ONE))
        assert await refused(door.admission.generate(asking(), caller(quota=ONE))) == "QUOTA_REQUESTS_IN_FLIGHT"
        assert (door.refusals.number, door.refusals.by_quota) == (1, {"requests_in_flight": 1})
        [event async for event in admitted.events]
        await door.admission.generate(asking(), caller(quota=ONE))

    run(scenario)


def test_a_request_that_fails_in_the_engine_ends_like_any_other() -> None:
    async def scenario(door: Door) -> None:
        door.engine.failure = InternalError("broken", reason="R")
        admitted = await door.admission.generate(asking(), caller(quota=ONE))
        with pytest.raises(InternalError):
            [event async for event in admitted.events]
        assert door.quotas.num_in_flight("local") == 0

    run(scenario)


FULL = ResourceExhaustedError("full", reason="QUEUE_FULL")
OUTSIDE = {
    "an unknown adapter": (asking(("nobody", 1.0)), None, NotFoundError),
    "a wrong field": (asking(sampling=AskedSampling(n=0)), None, MotleyError),
    "a prompt that is too long": (AskedGeneration(TokenPrompt((5,) * 1000)), None, MotleyError),
    "a full queue": (asking(("alpha", 1.0)), FULL, ResourceExhaustedError),
    "a fault of the engine": (asking(("alpha", 1.0)), RuntimeError("boom"), RuntimeError),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_never_reached_the_engine_counts_for_nothing(name: str) -> None:
    asked, fault, kind = OUTSIDE[name]

    async def scenario(door: Door) -> None:
        door.engine.fault = fault
        for _ in range(3):
            with pytest.raises(kind):
                await door.admission.generate(asked, caller(quota=Quota(None, None, 1, 1, 1000)))
            assert door.quotas.num_in_flight("local") == 0
        assert num_left(door, 1000) == 1000
        door.engine.fault = None
        await door.admission.generate(asking(), caller(quota=Quota(None, None, 1, 1, 1000)))

    run(scenario)


def test_a_prompt_that_is_being_tokenized_is_in_flight_and_not_once_its_caller_has_left() -> None:
    async def scenario(door: Door) -> None:
        waiting, may_go_on = asyncio.Event(), asyncio.Event()

        async def tokenize(prompt: object) -> tuple[int, ...]:
            waiting.set()
            await may_go_on.wait()
            return (1,)

        door.admission.tokenize = tokenize  # type: ignore[method-assign, assignment]
        task = asyncio.ensure_future(door.admission.generate(asking(), caller(quota=ONE)))
        await waiting.wait()
        assert await refused(door.admission.generate(asking(), caller(quota=ONE))) == "QUOTA_REQUESTS_IN_FLIGHT"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert door.quotas.num_in_flight("local") == 0

    run(scenario)


def test_a_score_is_one_request_until_its_last_continuation_ends_and_counts_the_prompt_with_each() -> None:
    async def scenario(door: Door) -> None:
        asked = AskedScoring(TextPrompt("abc"), ("d", "ef", "ghi"))  # 4 + 1, 4 + 2, 4 + 3
        assert await refused(door.admission.score(asked, caller(quota=tokens(17)))) == "QUOTA_TOKENS_PER_MINUTE"
        quota = Quota(requests_in_flight=1, requests_per_minute=1, tokens_per_minute=18)
        door.engine.may_step.clear()
        admitted = await door.admission.score(asked, caller(quota=quota))
        door.engine.cancelled += [one.request.request_id for one in admitted[:2]]
        assert (len(admitted), door.quotas.num_in_flight("local")) == (3, 1)
        door.engine.may_step.set()
        [event async for event in admitted[2].events]
        assert door.quotas.num_in_flight("local") == 0
        assert num_left(door, 18) == 0

    run(scenario)


def test_a_score_that_was_not_admitted_whole_ends_with_what_had_begun() -> None:
    async def scenario(door: Door) -> None:
        submit = door.engine.submit

        def submit_two(*arguments: object) -> object:
            if len(door.engine.submitted) == 2:
                raise FULL
            return submit(*arguments)  # type: ignore[arg-type]

        door.engine.submit = submit_two  # type: ignore[method-assign, assignment]
        door.engine.may_step.clear()
        asked = AskedScoring(TextPrompt("a"), ("b", "c", "d"), (AskedAdapter("alpha"),))
        assert await refused(door.admission.score(asked, caller(quota=tokens(100)))) == "QUEUE_FULL"
        assert door.quotas.num_in_flight("local") == 1
        assert num_left(door, 100) == 91
        door.engine.may_step.set()
        await door.engine.stop()
        assert num_left(door, 100) == 94, "the two that the engine had taken are paid for"

    run(scenario)


def test_a_call_without_the_engine_is_a_request_without_tokens() -> None:
    async def scenario(door: Door) -> None:
        who = caller(quota=Quota(requests_in_flight=1, requests_per_minute=1, tokens_per_minute=0))
        with pytest.raises(MotleyError), door.admission.counting(who):
            await door.admission.tokenize(TextPrompt(""))
        with door.admission.counting(who):
            await door.admission.tokenize(TextPrompt("hello"))
            assert door.quotas.num_in_flight("local") == 1
        with pytest.raises(ResourceExhaustedError, match="1 requests a minute"), door.admission.counting(who):
            pass
        await door.engine.stop()
        with pytest.raises(UnavailableError), door.admission.counting(who):
            pass

    run(scenario)


def test_a_request_carries_its_tenants_weight_to_the_engine() -> None:
    async def scenario(door: Door) -> None:
        admitted = await door.admission.generate(asking(text="hello"), caller(quota=Quota(weight=2.5)))
        assert admitted.request.weight == 2.5

    run(scenario)
