"""Trainings by LoQT that take a moment: a small random model, a few samples of random tokens, frequent merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from architectures import build_model
from motley_trainer.data.training_data import TrainingData
from motley_trainer.job.captured import buffers_of
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.loop import Training, _take_step, train
from motley_trainer.job.optimizers import make_optimizer
from motley_trainer.job.reporting import Reporter
from motley_trainer.methods.loqt import AttachedLoqt, Loqt
from motley_trainer.spec.settings import LoqtSchedule, LoqtSettings, OptimizerSettings, TrainingMethod, TrainingSpec
from small_trainings import BINDING, SPEC, VOCABULARY, random_data
from torch import nn
from transformers import PreTrainedModel

SETTINGS = LoqtSettings(rank=8, merge_interval=2, schedule=LoqtSchedule.STATIC, growth=0.0)
SIDES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}  # of whole blocks of 64


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Return the Linears but lm_head."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]


def small_model(name: str = "llama", **config: Any) -> PreTrainedModel:
    """Make a model all of whose weights are frozen."""
    model = build_model(name, vocab_size=VOCABULARY, **config)
    model.requires_grad_(False)
    return model


@dataclass
class SmallLoqt:
    """A training, to be taken step by step, or as far as a test wants it."""

    settings: LoqtSettings = SETTINGS
    quantization: str = "nf4"
    model: PreTrainedModel = field(default_factory=small_model)
    data: TrainingData = field(default_factory=random_data)
    training: Mapping[str, Any] = field(default_factory=dict)
    optimizing: Mapping[str, Any] = field(default_factory=dict)
    events: list[Mapping[str, Any]] = field(default_factory=list)
    original: str | None = None

    @classmethod
    def of(cls, quantization: str = "nf4", *, model: PreTrainedModel | None = None, **settings: Any) -> SmallLoqt:
        """Make one with other settings."""
        of = replace(SETTINGS, **settings)
        return cls(of, quantization) if model is None else cls(of, quantization, model)

    @property
    def spec(self) -> TrainingSpec:
        """Return the spec."""
        optimizer = OptimizerSettings(**{"learning_rate": 5e-3, "warmup_steps": 0, **self.optimizing})
        fields: dict[str, Any] = {"steps": 13, "checkpoint_steps": 100, **self.training}
        return replace(SPEC, method=TrainingMethod.LOQT, settings=self.settings, optimizer=optimizer, **fields)

    def attach(self, resumed: Checkpoint | None = None) -> AttachedLoqt:
        """Take the Linears' places."""
        assert self.spec.steps is not None
        buffers = None if resumed is None else buffers_of(resumed)
        method = Loqt(self.settings, self.quantization, self.original)
        self.attached = method.attach(self.model, linear_paths(self.model), self.spec.steps, buffers)
        return self.attached

    def train(self, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> Checkpoint:
        """Train from the last checkpoint in a folder."""
        checkpoints = Checkpoints(folder, BINDING)
        resumed = checkpoints.latest()
        attached = self.attach(resumed)
        training = Training(self.model, attached, self.spec, self.data, attached)
        return train(training, checkpoints, resumed, Reporter(self.events.append, should_stop))

    def steps(self, count: int) -> Iterator[int]:
        """Take so many steps from the first on, yielding the number of each once it is taken."""
        attached = self.attach()
        training = Training(self.model, attached, self.spec, self.data, attached)
        self.optimizer = make_optimizer(attached.parameters.values(), self.spec.optimizer)
        accelerator = Accelerator(cpu=True)
        for step in range(count):
            _take_step(training, self.optimizer, accelerator, step, count)
            yield step


def whole_weights(model: PreTrainedModel, paths: list[str]) -> dict[str, torch.Tensor]:
    """Return Linears' weights as they are meant now."""
    return {path: model.get_submodule(path).weight.detach().float().clone() for path in paths}
