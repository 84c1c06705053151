"""How an adapter or a base can be trained: the methods, and what can be said of each.

Owns the settings of `types_training_spec`'s TrainingSpec. Knows neither protobuf nor gRPC. Instances are immutable and
may go from thread to thread. None is the server's default, which `training.proto` names beside each field; in an
answer, it is also a value of an enum that this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction


class TrainingMethod(Enum):
    """How an adapter is trained, which is also its kind; LoRAM over an NF4 base is QLoRAM. LoQT makes a base."""

    LORA = "lora"
    S2FT = "s2ft"
    GOAT = "goat"
    LORAM = "loram"
    LOQT = "loqt"


class ChannelScore(Enum):
    """How S2FT scores a channel."""

    RANDOM = "random"
    WEIGHT = "weight"
    ACTIVATION = "activation"
    WEIGHT_ACTIVATION = "weight-activation"
    GRADIENT = "gradient"


class ChannelOrder(Enum):
    """Which channels S2FT takes, by their score."""

    SMALL = "small"
    LARGE = "large"


class ChannelBudget(Enum):
    """Of what S2FT's shares are: of every layer's channels, or of all layers' together."""

    LAYER = "layer"
    GLOBAL = "global"


class GoatSegments(Enum):
    """Which directions of the spectrum of a Linear's weight GOAT's experts begin as.

    Semantics: the first or the last of each of as many segments as there are experts, the first or the last of all, or
    blocks drawn by the seed.
    """

    HEAD = "head"
    MINI = "mini"
    PRINCIPAL = "principal"
    MINOR = "minor"
    RANDOM = "random"


class GoatScale(Enum):
    """What GOAT's experts are multiplied by: the root of 3 * in_features * eta / rank, or alpha over their own rank."""

    THEORETICAL = "theoretical"
    ALPHA = "alpha"


class GoatScaleRank(Enum):
    """Which rank GOAT's theoretical scale is of: that of an expert, or of all together."""

    EXPERT = "expert"
    TOTAL = "total"


class LoramPruning(Enum):
    """What LoRAM leaves out of the base that it trains on: key-value heads and FFN channels, or single weights."""

    STRUCTURED = "structured"
    RANDOM = "random"
    UNSTRUCTURED = "unstructured"
    SEMI_STRUCTURED = "semi-structured"


class LoqtStart(Enum):
    """What LoQT trains: the base that is served, or weights drawn by the seed, of its architecture."""

    BASE = "base"
    SCRATCH = "scratch"


class LoqtSchedule(Enum):
    """When LoQT merges its factors: at intervals that grow by powers, stay, or grow by steps, or once at the start."""

    EXPONENTIAL = "exponential"
    STATIC = "static"
    LINEAR = "linear"
    NEVER = "never"


class LoqtDecomposition(Enum):
    """How LoQT finds the directions of a gradient."""

    SVD = "svd"
    EIGH = "eigh"


class LoqtOptimizer(Enum):
    """What LoQT's steps are taken by; the second holds its moments in 8 bits."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw-8bit"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Train a LoRA, on the Linears that `target_modules` name, or on all of the layers; patterns are by name or path.

    Semantics: `alpha` goes over the rank, and with `use_rslora` over its root.
    """

    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    dropout: float | None = None


@dataclass(frozen=True, slots=True)
class S2ftSettings:
    """Train S2FT, on shares of o_proj's heads, down_proj's channels, v_proj's heads and up_proj's channels.

    Semantics: no channel is chosen that an adapter of `disjoint_from` has, so that they can be fused without overlap.
    """

    o_share: float | None = None
    down_share: float | None = None
    v_share: float | None = None
    up_share: float | None = None
    score: ChannelScore | None = None
    order: ChannelOrder | None = None
    budget: ChannelBudget | None = None
    disjoint_from: tuple[str, ...] = ()
    calibration_samples: int | None = None


@dataclass(frozen=True, slots=True)
class GoatSettings:
    """Train GOAT: experts that each token chooses among, begun as directions of the base's own weights.

    Semantics: `rank` is of all `experts` of a Linear together, and a multiple of their number; a token goes through
    `top_k` of them. `rho` divides what they begin as. `eta` and `rank_for_scale` are for the theoretical scale, `alpha`
    for the other one. `balance_loss` is what the balance loss is multiplied by.
    """

    rank: int | None = None
    experts: int | None = None
    top_k: int | None = None
    rho: float | None = None
    segments: GoatSegments | None = None
    scale: GoatScale | None = None
    eta: float | None = None
    rank_for_scale: GoatScaleRank | None = None
    alpha: float | None = None
    balance_loss: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoqtSettings:
    """Train a whole base whose Linears are held in NF4, by one low-rank factor of each after the other.

    Semantics: `rank` is at most the smaller side of every Linear. `scale` is what the product of the factors is
    multiplied by; a new factor takes up in `compensation_steps` rounds what quantizing loses. Factors are merged into
    the weights by `schedule`, after `merge_interval` steps, from merge to merge more as `growth` says. `keep_moments`
    hands the optimizer's moments of a factor to the one that takes its place.
    Units: `merge_interval` in steps, and for the schedule LINEAR `growth` too.
    """

    start: LoqtStart | None = None
    rank: int | None = None
    scale: float | None = None
    compensation_steps: int | None = None
    schedule: LoqtSchedule | None = None
    merge_interval: int | None = None
    growth: float | None = None
    decomposition: LoqtDecomposition | None = None
    optimizer: LoqtOptimizer | None = None
    keep_moments: bool = False


@dataclass(frozen=True, slots=True)
class LoramAlignment:
    """Train the whole pruned base on plain text first; `dataset` is a digest.

    Semantics: by LoQT where `loqt` is given, whose `start` is then left out; else every weight in float32.
    Units: `batch_size` in samples.
    """

    dataset: str
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    loqt: LoqtSettings | None = None


@dataclass(frozen=True, slots=True)
class LoramSettings:
    """Train a LoRA on a pruned copy of the base, for the whole base.

    Semantics: `ratio` is of what goes, a Fraction or written as `1/2` or `0.65`; `layers` are those to prune, written
    as `A:B`, A to B - 1; `pattern` is for SEMI_STRUCTURED, and `4:8` leaves 4 of every 8. The copy is cut as for the
    adapter `same_cut_as`, and all these are then left out. Empty texts leave it to the server.
    """

    lora: LoraSettings | None = None
    pruning: LoramPruning | None = None
    ratio: str | Fraction = ""
    layers: str = ""
    pattern: str = ""
    same_cut_as: str = ""
    calibration_samples: int | None = None
    alignment: LoramAlignment | None = None


MethodSettings = LoraSettings | S2ftSettings | GoatSettings | LoramSettings | LoqtSettings
"""What says the method of a spec."""

METHODS_OF_SETTINGS: Mapping[type[MethodSettings], TrainingMethod] = {
    LoraSettings: TrainingMethod.LORA,
    S2ftSettings: TrainingMethod.S2FT,
    GoatSettings: TrainingMethod.GOAT,
    LoramSettings: TrainingMethod.LORAM,
    LoqtSettings: TrainingMethod.LOQT,
}
