"""What a pruning is asked to do, checked before anything is read.

Numbers and words alone; pure. Ratios are exact fractions, as in the bases' pruned geometry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

from motley_bases.pruned_geometry import PruneRule

from motley_trainer.errors import SettingsError
from motley_trainer.pruning.aggregation import Aggregation
from motley_trainer.pruning.counting import CountingRule
from motley_trainer.pruning.saliency import Criterion

MAX_SEED = 2**63 - 1  # that every generator of torch takes
MAX_DENOMINATOR = 10**18  # of a ratio: the manifest keeps it as it was asked for


class Selection(StrEnum):
    """Among whom a group competes: those of its kind in its layer, or all groups of all layers that are pruned."""

    LOCAL = "local"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """How the pruned copy is trained afterwards; no steps, no training. Source: LLM-Pruner's own recipe."""

    steps: int = 0
    rank: int = 8
    lora_alpha: int = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise SettingsError("recovery takes 0 steps or more", reason="BAD_RECOVERY", field="recover_steps")
        if not self.learning_rate > 0:
            raise SettingsError("the learning rate is above 0", reason="BAD_RECOVERY", field="learning_rate")


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """How much goes, from where, and how that is chosen.

    Semantics: `ratio` is of the groups of each pruned layer, or, under global selection, of all their parameters; not
    of the model. Layers `first_layer` to `end_layer` - 1 are pruned; None is the model's first and its last, and where
    both are None, the rule's own. FFN widths that stay are rounded up to a multiple of `multiple`. `num_windows` random
    windows of `window` tokens are the calibration.
    Raises: SettingsError with the field.
    """

    ratio: Fraction
    first_layer: int | None = None
    end_layer: int | None = None
    rule: CountingRule = CountingRule.LLM_PRUNER
    criterion: Criterion = Criterion.PARAM_FIRST
    aggregation: Aggregation = Aggregation.SUM
    selection: Selection = Selection.LOCAL
    steps: int = 1
    multiple: int = 1
    seed: int = 0
    num_windows: int = 10
    window: int = 64
    recovery: RecoverySettings = field(default_factory=RecoverySettings)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise SettingsError("a ratio is between 0 and 1, without them", reason="BAD_RATIO", field="ratio")
        if self.ratio.denominator > MAX_DENOMINATOR:
            raise SettingsError("a ratio has 18 decimals at most", reason="BAD_RATIO", field="ratio")
        for name, least in (("steps", 1), ("multiple", 1), ("seed", 0), ("num_windows", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {least} or more", reason="BAD_COUNT", field=name)
        if self.seed > MAX_SEED:
            raise SettingsError(f"seed is at most {MAX_SEED}", reason="BAD_COUNT", field="seed")
        if self.rule is CountingRule.LORAM:
            self._check_loram()

    def layers(self, num_layers: int) -> range:
        """Return the layers that are pruned.

        Raises: SettingsError with reason LAYER_RANGE if they are none, or not layers of the model.
        """
        first, end = self.first_layer or 0, num_layers if self.end_layer is None else self.end_layer
        whose = ""
        if self.rule is CountingRule.LORAM and self.first_layer is None and self.end_layer is None:
            own = PruneRule(self.ratio).pruned_layers(num_layers)
            first, end, whose = own.start, own.stop, f", and those the rule {self.rule} prunes unless others are named"
        if not 0 <= first < end <= num_layers:
            message = f"layers {first}:{end} are not some of the model's 0:{num_layers}{whose}"
            raise SettingsError(message, reason="LAYER_RANGE", field="layers")
        return range(first, end)

    def _check_loram(self) -> None:
        """Refuse what would leave other counts than the rule's."""
        for name, is_other in (("selection", self.selection is not Selection.LOCAL), ("multiple", self.multiple > 1)):
            if is_other:
                message = f"{name} {getattr(self, name)} would leave other counts than those of the rule {self.rule}"
                raise SettingsError(message, reason="RULE_CONFLICT", field=name)


def parse_layers(text: str) -> tuple[int, int | None]:
    """Read "A:B", the layers A to B - 1; either may be left out.

    Raises: SettingsError with reason LAYER_RANGE.
    """
    first, colon, end = text.partition(":")
    if not colon or not all(part == "" or (part.isascii() and part.isdigit()) for part in (first, end)):
        raise SettingsError(f"layers {text!r} are not A:B, the layers A to B - 1", reason="LAYER_RANGE", field="layers")
    return int(first or 0), int(end) if end else None


def parse_ratio(text: str) -> Fraction:
    """Read a ratio as it is written: 0.65 is 13/20, and 1/3 is a third.

    Raises: SettingsError with reason BAD_RATIO.
    """
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"{text!r} is not a number between 0 and 1", reason="BAD_RATIO", field="ratio") from error
