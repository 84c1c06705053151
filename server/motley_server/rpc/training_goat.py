"""Whether the settings of GOAT make sense for the base that is served.

Pure checks; run on the event loop's thread.
"""

from __future__ import annotations

from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.rpc.lora_targets import targets_of
from motley_server.rpc.training_bounds import Bounds, wrong

Settings = training_pb2.GoatSettings

DEFAULT_RANK: Final = 8
DEFAULT_EXPERTS: Final = 8


def check_goat(settings: Settings, base: BaseSpec) -> None:
    """Refuse experts that cannot share the rank or find no directions to begin as, and settings of the other scale.

    Raises: InvalidArgumentError with the field below `spec`.
    """
    rank = settings.rank if settings.HasField("rank") else DEFAULT_RANK
    experts = settings.experts if settings.HasField("experts") else DEFAULT_EXPERTS
    if rank < experts:
        raise wrong("RANK_TOO_SMALL", "goat.rank", f"rank {rank} leaves some of {experts} experts without any")
    if rank % experts:
        raise wrong("RANK_NOT_DIVISIBLE", "goat.rank", f"rank {rank} cannot be shared evenly by {experts} experts")
    if settings.HasField("top_k") and not (bounds := Bounds(1, experts)).allow(settings.top_k):
        message = f"{settings.top_k} is not {bounds}, which is how many experts there are"
        raise wrong("OUT_OF_RANGE", "goat.top_k", message)
    _check_scale(settings)
    for path in sorted(targets_of(settings.target_modules, base, "goat")):
        smaller_side = min(base.linears[path])
        if rank > smaller_side:  # the same as: an expert is wider than its segment
            message = (
                f"{experts} experts begin as {rank} directions of the spectrum of {path}, each as {rank // experts} of "
                f"a segment of {smaller_side // experts}"
            )
            raise wrong("RANK_TOO_LARGE", "goat.rank", message)


def _check_scale(settings: Settings) -> None:
    """Refuse what the scale has no use for."""
    is_theoretical = settings.scale != training_pb2.GOAT_SCALE_ALPHA
    idle = {
        "alpha": is_theoretical and settings.HasField("alpha"),
        "eta": not is_theoretical and settings.HasField("eta"),
        "rank_for_scale": not is_theoretical and settings.rank_for_scale != 0,
    }
    for name, is_set in idle.items():
        if is_set:
            scale = "theoretical" if is_theoretical else "alpha"
            raise wrong("SETTING_NOT_USED", f"goat.{name}", f"the scale {scale} has no use for {name}")
