"""Which key-value blocks are in use, by how many sequences, and what the unused ones still remember.

Owns block numbers and their reference counts, never tensors. A block whose last owner leaves keeps its content hash
until the block is handed out again, oldest first: that is the prefix cache. Runs on the engine thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hand out blocks, count their owners, find cached ones by hash."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be handed out first

    @property
    def num_free(self) -> int:
        """Return the blocks without an owner, remembered ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Return the blocks with an owner."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks with one owner each; what they remembered is forgotten.

        Raises: ValueError if fewer are free; nothing is handed out then.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the longest cached run of a chain of hashes, without owning them."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def own(self, blocks: Sequence[int]) -> None:
        """Add an owner to blocks that `find` returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def num_unowned(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks owning them would take from the free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block of a sequence, given in the sequence's order.

        Semantics: the tail is forgotten first, as a prefix is of more use than what followed it; blocks that remember
        nothing are reused before all others.
        Raises: ValueError for a block without an owner.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} has no owner")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, block_hash: bytes) -> None:
        """Note the content of a full block; where another block holds the same content already, that one stays the
        known one."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts agree with the block tables of all owners."""
        counts = Counter(block for table in owners for block in table)
        for block, references in enumerate(self._references):
            if counts[block] != references:
                raise AssertionError(f"block {block}: {references} references, {counts[block]} owners")
            if (references == 0) != (block in self._free):
                raise AssertionError(f"block {block}: {references} references, free is {block in self._free}")
        for block_hash, block in self._block_of.items():
            if self._hash_of[block] != block_hash:
                raise AssertionError(f"block {block} is known by a hash that is not its own")
        if sum(block_hash is not None for block_hash in self._hash_of) != len(self._block_of):
            raise AssertionError("a block remembers a hash by which it cannot be found")

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
