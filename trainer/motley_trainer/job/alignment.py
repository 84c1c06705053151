"""Alignment: training of a whole pruned copy on plain text, so that it is nearer to its original again.

Owns the text, and what takes the steps: unless another engine is asked for, every weight learns, in float32, but for
those that give the logits. What becomes of the copy afterwards is not known here. Runs on the thread that owns the
model.
Source: LoRAM, arXiv:2502.13533, section 3.2.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motley_trainer.data.batches import Batch
from motley_trainer.data.lines import Passage, read_passages
from motley_trainer.data.samples import Sample, encode, text_digest
from motley_trainer.data.training_data import DEFAULT_MAX_LENGTH, DataReport, TrainingData
from motley_trainer.errors import DataError, TrainerError
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.loop import Training, train
from motley_trainer.job.reporting import Reporter
from motley_trainer.pruning.sample_windows import cut_samples
from motley_trainer.spec.settings import (
    LoqtOptimizer,
    LoramAlignment,
    LoramSettings,
    OptimizerSettings,
    Schedule,
    TrainingSpec,
    derived_seed,
)

FIELD = "loram.alignment.dataset"
FIELDS = {  # of a training's spec, by those of a spec that aligns
    "optimizer.learning_rate": "loram.alignment.learning_rate",
    "loqt.optimizer": "loram.alignment.loqt.optimizer",
}
WARMUP_SHARE = 10  # one step in so many


@dataclass(frozen=True, eq=False, slots=True)
class Alignment:
    """What an engine is given.

    Semantics: the model is the copy in float32, all frozen and in evaluation mode. The spec says how many steps, of how
    many windows, at which rates; the data are the windows. In the parameters that `pruned` names what is zero stays so.
    `fingerprint` is the copy's, None where nobody asks for it.
    """

    model: PreTrainedModel
    spec: TrainingSpec
    data: TrainingData
    pruned: Collection[str] = ()
    fingerprint: str | None = None


class AlignmentEngine(Protocol):
    """A way to train a whole model."""

    @property
    def name(self) -> str:
        """Return what the engine is called where the copy's origin is told."""

    def align(self, alignment: Alignment, checkpoints: Checkpoints, reporter: Reporter) -> float:
        """Train the model's weights in place, from the last checkpoint on, and return the last step's loss.

        Raises: as `motley_trainer.job.loop.train` does.
        """


class FullRank:
    """Train every weight as it is, with AdamW's two moments of each."""

    name = "full_rank"

    def align(self, alignment: Alignment, checkpoints: Checkpoints, reporter: Reporter) -> float:
        """Take the steps of the loop with all weights."""
        weights = AllWeights(alignment.model, alignment.pruned)
        training = Training(alignment.model, weights, alignment.spec, alignment.data)
        return train(training, checkpoints, checkpoints.latest(), reporter).loss


class AllWeights:
    """All weights of a model; those that give the logits, which a tied embedding's are too, where `trains_output`."""

    def __init__(self, model: PreTrainedModel, pruned: Collection[str] = (), *, trains_output: bool = False) -> None:
        output = None if trains_output else model.get_output_embeddings().weight
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter is not output
        }
        for name, parameter in self.parameters.items():
            parameter.requires_grad_()
            if name in pruned:
                # Without a gradient there is no moment either, and so no step.
                parameter.register_hook(_Masked(parameter != 0))

    def buffers(self) -> Mapping[str, Tensor]:
        """Return nothing more."""
        return {}

    def extra_loss(self, batch: Batch) -> None:
        """Add nothing to the loss."""

    def report(self) -> Mapping[str, object]:
        """Tell nothing."""
        return {}


class _Masked:
    def __init__(self, stays: Tensor) -> None:
        self._stays = stays

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._stays


def alignment_spec(spec: TrainingSpec, asked: LoramAlignment) -> TrainingSpec:
    """Return the steps of an alignment as a training's: cosine after a tenth of them, no decay of weights."""
    optimizer = OptimizerSettings(
        learning_rate=asked.learning_rate,
        schedule=Schedule.COSINE,
        warmup_steps=asked.steps // WARMUP_SHARE,
        has_8bit_moments=asked.loqt is not None and asked.loqt.optimizer is LoqtOptimizer.ADAMW_8BIT,
    )
    return replace(
        spec,
        steps=asked.steps,
        epochs=None,
        batch_size=asked.batch_size,
        micro_batch_size=min(spec.micro_batch_size, asked.batch_size),
        optimizer=optimizer,
    )


@contextmanager
def naming_alignment() -> Iterator[None]:
    """Have errors of an alignment name the fields that ask for it, and not those of the training after it."""
    try:
        yield
    except TrainerError as error:
        if error.field not in FIELDS:
            raise
        raise type(error)(error.message, reason=error.reason, field=FIELDS[error.field]) from error


def read_alignment(
    folder: Path,
    spec: TrainingSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    held_out: tuple[Sample, ...],
    *,
    on_line: Callable[[str, int, float], None] = lambda field, number, share: None,
) -> TrainingData:
    """Read the text that a spec's alignment names, as windows of the job's `max_length`.

    Semantics: lines are left out whose text is that of a sample held out to measure by, prompt and completion as one,
    and as it was before it was cut. `on_line` is called as `read_data` does.
    Raises: DataError with reason NOT_PLAIN_TEXT, or TOO_LITTLE_DATA if one step takes more; otherwise as
    `read_passages` does.
    """
    assert isinstance(spec.settings, LoramSettings)
    asked = spec.settings.alignment
    assert asked is not None
    window = min(DEFAULT_MAX_LENGTH, context_length) if spec.max_length is None else spec.max_length
    path = folder / f"{asked.dataset.removeprefix('sha256:')}.jsonl"
    passages = _plain(read_passages(path, asked.dataset, tokenizer, FIELD, on_line=partial(on_line, FIELD)))
    kept_back = {sample.text for sample in held_out}
    samples = (encode(passage, tokenizer) for passage in passages if text_digest(passage) not in kept_back)
    windows = cut_samples(samples, window).windows
    if windows.shape[1] < window or len(windows) < asked.batch_size:
        num_tokens = windows.numel()
        message = (
            f"{FIELD} has {num_tokens} tokens to learn from, and a step takes {asked.batch_size} windows of {window}: "
            "give more text, or lower loram.alignment.batch_size or max_length"
        )
        raise DataError(message, reason="TOO_LITTLE_DATA", field=FIELD)
    learned = ((0, window),)
    cut = tuple(Sample(line, array("i", row.tolist()), learned) for line, row in enumerate(windows))
    report = DataReport(len(cut), 0, 0, 0, windows.numel())
    return TrainingData(cut, (), report, derived_seed(spec.seed, "alignment"))


def _plain(passages: Iterator[Passage]) -> Iterator[Passage]:
    """Let text pass of which all is learned, and nothing else."""
    for passage in passages:
        if passage.learned != ((0, len(passage.text)),):
            message = f"line {passage.line} of {FIELD} is no plain text: alignment takes lines with text alone"
            raise DataError(message, reason="NOT_PLAIN_TEXT", field=FIELD)
        yield passage
