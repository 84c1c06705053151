"""The data of a job: what is trained on and in which order, and what is held out to measure by.

Which samples are held out depends on the seed and on what they teach, not on where they stand; samples that teach the
same are on one side together, so nothing that is measured by was trained on. The order is a function of the seed and of
the step alone: a resumed job needs no more than its step. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from motley_trainer.data.batches import Batch, collate
from motley_trainer.data.lines import read_passages
from motley_trainer.data.samples import Encoded, Sample, encode_passages
from motley_trainer.errors import DataError, SettingsError
from motley_trainer.spec.settings import TrainingSpec, derived_seed

HELD_OUT_SHARE = 10  # one sample in so many
MAX_HELD_OUT = 200
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class DataReport:
    """How the data was read.

    Semantics: `num_samples` and `num_tokens` are of what is trained on, `num_held_out` of what is measured by; what was
    truncated or dropped was of either. What a gate's own dataset has in common with the other is dropped there.
    """

    num_samples: int
    num_held_out: int
    num_truncated: int
    num_dropped: int
    num_tokens: int

    def to_json(self) -> dict[str, int]:
        """Return the wire's DataReport."""
        return asdict(self)


@dataclass(frozen=True, eq=False, slots=True)
class TrainingData:
    """What is trained on, what is measured by, and how both were read."""

    training: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    report: DataReport
    seed: int

    def num_steps(self, spec: TrainingSpec) -> int:
        """Return how many steps a spec asks for: epochs are rounded up to whole steps.

        Raises: SettingsError with reason BAD_SPEC for epochs that come to less than one sample.
        """
        if spec.steps is not None:
            return spec.steps
        assert spec.epochs is not None
        count = len(self.training)
        if spec.epochs * count < 1:
            message = (
                f"epochs {spec.epochs:g} of {count} samples are less than one of them: ask for {1 / count:.4g} at least"
            )
            raise SettingsError(message, reason="BAD_SPEC", field="epochs")
        return math.ceil(spec.epochs * count / spec.batch_size)

    def at(self, start: int, count: int) -> list[Sample]:
        """Return the samples at places [start, start + count) of the passes over the data, one after the other."""
        found: list[Sample] = []
        while len(found) < count:
            epoch, place = divmod(start + len(found), len(self.training))
            order = _order(len(self.training), self.seed, epoch)[place : place + count - len(found)]
            found += [self.training[index] for index in order.tolist()]
        return found

    def step(self, step: int, batch_size: int, micro_batch_size: int) -> list[Batch]:
        """Return the micro-batches of a step, the first step being 0."""
        return batches_of(self.at(step * batch_size, batch_size), micro_batch_size)


def batches_of(samples: Sequence[Sample], size: int) -> list[Batch]:
    """Return samples in batches of at most `size`, in their order."""
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [collate([(sample.tokens, sample.labels()) for sample in part]) for part in parts]


def read_data(
    folder: Path,
    spec: TrainingSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    on_line: Callable[[str, int, float], None] = lambda field, number, share: None,
) -> TrainingData:
    """Read the datasets that a spec names from a folder.

    Semantics: before each line `on_line` is called with the field that names its dataset, its number and the share of
    the bytes before it.
    Raises: SettingsError with reason BAD_SPEC for a `max_length` beyond the context; DataError as `read_passages` and
    `encode_passages` do, or with reason TOO_LITTLE_DATA.
    """
    if spec.max_length is not None and spec.max_length > context_length:
        message = f"max_length {spec.max_length} is more than the base's context of {context_length} tokens"
        raise SettingsError(message, reason="BAD_SPEC", field="max_length")
    max_length = min(DEFAULT_MAX_LENGTH, context_length) if spec.max_length is None else spec.max_length

    def encoded(digest: str, field: str) -> Encoded:
        path = folder / f"{digest.removeprefix('sha256:')}.jsonl"
        passages = read_passages(path, digest, tokenizer, field, on_line=partial(on_line, field))
        return encode_passages(passages, tokenizer, max_length=max_length, over_length=spec.over_length, field=field)

    data = encoded(spec.dataset, "dataset")
    num_truncated, num_dropped = data.num_truncated, data.num_dropped
    if spec.gate.dataset is None:
        training, held_out = _split(data.samples, spec.seed)
    else:
        gate = encoded(spec.gate.dataset, "gate.dataset")
        training, held_out = _without(data.samples, gate.samples), gate.samples
        num_truncated += gate.num_truncated
        num_dropped += gate.num_dropped + len(data.samples) - len(training)
    for samples, field in ((training, "dataset"), (held_out, "gate.dataset" if spec.gate.dataset else "dataset")):
        if not samples:
            raise _too_little(field, len(data.samples), num_dropped)
    num_tokens = sum(len(sample.tokens) for sample in training)
    report = DataReport(len(training), len(held_out), num_truncated, num_dropped, num_tokens)
    return TrainingData(training, held_out, report, spec.seed)


def _split(samples: Sequence[Sample], seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Hold some samples out: a share, but no more than a bound, and of those that teach the same all or none."""
    alike: dict[bytes, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(sample.content, []).append(sample)
    if len(alike) < 2:
        return tuple(samples), ()
    wanted = min(math.ceil(len(samples) / HELD_OUT_SHARE), MAX_HELD_OUT)
    salt = derived_seed(seed, "held out").to_bytes(8, "big")
    held: set[bytes] = set()
    num_held = 0
    for content in sorted(alike, key=lambda content: hashlib.sha256(salt + content).digest()):
        if num_held + len(alike[content]) <= wanted:
            held.add(content)
            num_held += len(alike[content])
    if not held:  # every sample comes more often than that
        held.add(min(alike, key=lambda content: len(alike[content])))
    return _parted(samples, held)


def _without(samples: Sequence[Sample], others: Iterable[Sample]) -> tuple[Sample, ...]:
    return _parted(samples, {sample.content for sample in others})[0]


def _parted(samples: Sequence[Sample], contents: set[bytes]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return the samples that teach none of these, and those that do."""
    is_in = [sample.content in contents for sample in samples]
    return (
        tuple(sample for sample, found in zip(samples, is_in, strict=True) if not found),
        tuple(sample for sample, found in zip(samples, is_in, strict=True) if found),
    )


@lru_cache(maxsize=2)  # the steps of a pass ask for the same order; the last of one for the next one's too
def _order(num_samples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


def _too_little(field: str, num_samples: int, num_dropped: int) -> DataError:
    message = (
        f"{field} has {num_samples} samples with something to learn, and {num_dropped} were dropped: training takes "
        "two at least that differ, one to train on and one to measure by"
    )
    return DataError(message, reason="TOO_LITTLE_DATA", field=field)
