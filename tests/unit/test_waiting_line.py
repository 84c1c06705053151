"""Whose turn it is: tokens by weight between tenants, first come first served within one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import GenerateRequest, SamplingParams
from motley_server.engine.waiting_line import WaitingLine
from scheduler_house import make_scheduler

COSTS = st.integers(1, 40)


def make(tenant: str, name: str = "x", cost: int = 10, weight: float = 1.0) -> Sequence:
    """Make a sequence that may use so many tokens, one of them its prompt."""
    sampling = SamplingParams(max_new_tokens=cost - 1)
    return Sequence(GenerateRequest(name, tenant, (1,), sampling, weight=weight), 0, b"")


def names(line: WaitingLine) -> list[str]:
    return [sequence.request.request_id for sequence in line]


def serve(line: WaitingLine) -> Sequence:
    """Let the first in."""
    sequence = line.window()[0]
    line.remove(sequence)
    line.charge(sequence)
    return sequence


@given(st.lists(COSTS, min_size=1, max_size=30))
def test_one_tenant_is_served_as_it_came(costs: list[int]) -> None:
    line = WaitingLine()
    for place, cost in enumerate(costs):
        line.append(make("a", str(place), cost))
    assert names(line) == [str(place) for place in range(len(costs))]
    assert [serve(line).request.request_id for _ in costs] == [str(place) for place in range(len(costs))]


@given(
    st.lists(COSTS, min_size=5, max_size=60), st.lists(COSTS, min_size=5, max_size=60),
    st.sampled_from([0.5, 1.0, 2.0, 8.0]), st.integers(0, 4),
)  # fmt: skip
def test_who_waits_gets_tokens_by_weight(ours: list[int], theirs: list[int], weight: float, served_before: int) -> None:
    line = WaitingLine()
    for cost in theirs:
        line.append(make("b", cost=cost))
    for _ in range(served_before):
        serve(line)
    for cost in ours:
        line.append(make("a", cost=cost, weight=weight))
    given = {"a": Fraction(0), "b": Fraction(0)}
    largest = {"a": Fraction(max(ours)) / Fraction(weight), "b": Fraction(max(theirs))}
    while {sequence.request.tenant_id for sequence in line} == {"a", "b"}:
        sequence = serve(line)
        given[sequence.request.tenant_id] += Fraction(sequence.max_num_tokens) / Fraction(sequence.request.weight)
        assert abs(given["a"] - given["b"]) <= largest["a"] + largest["b"]


def test_ten_times_the_load_is_no_ten_times_the_share() -> None:
    line = WaitingLine()
    for place in range(100):
        line.append(make("loud"))
        if place % 10 == 0:
            line.append(make("quiet"))
    served = [serve(line).request.tenant_id for _ in range(20)]
    assert served.count("quiet") == 10


def test_a_tenant_with_nothing_waiting_saves_nothing_up() -> None:
    line = WaitingLine()
    line.append(make("idle"))
    serve(line)
    for _ in range(50):
        line.append(make("busy"))
    for _ in range(40):
        serve(line)
    for _ in range(10):
        line.append(make("idle"))
    served = [serve(line).request.tenant_id for _ in range(10)]
    assert 4 <= served.count("idle") <= 6


def test_what_was_not_used_is_given_back() -> None:
    line = WaitingLine()
    for _ in range(20):
        line.append(make("short", cost=100))
        line.append(make("long", cost=100))
    given = {"short": 0, "long": 0}
    for _ in range(24):
        sequence = serve(line)
        used = 1
        if sequence.request.tenant_id == "short":
            sequence.append(7)
            used = 2
        else:
            for _ in range(99):
                sequence.append(7)
            used = 100
        line.refund(sequence)
        given[sequence.request.tenant_id] += used
        if given["short"] == 40:
            break
    assert given["short"] == 40, "twenty short answers come before a fifth long one"
    assert given["long"] <= 300


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_of_two_whose_turn_it_is_alike_the_earlier_comes_first(order: tuple[str, str]) -> None:
    line = WaitingLine()
    for tenant in order:
        line.append(make(tenant, tenant))
    assert names(line) == list(order)


def test_who_had_a_turn_comes_first_and_pays_once() -> None:
    scheduler, _ = make_scheduler(num_blocks=8, max_running=1)
    for tenant in ("a", "b", "a", "b"):
        scheduler.add(make(tenant, tenant))
    (first,) = scheduler.schedule()
    scheduler.running.clear()
    first.sequence.pins = None
    first.sequence.forget_computed()
    scheduler.add_first(first.sequence)
    assert names(scheduler.waiting) == ["a", "b", "a", "b"]
    (again,) = scheduler.schedule()
    assert again.sequence is first.sequence
    assert names(scheduler.waiting) == ["b", "a", "b"]


def test_more_candidates_of_a_request_pay_for_their_own_tokens_alone() -> None:
    line = WaitingLine()
    for tenant in ("a", "b"):
        line.append(make(tenant, tenant, cost=50))
    request = line.window()[0].request
    serve(line)
    line.charge(Sequence(request, 1, b""))
    line.append(make("a", "a2", cost=50))
    assert [serve(line).request.request_id for _ in range(2)] == ["b", "a2"]


def test_tenants_that_are_gone_are_forgotten() -> None:
    line = WaitingLine()
    for number in range(1000):
        line.append(make(str(number)))
        line.refund(serve(line))
    assert not line._shares
    for number in range(1000):  # and so while somebody always waits
        line.append(make(str(number)))
        line.append(make("stays"))
        line.refund(serve(line))
    while len(line):
        line.refund(serve(line))
    assert not line._shares
    assert not line._owed_by


def test_what_is_given_back_after_debts_were_forgotten_is_no_credit() -> None:
    line = WaitingLine()
    line.append(make("a", cost=1000))
    early = serve(line)  # nobody waits: forgotten
    for tenant in ("b", "a", "b", "a", "b", "a"):
        line.append(make(tenant, tenant))
    line.refund(early)
    assert [serve(line).request.request_id for _ in range(6)] == ["b", "a"] * 3


def test_who_does_not_wait_cannot_be_taken_out() -> None:
    line = WaitingLine()
    line.append(make("a"))
    with pytest.raises(ValueError, match="not in"):
        line.remove(make("a"))
