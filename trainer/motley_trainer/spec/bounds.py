"""How far the numbers of a spec may go: as far as a server lets them. Pure."""

from __future__ import annotations

MAX_RANK = 4096
MAX_STEPS = 10**7
MAX_EPOCHS = 1e6
MAX_BATCH = 1 << 16
MAX_SAMPLES = 1 << 20  # to score channels or weights on
MAX_GROWTH = 1e6
MAX_LENGTH = 1 << 31
MAX_ALPHA = 1e30  # as far as an adapter's file may go
MIN_GOAT_SCALE = 1e-25  # whatever the rank, an adapter's file may have what it makes
