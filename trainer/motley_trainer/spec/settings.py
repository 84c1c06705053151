"""What a training job is asked to do: the TrainingSpec of the wire as frozen facts, its defaults filled in.

Numbers and words alone: no torch, no protobuf. `reading.py` makes these from JSON, and has checked what can be
checked without the data and the base. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction


class TrainingMethod(StrEnum):
    """How an adapter is trained, which is also its kind; LOQT makes a base."""

    LORA = "lora"
    S2FT = "s2ft"
    GOAT = "goat"
    LORAM = "loram"
    LOQT = "loqt"


class ChannelScore(StrEnum):
    """How S2FT scores a channel."""

    RANDOM = "random"
    WEIGHT = "weight"
    ACTIVATION = "activation"
    WEIGHT_ACTIVATION = "weight_activation"
    GRADIENT = "gradient"


class ChannelOrder(StrEnum):
    """Which channels S2FT takes, by their score."""

    SMALL = "small"
    LARGE = "large"


class ChannelBudget(StrEnum):
    """Of what S2FT's shares are."""

    LAYER = "layer"
    GLOBAL = "global"


class GoatSegments(StrEnum):
    """Which directions of the spectrum GOAT's experts begin as."""

    HEAD = "head"
    MINI = "mini"
    PRINCIPAL = "principal"
    MINOR = "minor"
    RANDOM = "random"


class GoatScale(StrEnum):
    """What GOAT's experts are multiplied by."""

    THEORETICAL = "theoretical"
    ALPHA = "alpha"


class GoatScaleRank(StrEnum):
    """Which rank GOAT's theoretical scale is of."""

    EXPERT = "expert"
    TOTAL = "total"


class LoramPruning(StrEnum):
    """What LoRAM leaves out of the base that it trains on: heads and channels, or single weights."""

    STRUCTURED = "structured"
    RANDOM = "random"
    UNSTRUCTURED = "unstructured"
    SEMI_STRUCTURED = "semi_structured"

    @property
    def keeps_shapes(self) -> bool:
        """Tell whether weights go, and not heads and channels."""
        return self in (LoramPruning.UNSTRUCTURED, LoramPruning.SEMI_STRUCTURED)


class LoqtStart(StrEnum):
    """What LoQT trains: the base on from where it is, or weights that the seed draws."""

    BASE = "base"
    SCRATCH = "scratch"


class LoqtSchedule(StrEnum):
    """When LoQT merges its low-rank factors into the weights."""

    EXPONENTIAL = "exponential"
    STATIC = "static"
    LINEAR = "linear"
    NEVER = "never"


class LoqtDecomposition(StrEnum):
    """How LoQT finds the directions of a gradient."""

    SVD = "svd"
    EIGH = "eigh"


class LoqtOptimizer(StrEnum):
    """What LoQT's steps are taken by."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class OverLength(StrEnum):
    """What becomes of a sample with too many tokens."""

    TRUNCATE = "truncate"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The factors of a LoRA.

    Semantics: `target_modules` are names of Linears or full paths, none for all Linears of the layers. The patterns
    give modules, by name or path, a rank or an alpha of their own.
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class S2ftSettings:
    """Which channels S2FT trains.

    Semantics: shares of o_proj's heads, down_proj's channels, v_proj's heads and up_proj's channels, one of them above
    0; what is not 0 takes at least one. `disjoint_from` are adapters as a request names them.
    """

    o_share: float = 0.05
    down_share: float = 0.02
    v_share: float = 0.0
    up_share: float = 0.0
    score: ChannelScore = ChannelScore.RANDOM
    order: ChannelOrder = ChannelOrder.SMALL
    budget: ChannelBudget = ChannelBudget.LAYER
    disjoint_from: tuple[str, ...] = ()
    calibration_samples: int = 64


@dataclass(frozen=True, slots=True)
class GoatSettings:
    """GOAT's experts, their router and their scale.

    Semantics: `rank` is of all `experts` of a Linear together and a multiple of their number; a token goes through
    `top_k` of them. `eta` and `rank_for_scale` are for the theoretical scale, `alpha` for the other. `balance_loss` is
    the coefficient of the sum over all modules. `target_modules` as of a LoRA.
    """

    rank: int = 8
    experts: int = 8
    top_k: int = 2
    rho: float = 10.0
    segments: GoatSegments = GoatSegments.HEAD
    scale: GoatScale = GoatScale.THEORETICAL
    eta: float = 1.0
    rank_for_scale: GoatScaleRank = GoatScaleRank.EXPERT
    alpha: float = 16.0
    balance_loss: float = 1e-3
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoqtSettings:
    """The low-rank factors that a whole base is trained by, one after the other.

    Semantics: a `rank` of None is a quarter of the hidden size, or the smallest side of a Linear if that is less.
    `scale` is what the product of the factors is multiplied by, as it is. A `merge_interval` of None is by how many
    steps there are. `growth` is the base of EXPONENTIAL's powers,
    and LINEAR's steps by which each interval is longer than the one before.
    """

    start: LoqtStart = LoqtStart.BASE
    rank: int | None = None
    scale: float = 0.5
    compensation_steps: int = 5
    schedule: LoqtSchedule = LoqtSchedule.EXPONENTIAL
    merge_interval: int | None = None
    growth: float = 1.2
    decomposition: LoqtDecomposition = LoqtDecomposition.SVD
    optimizer: LoqtOptimizer = LoqtOptimizer.ADAMW
    keep_moments: bool = False


@dataclass(frozen=True, slots=True)
class LoramAlignment:
    """Training of the whole pruned base on plain text; `dataset` is a digest. Without `loqt`, of every weight."""

    dataset: str
    steps: int = 100
    learning_rate: float = 5e-5
    batch_size: int = 16
    loqt: LoqtSettings | None = None


@dataclass(frozen=True, slots=True)
class LoramSettings:
    """A LoRA that is trained on a pruned copy of the base.

    Semantics: `ratio` is of the heads and channels of each pruned layer, or of its weights, exactly; `layers` are
    (first, end), None for all where single weights go, else for all but the first four and the last two. `pattern` is
    (kept, of), None but for SEMI_STRUCTURED. `same_cut_as` is an adapter as a request names it, whose cut is taken in
    the place of all these.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    pruning: LoramPruning = LoramPruning.STRUCTURED
    ratio: Fraction = Fraction(1, 2)
    layers: tuple[int, int] | None = None
    pattern: tuple[int, int] | None = None
    same_cut_as: str | None = None
    calibration_samples: int = 64
    alignment: LoramAlignment | None = None


AdapterSettings = LoraSettings | S2ftSettings | GoatSettings | LoramSettings
Settings = AdapterSettings | LoqtSettings


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW and its schedule.

    Semantics: without `warmup_steps` a tenth of the steps, at most 100; a `max_gradient_norm` of 0 does not clip. Where
    `has_8bit_moments`, AdamW keeps both moments in 8 bits.
    """

    learning_rate: float = 2e-4
    schedule: Schedule = Schedule.LINEAR
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_gradient_norm: float = 1.0
    has_8bit_moments: bool = False


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What counts as better on data that was not trained on.

    Semantics: `dataset` is the digest of samples of its own; None holds a tenth of the job's dataset out.
    """

    dataset: str | None = None
    max_loss_ratio: float = 1.0
    min_exact_match: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """One training, as it was asked for.

    Semantics: `settings` are those of `method`. `quantization` is how the base is held in training, None as it is
    served. Of `steps` and `epochs` one is None. `max_length` is in tokens, None for the smaller of 512 and the base's
    context. `digest` is "sha256:..." over the JSON that all this was read from.
    """

    method: TrainingMethod
    settings: Settings
    dataset: str
    digest: str
    quantization: str | None = None
    steps: int | None = None
    epochs: float | None = 3.0
    batch_size: int = 16
    micro_batch_size: int = 16
    max_length: int | None = None
    over_length: OverLength = OverLength.TRUNCATE
    seed: int = 0
    checkpoint_steps: int = 50
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    gate: GateSettings = field(default_factory=GateSettings)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Return the digest of every dataset that is read, once each."""
        alignment = self.settings.alignment if isinstance(self.settings, LoramSettings) else None
        named = (self.dataset, self.gate.dataset, None if alignment is None else alignment.dataset)
        return tuple(dict.fromkeys(name for name in named if name is not None))


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for one purpose, so that no two generators of a job run in step."""
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits everywhere
