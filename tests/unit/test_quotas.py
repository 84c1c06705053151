"""Quotas: what is admitted in any window, when to come back, what is given back, and what is forgotten."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.bucket import Bucket
from motley_server.errors import ResourceExhaustedError
from motley_server.quotas import Place, Quotas
from motley_server.registry.records import Quota

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
TOKENS = 600  # a minute: 10 a second


@dataclass
class Desk:
    """Quotas under a clock that stands still until it is moved."""

    time: int = 5 * SECOND
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self, lambda: self.time)

    def quota_exceeded(self, quota: str) -> None:
        self.refused[quota] += 1

    def refuse(self, quota: Quota, num_tokens: int = 1, tenant_id: str = "a") -> ResourceExhaustedError:
        with pytest.raises(ResourceExhaustedError) as caught:
            self.quotas.admit(tenant_id, quota, num_tokens)
        return caught.value


def finish(place: Place, num_used_tokens: int) -> None:
    place.use(num_used_tokens)
    place.leave()


def admits(desk: Desk, quota: Quota, num_tokens: int) -> bool:
    """Tell whether a request would be admitted, and leave everything as it is."""
    try:
        desk.quotas.admit("a", quota, num_tokens).leave()
    except ResourceExhaustedError:
        return False
    return True


# --- any schedule -----------------------------------------------------------------------------------------------------


@dataclass
class Admitted:
    """A request that was let in, and what it has cost so far."""

    tenant_id: str
    time: int
    place: Place
    num_kept: int
    is_over: bool = False
    never_ran: bool = False


def check_windows(requests: list[Admitted], capacity: int, costs: list[int]) -> None:
    """Check every window that begins and ends with a request: no other can hold more."""
    for first, begin in enumerate(requests):
        total = 0
        for request, cost in zip(requests[first:], costs[first:], strict=True):
            total += cost
            nanoseconds = request.time - begin.time
            assert total * 60 * SECOND <= capacity * (60 * SECOND + nanoseconds)


STEP = st.tuples(
    st.sampled_from(["a", "b"]),
    st.one_of(st.integers(0, 2 * SECOND), st.integers(0, 90 * SECOND)),  # time that passes before
    st.integers(0, 700),  # tokens asked for: more than there can be, too
    st.one_of(st.none(), st.floats(0, 1)),  # who ends after it: which, and how much of it was used
    st.floats(0, 1),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_no_window_of_any_schedule_holds_more_than_its_share_and_nothing_leaks(steps: list[tuple]) -> None:
    desk, quota = Desk(), Quota(requests_in_flight=5, requests_per_minute=20, tokens_per_minute=TOKENS)
    requests: list[Admitted] = []
    for tenant_id, nanoseconds, num_tokens, which, share, never_ran in steps:
        desk.time += nanoseconds
        with suppress(ResourceExhaustedError):
            place = desk.quotas.admit(tenant_id, quota, num_tokens)
            requests.append(Admitted(tenant_id, desk.time, place, num_tokens))
        running = [one for one in requests if not one.is_over]
        if running and which is not None:
            ending = running[int(which * (len(running) - 1))]
            ending.is_over, ending.never_ran = True, never_ran
            if not never_ran:
                num_used = int(share * ending.num_kept)
                ending.place.use(num_used)
            ending.place.leave()
            ending.num_kept = 0 if never_ran else num_used
        for tenant in "ab":
            # Nothing given back may let a window hold more, whichever end it is that came.
            mine = [one for one in requests if one.tenant_id == tenant]
            check_windows(mine, TOKENS, [one.num_kept for one in mine])
            check_windows(mine, 20, [int(not one.never_ran) for one in mine])
            num_in_flight = sum(not one.is_over for one in mine)
            assert desk.quotas.num_in_flight(tenant) == num_in_flight <= 5
    for one in requests:
        if not one.is_over:
            one.place.leave()
    desk.time += 60 * SECOND
    finish(desk.quotas.admit("a", quota, TOKENS), TOKENS)  # a minute without requests has filled everything
    assert desk.refuse(quota, 1).retry_after_seconds == 0.1, "and no more than everything"
    desk.time += 60 * SECOND
    desk.quotas.admit("c", quota, 1).leave()
    assert desk.quotas.num_tenants == 1, "idle tenants are forgotten"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 997), st.booleans()), min_size=1, max_size=20),
    st.integers(1, 997),
)
def test_the_same_request_is_admitted_at_the_time_that_was_said_and_no_millisecond_before(
    steps: list[tuple[int, int, bool]], num_tokens: int
) -> None:
    desk, quota = Desk(), Quota(requests_per_minute=7, tokens_per_minute=997)
    for nanoseconds, taken, ends in steps:
        desk.time += nanoseconds
        if admits(desk, quota, taken):
            place = desk.quotas.admit("a", quota, taken)
            if ends:
                finish(place, taken // 2)
    if admits(desk, quota, num_tokens):
        return
    said = desk.refuse(quota, num_tokens).retry_after_seconds
    assert said is not None
    milliseconds = round(said * 1000)
    assert said == milliseconds / 1000
    desk.time += (milliseconds - 1) * MILLISECOND
    assert not admits(desk, quota, num_tokens)
    desk.time += MILLISECOND
    assert admits(desk, quota, num_tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_what_a_tenant_may_do_does_not_depend_on_another(steps: list[tuple]) -> None:
    quota = Quota(requests_in_flight=3, requests_per_minute=10, tokens_per_minute=TOKENS)

    def verdicts(tenants: str) -> list[tuple[str, float | None] | None]:
        """Return how each request of tenant a fared, among those of `tenants` alone."""
        desk, found, places = Desk(), [], {"a": [], "b": []}
        for tenant_id, nanoseconds, num_tokens, which, share, _ in steps:
            desk.time += nanoseconds
            if tenant_id not in tenants:
                continue
            verdict = None
            try:
                places[tenant_id].append((desk.quotas.admit(tenant_id, quota, num_tokens), num_tokens))
            except ResourceExhaustedError as error:
                verdict = error.reason, error.retry_after_seconds
            if which is not None and places[tenant_id]:
                place, charged = places[tenant_id].pop(0)
                finish(place, int(share * charged))
            if tenant_id == "a":
                found.append(verdict)
        return found

    assert verdicts("ab") == verdicts("a")


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_bucket_is_exact_to_the_nanosecond(capacity: int, amount: int, taken: int) -> None:
    amount, taken = min(amount, capacity), min(taken, capacity)
    bucket = Bucket()
    assert bucket.wait(capacity, capacity, 0) == 0
    bucket.take(taken)
    wanted = (amount + taken - capacity) * 60 * SECOND  # of which `capacity` flows in a nanosecond
    nanoseconds = bucket.wait(amount, capacity, 0)
    assert (nanoseconds - 1) * capacity < max(wanted, 0) <= nanoseconds * capacity or nanoseconds == 0 >= wanted
    assert bucket.wait(amount, capacity, nanoseconds) == 0


# --- each by itself ---------------------------------------------------------------------------------------------------


def test_without_limits_everything_is_admitted() -> None:
    desk = Desk()
    places = [desk.quotas.admit("a", Quota(), 10**9) for _ in range(100)]
    assert desk.quotas.num_in_flight("a") == 100
    for place in places:
        place.leave()
    assert (desk.quotas.num_in_flight("a"), desk.refused) == (0, Counter())


def test_a_full_flight_is_told_to_come_back_until_one_has_ended() -> None:
    desk, quota = Desk(), Quota(requests_in_flight=2)
    first, _second = [desk.quotas.admit("a", quota, 1) for _ in range(2)]
    error = desk.refuse(quota)
    assert (error.reason, error.field) == ("QUOTA_REQUESTS_IN_FLIGHT", "quota.requests_in_flight")
    assert error.retry_after_seconds == 1.0
    assert "allows 2" in error.message
    assert desk.quotas.num_in_flight("a") == 2
    first.leave()
    assert admits(desk, quota, 1)


def test_requests_flow_back_one_by_one() -> None:
    desk, quota = Desk(), Quota(requests_per_minute=60)
    for _ in range(60):
        finish(desk.quotas.admit("a", quota, 1), 1)
    error = desk.refuse(quota)
    assert (error.reason, error.field) == ("QUOTA_REQUESTS_PER_MINUTE", "quota.requests_per_minute")
    assert error.retry_after_seconds == 1.0
    assert "60 requests a minute" in error.message
    assert "in 1 s" in error.message


def test_the_longer_of_two_waits_is_told() -> None:
    desk, quota = Desk(), Quota(requests_per_minute=60, tokens_per_minute=TOKENS)
    for _ in range(60):
        finish(desk.quotas.admit("a", quota, 10), 10)
    assert desk.refuse(quota, 5).reason == "QUOTA_REQUESTS_PER_MINUTE"  # 1 s against half of one
    error = desk.refuse(quota, 30)
    assert (error.reason, error.retry_after_seconds) == ("QUOTA_TOKENS_PER_MINUTE", 3.0)


def test_a_request_above_a_minutes_worth_is_refused_for_good() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    error = desk.refuse(quota, TOKENS + 1)
    assert (error.reason, error.field) == ("QUOTA_TOKENS_PER_MINUTE", "quota.tokens_per_minute")
    assert error.retry_after_seconds is None
    assert "601 tokens" in error.message
    assert "never be admitted" in error.message
    assert admits(desk, quota, TOKENS)


@pytest.mark.parametrize("name", ["requests_in_flight", "requests_per_minute", "tokens_per_minute"])
def test_a_quota_of_nothing_lets_nothing_through_and_names_no_time(name: str) -> None:
    desk = Desk()
    error = desk.refuse(Quota(**{name: 0}))
    assert (error.field, error.retry_after_seconds) == (f"quota.{name}", None)
    assert desk.refused == {name: 1}
    assert desk.quotas.num_in_flight("a") == 0


def test_a_request_without_tokens_needs_none() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    finish(desk.quotas.admit("a", quota, TOKENS), TOKENS)
    assert admits(desk, quota, 0)
    assert admits(desk, Quota(tokens_per_minute=0), 0)


def test_what_was_not_used_is_there_again_at_once() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    finish(desk.quotas.admit("a", quota, TOKENS), 200)
    assert admits(desk, quota, 400)
    assert not admits(desk, quota, 401)


def test_what_has_flowed_back_is_not_given_back_again() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    long = desk.quotas.admit("a", quota, TOKENS)
    desk.time += 60 * SECOND
    finish(desk.quotas.admit("a", quota, TOKENS), TOKENS)
    long.leave()
    assert desk.refuse(quota, 1).retry_after_seconds == 0.1


def test_what_one_gave_back_does_not_shield_another_from_the_flow() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    short, long = [desk.quotas.admit("a", quota, 300) for _ in range(2)]
    short.leave()
    desk.time += 30 * SECOND  # 300 tokens: the long one's
    finish(desk.quotas.admit("a", quota, 300), 300)
    long.leave()
    assert desk.refuse(quota, TOKENS).retry_after_seconds == 30.0


def test_the_flow_fills_what_is_over_before_what_is_open() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    long = desk.quotas.admit("a", quota, 300)
    finish(desk.quotas.admit("a", quota, 300), 300)
    desk.time += 30 * SECOND  # 300 tokens: the second request's
    finish(long, 0)
    assert admits(desk, quota, TOKENS)


def test_a_request_that_never_ran_counts_for_nothing() -> None:
    desk, quota = Desk(), Quota(requests_per_minute=1, tokens_per_minute=TOKENS)
    desk.quotas.admit("a", quota, TOKENS).leave()
    finish(desk.quotas.admit("a", quota, TOKENS), 0)
    assert desk.refuse(quota).reason == "QUOTA_REQUESTS_PER_MINUTE"


def test_a_refusal_takes_nothing() -> None:
    desk, quota = Desk(), Quota(requests_per_minute=2, tokens_per_minute=TOKENS)
    finish(desk.quotas.admit("a", quota, TOKENS), TOKENS)
    for _ in range(5):
        desk.refuse(quota, 10)
    desk.time += SECOND
    finish(desk.quotas.admit("a", quota, 10), 10)
    assert desk.refused == {"tokens_per_minute": 5}


def test_a_place_that_is_shared_ends_with_its_last_holder_and_only_once() -> None:
    desk, quota = Desk(), Quota(requests_in_flight=1, tokens_per_minute=TOKENS)
    with desk.quotas.admit("a", quota, TOKENS) as place:
        place.join()
        place.join()
    for _ in range(2):
        assert desk.quotas.num_in_flight("a") == 1
        finish(place, 100)
    assert desk.quotas.num_in_flight("a") == 0
    assert admits(desk, quota, 400)
    assert not admits(desk, quota, 401)
    with pytest.raises(RuntimeError, match="once too often"):
        place.leave()
    assert desk.quotas.num_in_flight("a") == 0


def test_a_block_that_fails_gives_its_place_back() -> None:
    desk, quota = Desk(), Quota(requests_in_flight=1, requests_per_minute=1)
    with pytest.raises(KeyError), desk.quotas.admit("a", quota, 1):
        raise KeyError
    assert admits(desk, quota, 1)


def test_a_quota_that_changes_holds_from_the_next_request_on() -> None:
    desk = Desk()
    finish(desk.quotas.admit("a", Quota(tokens_per_minute=100 * TOKENS), 100 * TOKENS), 100 * TOKENS)
    lowered = Quota(tokens_per_minute=TOKENS)
    assert desk.refuse(lowered, TOKENS).retry_after_seconds == 60.0
    raised = Quota(tokens_per_minute=2 * TOKENS)
    assert admits(desk, raised, TOKENS)
    assert admits(desk, Quota(), 10**9)


def test_memory_is_bounded_by_who_came_in_the_last_minute() -> None:
    desk, quota = Desk(), Quota(tokens_per_minute=TOKENS)
    staying = desk.quotas.admit("staying", quota, 1)
    most = 0
    for number in range(5000):
        desk.time += 6 * SECOND // 10  # 100 tenants a minute
        finish(desk.quotas.admit(f"tenant-{number}", quota, TOKENS), TOKENS)
        most = max(most, desk.quotas.num_tenants)
    assert most <= 103
    assert desk.quotas.num_in_flight("staying") == 1
    staying.leave()


def test_refused_strangers_are_not_remembered() -> None:
    desk = Desk()
    for number in range(100):
        desk.refuse(Quota(requests_in_flight=0), tenant_id=f"tenant-{number}")
    assert desk.quotas.num_tenants == 0
