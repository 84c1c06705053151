"""Whether the settings of S2FT make sense for the base that is served.

Pure checks; run on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.errors import FailedPreconditionError
from motley_server.library.sets import read_reference
from motley_server.rpc.training_bounds import wrong

MAX_DISJOINT: Final = 32
# By share, the Linear of every layer that it is of.
S2FT_PLACES: Final[Mapping[str, str]] = MappingProxyType({
    "o_share": "self_attn.o_proj",
    "down_share": "mlp.down_proj",
    "v_share": "self_attn.v_proj",
    "up_share": "mlp.up_proj",
})  # fmt: skip
DEFAULT_SHARES: Final = ("o_share", "down_share")


def check_s2ft(settings: training_pb2.S2ftSettings, base: BaseSpec) -> None:
    """Refuse shares that take nothing, a base without their Linears, and adapters that cannot be kept apart from.

    Raises: InvalidArgumentError with the field below `spec`; FailedPreconditionError (reason=METHOD_NOT_FOR_BASE).
    """
    given = [name for name in S2FT_PLACES if settings.HasField(name)]  # type: ignore[arg-type]
    shares = [name for name in given if getattr(settings, name)] if given else DEFAULT_SHARES
    if not shares:
        raise wrong("SELECTS_NOTHING", "s2ft", "no share is above 0, so that nothing would be trained")
    for share in shares:
        for layer in range(len(base.layers)):
            path = f"model.layers.{layer}.{S2FT_PLACES[share]}"
            if path not in base.linears:
                message = f"s2ft takes a base with Linears named as in Llama, and {base.name} has no {path}"
                raise FailedPreconditionError(message, reason="METHOD_NOT_FOR_BASE", field="spec.method")
    if len(settings.disjoint_from) > MAX_DISJOINT:
        message = f"{len(settings.disjoint_from)} items; {MAX_DISJOINT} are allowed"
        raise wrong("OUT_OF_RANGE", "s2ft.disjoint_from", message)
    for index, name in enumerate(settings.disjoint_from):
        field = f"s2ft.disjoint_from[{index}]"
        read_reference(name, f"spec.{field}")
        if name in settings.disjoint_from[:index]:
            raise wrong("DUPLICATE_ADAPTER", field, f"{name!r} is named before")
