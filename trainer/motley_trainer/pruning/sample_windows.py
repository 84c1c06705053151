"""A job's samples as windows of one length: what a pruning is calibrated on, or a whole copy is trained on.

Knows nothing of files and of models. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from motley_trainer.data.samples import Sample


@dataclass(frozen=True, eq=False, slots=True)
class SampleWindows:
    """The stream of samples' tokens, cut. Shapes: windows [N, T] token ids; what does not fill a window is left out."""

    windows: Tensor

    @property
    def sha256(self) -> str:
        """Return "sha256:..." over the tokens."""
        return f"sha256:{hashlib.sha256(self.windows.to(torch.int32).numpy().tobytes()).hexdigest()}"


def cut_samples(samples: Iterable[Sample], window: int) -> SampleWindows:
    """Lay samples end to end, and cut the stream into windows; fewer tokens than one takes are one window of their own.

    Semantics: what of a sample is learned does not count here: a window is text.
    """
    stream = torch.tensor(list(chain.from_iterable(sample.tokens for sample in samples)), dtype=torch.long)
    window = max(1, min(window, len(stream)))
    num_windows = len(stream) // window
    return SampleWindows(stream[: num_windows * window].view(num_windows, window))
