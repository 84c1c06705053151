"""A set of adapters taken apart into resident parts, and counted where its S2FT adapters meet."""

from __future__ import annotations

from typing import Any

import pytest
from motley_adapters.fusion import expand_parts, overlapping_channels
from motley_adapters.spec import AdapterSpec, Channels


def spec(digest: str, **fields: Any) -> AdapterSpec:
    return AdapterSpec(digest, "lora", {}, {}, "undeclared", 0, **fields)


def test_own_parts_come_in_the_order_of_the_set_and_shared_ones_after_by_digest() -> None:
    pairs = [(spec("c", shared=("y",)), 1.0), (spec("a"), 0.5), (spec("b", shared=("x",)), -2.0)]
    assert expand_parts(pairs) == (("c", 1.0), ("a", 0.5), ("b", -2.0), ("x", -2.0), ("y", 1.0))


def test_a_shared_part_carries_the_sum_of_its_adapters_weights() -> None:
    pairs = [(spec("a", shared=("x",)), 0.25), (spec("b", shared=("x",)), 1.5), (spec("c", shared=("z",)), 3.0)]
    assert expand_parts(pairs)[3:] == (("x", 1.75), ("z", 3.0))


def test_weights_that_cancel_drop_the_shared_part_but_not_the_own_ones() -> None:
    pairs = [(spec("a", shared=("x",)), 1.0), (spec("b", shared=("x",)), -1.0)]
    assert expand_parts(pairs) == (("a", 1.0), ("b", -1.0))


def test_the_sum_does_not_depend_on_the_order() -> None:
    weights = [0.1, 0.2, 0.3, -0.6, 1e-9]
    pairs = [(spec(str(i), shared=("x",)), weight) for i, weight in enumerate(weights)]
    assert expand_parts(pairs)[-1] == expand_parts(reversed(pairs))[-1]


def test_no_adapters_are_no_parts() -> None:
    assert expand_parts([]) == ()


def s2ft(digest: str, **channels: Channels) -> AdapterSpec:
    return spec(digest, channels=channels)


A = s2ft("a", o=Channels("input", (0, 1, 5)), down=Channels("input", (2, 3)))
B = s2ft("b", o=Channels("input", (1, 5, 6)), down=Channels("output", (2, 3)))
C = s2ft("c", o=Channels("input", (5,)))


@pytest.mark.parametrize(
    ("specs", "wanted"),
    [
        ([A, B, C], {"a": 2, "b": 2, "c": 1}),
        ([A, C], {"a": 1, "c": 1}),
        ([A], {"a": 0}),
        ([A, spec("lora")], {"a": 0}),
        ([spec("lora")], {}),
        ([], {}),
    ],
)
def test_channels_held_twice_are_counted_for_each_holder(specs: list[AdapterSpec], wanted: dict[str, int]) -> None:
    assert overlapping_channels(specs) == wanted
