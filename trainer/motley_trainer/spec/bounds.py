"""How far the numbers of a spec may go. Pure."""

from __future__ import annotations

MAX_RANK = 1 << 16
MAX_COUNT = 1 << 31
MAX_ALPHA = 1e30  # as far as an adapter's file may go
