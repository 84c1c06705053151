"""Trainings that take a moment: a small random model, and a few samples of random tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from adapter_files import spec_of
from architectures import build_model
from motley_bases.spec import BaseSpec, LayerSpec
from motley_trainer.data.samples import Sample
from motley_trainer.data.training_data import DataReport, TrainingData, batches_of
from motley_trainer.job.captured import buffers_of
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.loop import Training, train
from motley_trainer.job.reporting import Reporter
from motley_trainer.methods import method_of
from motley_trainer.methods.method import Attached, Context
from motley_trainer.spec.settings import LoraSettings, OptimizerSettings, TrainingMethod, TrainingSpec
from transformers import PreTrainedModel

VOCABULARY = 60
BINDING = {"base": "a", "spec": "b"}
SPEC = TrainingSpec(
    TrainingMethod.LORA,
    LoraSettings(rank=3, alpha=6.0),
    "sha256:",
    "sha256:",
    steps=10,
    epochs=None,
    batch_size=4,
    micro_batch_size=4,
    checkpoint_steps=4,
    optimizer=OptimizerSettings(learning_rate=5e-3),
)


def random_data(count: int = 11, *, seed: int = 0) -> TrainingData:
    """Make samples of different lengths, of which a later part is learned."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for line in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        samples.append(Sample(line, array("i", tokens), ((length // 2, length),), length // 2))
    return TrainingData(tuple(samples), tuple(samples), DataReport(count, count, 0, 0, 0), seed)


@dataclass
class SmallTraining:
    """A training, to be taken as far as a test wants it."""

    spec: TrainingSpec = SPEC
    data: TrainingData = field(default_factory=random_data)
    model: PreTrainedModel = field(default_factory=lambda: build_model("llama", vocab_size=VOCABULARY))
    events: list[Mapping[str, object]] = field(default_factory=list)

    @classmethod
    def of(cls, **spec: Any) -> SmallTraining:
        return cls(replace(SPEC, **spec))

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        config = self.model.config
        layer = LayerSpec(config.num_attention_heads, config.num_key_value_heads, config.head_dim, None)
        self.base: BaseSpec = replace(spec_of(self.model), layers=(layer,) * config.num_hidden_layers)

    def attach(self, resumed: Checkpoint | None = None) -> Attached:
        context = Context(self.base, self.spec.seed, lambda count: batches_of(self.data.at(0, count), count))
        self.attached = method_of(self.spec).attach(
            self.model, context, None if resumed is None else buffers_of(resumed)
        )
        return self.attached

    def train(self, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> Checkpoint:
        """Train from the last checkpoint in a folder."""
        checkpoints = Checkpoints(folder, BINDING)
        resumed = checkpoints.latest()
        training = Training(self.model, self.attach(resumed), self.spec, self.data)
        return train(training, checkpoints, resumed, Reporter(self.events.append, should_stop))


def stop_after(num_looks: int) -> Callable[[], bool]:
    """Return a question that is answered with yes from a certain time on."""
    looks = iter(range(1, 1 << 30))
    return lambda: next(looks) >= num_looks
