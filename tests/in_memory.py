"""Where a test keeps files that no disk need ever see: in memory, where the system shows it as a folder.

For tests that sync thousands of times, and of which none asks whether a disk keeps what it was given.
"""

from __future__ import annotations

import os

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""What to hand over as `dir` to `tempfile`; None is the ordinary place."""
