"""What holds for every test: the threads' number and manners, no model hub, and Hypothesis without a clock or a dice.

The environment is set here because pytest imports this file before any test imports torch.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Two processes of tests, and the servers that they start, share two cores: second threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("motley", deadline=None, derandomize=True, database=None)
settings.load_profile("motley")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Have torch compute with two threads, where it matters that it is more than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
