"""LoQT's settings, read from their JSON as the wire spells it.

They are a method's own, and those of LoRAM's alignment where LoQT does it. Pure.
"""

from __future__ import annotations

from motley_trainer.spec.bounds import MAX_ALPHA, MAX_GROWTH, MAX_RANK, MAX_STEPS
from motley_trainer.spec.json_fields import JsonFields
from motley_trainer.spec.settings import LoqtDecomposition, LoqtOptimizer, LoqtSchedule, LoqtSettings, LoqtStart

MAX_COMPENSATION_STEPS = 100


def read_loqt(fields: JsonFields, quantization: str | None) -> LoqtSettings:
    """Read LoQT's settings, for Linears that are held in a quantization; None for `nf4`.

    Raises: SettingsError with reason BAD_SPEC and the field as the proto spells it.
    """
    schedule = fields.word("schedule", LoqtSchedule, "LOQT_SCHEDULE_", LoqtSchedule.EXPONENTIAL)
    if schedule is LoqtSchedule.NEVER:
        for name in ("merge_interval", "keep_moments"):
            if fields.get(name):
                raise fields.error(name, f"does not go with the schedule {schedule}")
    if quantization == "none" and "compensation_steps" in fields:
        raise fields.error("compensation_steps", f"does not go with the quantization {quantization}: nothing is lost")
    settings = LoqtSettings(
        start=fields.word("start", LoqtStart, "LOQT_START_", LoqtStart.BASE),
        rank=fields.whole_or_none("rank", 1, MAX_RANK),
        scale=fields.number("scale", 0.5, above=0, most=MAX_ALPHA),
        compensation_steps=fields.whole("compensation_steps", 0, MAX_COMPENSATION_STEPS, 5),
        schedule=schedule,
        merge_interval=fields.whole_or_none("merge_interval", 2, MAX_STEPS),  # with 1 nothing is ever trained
        growth=_growth(fields, schedule),
        decomposition=fields.word("decomposition", LoqtDecomposition, "LOQT_DECOMPOSITION_", LoqtDecomposition.SVD),
        optimizer=fields.word("optimizer", LoqtOptimizer, "LOQT_OPTIMIZER_", LoqtOptimizer.ADAMW),
        keep_moments=fields.flag("keep_moments"),
    )
    fields.end()
    return settings


def _growth(fields: JsonFields, schedule: LoqtSchedule) -> float:
    """Read by how much intervals grow; with less than this they would shrink, or not grow at all."""
    match schedule:
        case LoqtSchedule.EXPONENTIAL:
            return fields.number("growth", 1.2, least=1, most=MAX_GROWTH)
        case LoqtSchedule.LINEAR:
            return fields.number("growth", 100.0, least=0, most=MAX_GROWTH)
    if "growth" in fields:
        raise fields.error("growth", f"does not go with the schedule {schedule}")
    return 0.0
