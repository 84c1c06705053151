"""How the plan and the kernels of the adapter delta speak to each other: rows of int64, field by field.

It names numbers alone; `triton_plan` writes the rows, the kernels read them. Dimension letters: T tokens, R rank,
E experts.
"""

from __future__ import annotations

from triton.language import constexpr

TILE_TOKENS = constexpr(16)
"""Tokens of a tile; a tile with fewer is masked, so that each token's products are made in one way."""
TILE_COLUMNS = constexpr(16)
"""Rank rows, or experts of a router, of a shrink tile; the least that a tensor core's inner dimension takes."""
BLOCK_O = constexpr(64)
"""Outputs of an expand tile, and the step of OUTPUT_STARTS."""

# A unit's row of int64: addresses (0 where it has no such tensor), then numbers.
A = constexpr(0)
B = constexpr(1)
INPUTS = constexpr(2)
OUTPUTS = constexpr(3)
OUTPUT_STARTS = constexpr(4)
ROUTER = constexpr(5)
RANK = constexpr(6)
NUM_INPUTS = constexpr(7)
NUM_OUTPUTS = constexpr(8)
NUM_EXPERTS = constexpr(9)
TOP_K = constexpr(10)
SCALING = constexpr(11)  # the bits of a float32
LOGITS = constexpr(12)  # the column where the router's logits begin
SHARES = constexpr(13)  # the column where the experts' shares begin
WIDTH = constexpr(14)  # columns that a token has in the scratch: products, logits, shares
UNIT_FIELDS = constexpr(15)

# A shrink tile: unit row, first column, first token in the list, number of tokens, first cell in the scratch. A gate
# tile is the shrink tile of a router's first column.
SHRINK_FIELDS = constexpr(5)
# An expand tile: first token in the list, number of tokens, its place in the segment, first and last + 1 member.
EXPAND_FIELDS = constexpr(5)
# A member of a segment: unit row, cell in the scratch of the segment's first token.
MEMBER_FIELDS = constexpr(2)
