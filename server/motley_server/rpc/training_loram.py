"""Whether the settings of LoRAM make sense for the base that is served: what is pruned of it, and what then stays.

Which heads and channels go is for a worker to choose; how many is known here, by the bases' own counting. Pure checks;
run on the event loop's thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from motley.v1 import training_pb2
from motley_bases.pruned_geometry import PruneRule
from motley_bases.spec import BaseSpec

from motley_server.errors import FailedPreconditionError
from motley_server.library.sets import read_reference
from motley_server.rpc.lora_targets import check_targets
from motley_server.rpc.training_bounds import wrong
from motley_server.rpc.training_loqt import check_loqt

Settings = training_pb2.LoramSettings
Sides = tuple[int, int]

DEFAULT_RATIO: Final = "1/2"
DEFAULT_PATTERN: Final = "4:8"
DEFAULT_STEPS: Final = 100  # of an alignment
# The Linears of a layer that lose outputs with its heads and FFN channels, or inputs.
PRUNED: Final = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
PRUNED_INPUTS: Final = ("self_attn.o_proj", "mlp.down_proj")

STRUCTURED: Final = training_pb2.LORAM_PRUNING_STRUCTURED
RANDOM: Final = training_pb2.LORAM_PRUNING_RANDOM
UNSTRUCTURED: Final = training_pb2.LORAM_PRUNING_UNSTRUCTURED
SEMI_STRUCTURED: Final = training_pb2.LORAM_PRUNING_SEMI_STRUCTURED
ZEROING: Final = (UNSTRUCTURED, SEMI_STRUCTURED)  # single weights, which stay where they are
# By pruning, how it is called, and what it has no use for.
PRUNINGS: Final[Mapping[int, tuple[str, tuple[str, ...]]]] = {
    STRUCTURED: ("structured", ("pattern",)),
    RANDOM: ("random", ("pattern", "calibration_samples")),
    UNSTRUCTURED: ("unstructured", ("pattern",)),
    SEMI_STRUCTURED: ("semi-structured", ("ratio",)),
}
CUT: Final = ("pruning", "ratio", "layers", "pattern", "calibration_samples")  # which an adapter may say instead

OF_A_COPY: Final = tuple(name for name in CUT if name != "ratio")

_RATIO: Final = re.compile(r"[0-9]{1,9}/0*[1-9][0-9]{0,8}|[0-9]{0,9}\.?[0-9]{1,9}")
_PAIR: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")


def check_loram(settings: Settings, base: BaseSpec, quantization: str) -> None:
    """Refuse what does not go together, a base that cannot be pruned so, and a cut that leaves nothing of it.

    Semantics: `quantization` is the spec's, empty where it is not set.
    Raises: InvalidArgumentError with the field below `spec`; FailedPreconditionError (reason=METHOD_NOT_FOR_BASE).
    """
    pruning = settings.pruning or STRUCTURED
    ratio = _ratio(settings)
    layers = _layers(settings, base) if settings.layers else None
    is_whole = not ratio and pruning != SEMI_STRUCTURED and not settings.same_cut_as
    _check_idle(settings, pruning, is_whole)
    _check_base(base, is_whole)
    sides: Mapping[str, Sides] = base.linears
    if settings.same_cut_as:
        read_reference(settings.same_cut_as, "spec.loram.same_cut_as")
    elif pruning == SEMI_STRUCTURED:
        _check_pattern(settings, base, layers or _layers(settings, base))
    elif pruning in (STRUCTURED, RANDOM) and not is_whole:
        sides = _pruned_sides(ratio, base, layers or _layers(settings, base))
    check_targets(settings.lora, base, "loram.lora", sides)
    if settings.alignment.HasField("loqt"):
        _check_alignment(settings.alignment, pruning, base, quantization, sides)


def _check_alignment(
    settings: training_pb2.LoramAlignment, pruning: int, base: BaseSpec, quantization: str, sides: Mapping[str, Sides]
) -> None:
    """Refuse to align by LoQT what must keep its zeros, and to begin anywhere but at the pruned copy."""
    if pruning in ZEROING:
        message = (
            f"the pruning {PRUNINGS[pruning][0]} sets weights to zero, and loqt trains them all: leave it out, or "
            "prune heads and channels"
        )
        raise wrong("LOQT_FILLS_ZEROS", "loram.alignment.loqt", message)
    if settings.loqt.start:
        message = "alignment goes on from the pruned copy: leave start out"
        raise wrong("SETTING_NOT_USED", "loram.alignment.loqt.start", message)
    num_steps = settings.steps if settings.HasField("steps") else DEFAULT_STEPS
    check_loqt(settings.loqt, base, quantization, num_steps, "loram.alignment.loqt", sides)


def _check_idle(settings: Settings, pruning: int, is_whole: bool) -> None:
    """Refuse what nothing would be done with."""
    name, idle = PRUNINGS[pruning]
    who = f"the pruning {name}"
    if settings.same_cut_as:
        idle, who = CUT, "a cut that is another adapter's"
    elif is_whole:
        idle, who = OF_A_COPY, "a ratio of 0, which prunes nothing,"
        if settings.HasField("alignment"):
            message = "alignment makes up for what was pruned, and a ratio of 0 prunes nothing"
            raise wrong("SETTING_NOT_USED", "loram.alignment", message)
    for field in idle:
        if getattr(settings, field):  # a number that was set is above 0
            raise wrong("SETTING_NOT_USED", f"loram.{field}", f"{who} has no use for {field}")


def _check_base(base: BaseSpec, is_whole: bool) -> None:
    paths = (_path(layer, name) for layer in range(len(base.layers)) for name in PRUNED)
    missing = next((path for path in paths if path not in base.linears), None)
    problem = missing and f"Linears named as in Llama are pruned, and {base.name} has no {missing}"
    if not (base.is_prunable or is_whole):
        problem = f"which channels of a {base.architecture} go together is not known"
    if base.pruned_from is not None:
        problem = f"{base.name} is pruned already"
    if problem is not None:
        message = f"loram prunes a copy of a whole base: {problem}"
        raise FailedPreconditionError(message, reason="METHOD_NOT_FOR_BASE", field="spec.method")


def _layers(settings: Settings, base: BaseSpec) -> range:
    """Return the layers that are pruned."""
    num_layers = len(base.layers)
    if not settings.layers and settings.pruning in ZEROING:
        return range(num_layers)
    if not settings.layers:
        layers = PruneRule(Fraction(0)).pruned_layers(num_layers)
        if not layers:
            message = f"all but the first four and the last two of {num_layers} layers are none: name some, as A:B"
            raise wrong("INVALID_LAYERS", "loram.layers", message)
        return layers
    found = _PAIR.fullmatch(settings.layers)
    if found is None or not int(found[1]) < int(found[2]) <= num_layers:
        message = f"{settings.layers[:40]!r} is not A:B, with layers A to B - 1 of the {num_layers} that there are"
        raise wrong("INVALID_LAYERS", "loram.layers", message)
    return range(int(found[1]), int(found[2]))


def _ratio(settings: Settings) -> Fraction:
    text = settings.ratio or DEFAULT_RATIO
    if not _RATIO.fullmatch(text) or not 0 <= Fraction(text) < 1:
        message = f"{text[:40]!r} is no ratio from 0 to below 1, such as 1/2 or 0.65"
        raise wrong("INVALID_RATIO", "loram.ratio", message)
    return Fraction(text)


def _check_pattern(settings: Settings, base: BaseSpec, layers: range) -> None:
    text = settings.pattern or DEFAULT_PATTERN
    found = _PAIR.fullmatch(text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        message = f"{text[:40]!r} is not N:M with N above 0 and below M, such as 4:8"
        raise wrong("INVALID_PATTERN", "loram.pattern", message)
    for path in sorted(base.linears):
        if any(path.startswith(f"model.layers.{layer}.") for layer in layers) and base.linears[path][0] % int(found[2]):
            message = f"{text} does not divide the rows of {path}, which have {base.linears[path][0]} weights"
            raise wrong("INVALID_PATTERN", "loram.pattern", message)


def _pruned_sides(ratio: Fraction, base: BaseSpec, layers: range) -> Mapping[str, Sides]:
    """Return the (in_features, out_features) of the base's Linears once these layers are pruned."""
    rule, sides = PruneRule(ratio), dict(base.linears)
    for layer in layers:
        heads = base.layers[layer]
        ffn_size = base.linears[_path(layer, "mlp.gate_proj")][1]
        kv_heads = rule.kept_kv_heads(heads.num_heads, heads.num_kv_heads)
        channels = rule.kept_ffn_size(ffn_size)
        if kv_heads < 1 or channels < 1:
            what = f"{heads.num_kv_heads} key-value heads" if kv_heads < 1 else f"{ffn_size} FFN channels"
            message = f"a ratio of {ratio} takes all {what} of layer {layer}"
            raise wrong("LEAVES_NOTHING", "loram.ratio", message)
        keys = kv_heads * heads.head_dim
        queries = keys * (heads.num_heads // heads.num_kv_heads)
        for name, size in zip(PRUNED, (queries, keys, keys, queries, channels, channels, channels), strict=True):
            inputs, outputs = sides[_path(layer, name)]
            sides[_path(layer, name)] = (size, outputs) if name in PRUNED_INPUTS else (inputs, size)
    return sides


def _path(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"
