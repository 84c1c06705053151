"""Whether the settings of LoQT make sense: of a job that makes a base, and of the alignment of LoRAM's pruned copy.

Pure checks; run on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.rpc.training_bounds import MAX_GROWTH, Bounds, wrong

Settings = training_pb2.LoqtSettings
Sides = tuple[int, int]

EXPONENTIAL: Final = training_pb2.LOQT_SCHEDULE_EXPONENTIAL
# By schedule, how it is called, and what it has no use for.
SCHEDULES: Final[Mapping[int, tuple[str, tuple[str, ...]]]] = {
    EXPONENTIAL: ("exponential", ()),
    training_pb2.LOQT_SCHEDULE_STATIC: ("static", ("growth",)),
    training_pb2.LOQT_SCHEDULE_LINEAR: ("linear", ()),
    training_pb2.LOQT_SCHEDULE_NEVER: ("never", ("merge_interval", "growth", "keep_moments")),
}
# The least that an interval grows by: as a power that never falls, or by no steps at all.
GROWTHS: Final[Mapping[int, Bounds]] = {
    EXPONENTIAL: Bounds(1, MAX_GROWTH),
    training_pb2.LOQT_SCHEDULE_LINEAR: Bounds(0, MAX_GROWTH),
}


def check_loqt(
    settings: Settings,
    base: BaseSpec,
    quantization: str,
    num_steps: int | None,
    field: str = "loqt",
    sides: Mapping[str, Sides] | None = None,
) -> None:
    """Refuse a rank that some Linear is too small for, what the schedule has no use for, and one that never merges.

    Semantics: `quantization` is the spec's, empty where it is not set; `num_steps` is None where the data tell how many
    there are. `field` is the path of the settings below `spec`. `sides` are those that the Linears have in training, by
    path, where that is not the base's own. All Linears of the layers are trained so, lm_head is not.
    Raises: InvalidArgumentError (reason=RANK_TOO_LARGE, OUT_OF_RANGE or SETTING_NOT_USED) with the field below `spec`.
    """
    schedule = settings.schedule or EXPONENTIAL
    name, idle = SCHEDULES[schedule]
    for one in idle:
        is_set = settings.keep_moments if one == "keep_moments" else settings.HasField(one)  # type: ignore[arg-type]
        if is_set:
            raise wrong("SETTING_NOT_USED", f"{field}.{one}", f"the schedule {name} has no use for {one}")
    if settings.HasField("growth") and not (bounds := GROWTHS[schedule]).allow(settings.growth):
        message = f"{settings.growth:g} is not {bounds}, as the schedule {name} takes it"
        raise wrong("OUT_OF_RANGE", f"{field}.growth", message)
    if quantization == "none" and settings.HasField("compensation_steps"):
        message = "held without quantizing, weights lose nothing that there would be compensation for"
        raise wrong("SETTING_NOT_USED", f"{field}.compensation_steps", message)
    if settings.HasField("merge_interval") and num_steps is not None and settings.merge_interval >= num_steps:
        message = f"of {num_steps} steps none is left after {settings.merge_interval} to merge: the schedule is never"
        raise wrong("OUT_OF_RANGE", f"{field}.merge_interval", message)
    _check_rank(settings, base, field, sides or base.linears)


def _check_rank(settings: Settings, base: BaseSpec, field: str, sides: Mapping[str, Sides]) -> None:
    if not settings.HasField("rank"):
        return
    for path in sorted(sides):
        if path != base.lm_head_path and settings.rank > min(sides[path]):
            has = "has" if sides[path] == base.linears[path] else "once it is pruned has"
            message = f"rank {settings.rank} is more than the smaller side of {path}, which {has} {min(sides[path])}"
            raise wrong("RANK_TOO_LARGE", f"{field}.rank", message)
