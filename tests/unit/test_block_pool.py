"""The block pool: owners counted, contents remembered until the block is handed out again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from motley_server.engine.block_pool import BlockPool


def test_allocating_more_than_is_free_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(4, 16)
    owned = pool.allocate(3)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity([owned])


def test_a_released_block_is_found_by_its_hash_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1)
    pool.remember(block, b"content")
    pool.release([block])
    assert pool.find([b"content"]) == [block]
    pool.allocate(2)
    assert pool.find([b"content"]) == []


def test_blocks_that_remember_nothing_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(3)
    pool.remember(blocks[0], b"first")
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[1], blocks[2]] or pool.find([b"first"]) == [blocks[0]]
    assert pool.find([b"first"]) == [blocks[0]]


def test_the_tail_of_a_released_sequence_is_forgotten_before_its_head() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(3)
    for index, block in enumerate(blocks):
        pool.remember(block, b"%d" % index)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find([b"0", b"1", b"2"]) == blocks[:2]


def test_a_find_stops_at_the_first_gap_in_the_chain() -> None:
    pool = BlockPool(3, 16)
    first, _, third = pool.allocate(3)
    pool.remember(first, b"0")
    pool.remember(third, b"2")
    assert pool.find([b"0", b"1", b"2"]) == [first]


def test_releasing_a_block_without_owner_is_an_error() -> None:
    pool = BlockPool(1, 16)
    owned = pool.allocate(1)
    pool.release(owned)
    with pytest.raises(ValueError, match="has no owner"):
        pool.release(owned)


def test_the_integrity_check_sees_a_leaked_block() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="1 references, 0 owners"):
        pool.check_integrity([])


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes, and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.tables: list[list[int]] = []
        self.contents: dict[bytes, int] = {}

    @rule(prefix=st.integers(0, 2), length=st.integers(1, 4))
    def start(self, prefix: int, length: int) -> None:
        hashes = [b"%d/%d" % (prefix, index) for index in range(length)]
        cached = self.pool.find(hashes)
        if length - len(cached) + self.pool.num_unowned(cached) > self.pool.num_free:
            return
        for block, block_hash in zip(cached, hashes, strict=False):
            assert self.contents[block_hash] == block
        self.pool.own(cached)
        table = cached + self.pool.allocate(length - len(cached))
        self.contents = {key: block for key, block in self.contents.items() if block not in table[len(cached) :]}
        for block, block_hash in zip(table, hashes, strict=True):
            self.pool.remember(block, block_hash)
            self.contents.setdefault(block_hash, block)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def is_sound(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free + self.pool.num_used == 12


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
