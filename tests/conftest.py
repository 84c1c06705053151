"""What holds for every test: the threads' manners, no model hub, and Hypothesis without a clock or a dice of its own.

The environment is set here because pytest imports this file before any test imports torch.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("motley", deadline=None, derandomize=True, database=None)
settings.load_profile("motley")
