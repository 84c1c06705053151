"""What a training job is asked to do: its data, its steps, its gate and what it publishes.

Owns the vocabulary of TrainingSpec, but for its method's settings, which are in `types_training_methods`; what is told
of jobs is in `types_training`. Knows neither protobuf nor gRPC.
Instances are immutable and may go from thread to thread. None is the server's default, which `training.proto` names
beside each field; in an answer, it is also a value of an enum that this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from motley_client.types_training_methods import METHODS_OF_SETTINGS, MethodSettings, TrainingMethod


class LearningRateSchedule(Enum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class OverLength(Enum):
    """What becomes of a sample with too many tokens: it is cut and counted, or the job fails before it trains."""

    TRUNCATE = "truncate"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """How steps are taken; a `max_gradient_norm` of 0 does not clip."""

    learning_rate: float | None = None
    schedule: LearningRateSchedule | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    max_gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """What an adapter, or a base, must reach on held-out data before it is published, or kept.

    Semantics: `dataset` is a digest; empty holds out a part of what is trained on. The loss after must be at most
    `max_loss_ratio` times the loss before, and `min_exact_match` the share of answers that are exactly right.
    """

    dataset: str = ""
    max_loss_ratio: float | None = None
    min_exact_match: float | None = None


@dataclass(frozen=True, slots=True)
class PublishSettings:
    """Which adapter gets a new version; without `aliases`, `default` is pointed at it, with `keep_aliases` none is."""

    adapter_name: str
    aliases: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    keep_aliases: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """What a job shall do: train by the method of `settings` on a dataset, measure, and publish.

    Semantics: `dataset` is a digest. `quantization` is how the base is held, `none` or `nf4`; None is as it is served,
    and `nf4` for LoQT. At most one of `steps` and `epochs` is given. `publish` is None for LoQT, which makes a base.
    `settings` is None in an answer only, for a method that this client does not know.
    Units: `batch_size` and `micro_batch_size` in samples, `max_length` in tokens, `checkpoint_steps` in steps.
    """

    dataset: str
    settings: MethodSettings | None
    publish: PublishSettings | None = None
    quantization: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_length: int | None = None
    over_length: OverLength | None = None
    seed: int = 0
    checkpoint_steps: int | None = None
    optimizer: OptimizerSettings | None = None
    gate: Gate | None = None

    @property
    def method(self) -> TrainingMethod | None:
        """Return the method that the settings are of."""
        return None if self.settings is None else METHODS_OF_SETTINGS.get(type(self.settings))

    @property
    def adapter_name(self) -> str:
        """Return which adapter gets a new version; empty where none does."""
        return "" if self.publish is None else self.publish.adapter_name
