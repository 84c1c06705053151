"""Whether a training spec makes sense, for the base that is served, before a job is queued by it.

Everything that can be refused without the data is refused here, by the field's full path, so that no worker finds it
out. What tenants own, a spec names; whether it is there is looked up elsewhere. Pure checks; run on the event loop's
thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.errors import FailedPreconditionError, InvalidArgumentError
from motley_server.library.sets import read_reference
from motley_server.registry.aliases import MAX_ALIASES, check_alias
from motley_server.registry.dataset_records import check_dataset_digest
from motley_server.registry.labels import MAX_LABELS, check_labels
from motley_server.registry.ownership import check_adapter_name
from motley_server.rpc.convert_training import METHODS
from motley_server.rpc.fields import naming
from motley_server.rpc.lease_scope import JOB_LABEL
from motley_server.rpc.lora_targets import check_targets

Spec = training_pb2.TrainingSpec

MAX_RANK: Final = 4096
MAX_STEPS: Final = 10**7
MAX_BATCH: Final = 1 << 16
MAX_SAMPLES: Final = 1 << 20  # to score channels on
MAX_DISJOINT: Final = 32
DEFAULT_BATCH: Final = 16
QUANTIZATIONS: Final = ("none", "nf4")
# By share, the Linear of every layer that it is of.
S2FT_PLACES: Final[Mapping[str, str]] = MappingProxyType({
    "o_share": "self_attn.o_proj",
    "down_share": "mlp.down_proj",
    "v_share": "self_attn.v_proj",
    "up_share": "mlp.up_proj",
})  # fmt: skip
DEFAULT_SHARES: Final = ("o_share", "down_share")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be: in [least, most] and in (above, below). NaN is nowhere."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allow(self, value: float) -> bool:
        """Tell whether a number is within."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        kept = [f"{word} {bound:.17g}" for word, bound in bounds if math.isfinite(bound)]
        return f"a number {' and '.join(kept)}"


_SHARE: Final = Bounds(0, 1)
_COUNT: Final = Bounds(1, MAX_STEPS)
_POSITIVE: Final = Bounds(above=0, most=1e30)
_BELOW_ONE: Final = Bounds(0, below=1)

# Of fields that were set; what was not has a default that is within.
BOUNDS: Final[Mapping[str, Bounds]] = MappingProxyType({
    "steps": _COUNT,
    "epochs": Bounds(above=0, most=1e6),
    "batch_size": Bounds(1, MAX_BATCH),
    "micro_batch_size": Bounds(1, MAX_BATCH),
    "checkpoint_steps": _COUNT,
    "lora.rank": Bounds(1, MAX_RANK),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _BELOW_ONE,
    **{f"s2ft.{name}": _SHARE for name in S2FT_PLACES},
    "s2ft.calibration_samples": Bounds(1, MAX_SAMPLES),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": Bounds(0, MAX_STEPS),
    "optimizer.weight_decay": Bounds(0, 1e30),
    "optimizer.beta1": _BELOW_ONE,
    "optimizer.beta2": _BELOW_ONE,
    "optimizer.max_gradient_norm": Bounds(0, 1e30),
    "gate.max_loss_ratio": _POSITIVE,
    "gate.min_exact_match": _SHARE,
})  # fmt: skip


def check_spec(spec: Spec, base: BaseSpec) -> str:
    """Refuse a spec that no worker could follow, and return its method.

    Raises: InvalidArgumentError with the field below `spec`; FailedPreconditionError (reason=METHOD_NOT_FOR_BASE).
    """
    method = METHODS.get(spec.method)
    if method is None:
        raise _wrong("METHOD_REQUIRED", "method", f"say how to train: {', '.join(METHODS.values())}")
    settings = spec.WhichOneof("method_settings")
    if settings not in (None, method):
        message = f"the settings are of {settings}, and the method is {method}"
        raise _wrong("SETTINGS_OF_ANOTHER_METHOD", str(settings), message)
    for path, bounds in BOUNDS.items():
        _check_bounds(spec, path, bounds)
    _check_length(spec, base)
    _check_batches(spec)
    _check_data(spec)
    if spec.quantization and spec.quantization not in QUANTIZATIONS:
        message = f"{spec.quantization[:40]!r} is neither {' nor '.join(QUANTIZATIONS)}"
        raise _wrong("UNKNOWN_QUANTIZATION", "quantization", message)
    if method == "s2ft":
        _check_s2ft(spec.s2ft, base)
    else:
        check_targets(spec.lora, base, Bounds(1, MAX_RANK), _POSITIVE)
    _check_publishing(spec.publish)
    return method


def datasets_of(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield the digests that a spec names, each with its field."""
    yield spec.dataset, "spec.dataset"
    if spec.gate.dataset:
        yield spec.gate.dataset, "spec.gate.dataset"


def adapters_of(spec: Spec) -> Sequence[str]:
    """Return the adapters that a spec reads, as it names them, in its order."""
    return tuple(spec.s2ft.disjoint_from)


def _check_bounds(spec: Spec, path: str, bounds: Bounds) -> None:
    *holders, name = path.split(".")
    holder: Any = reduce(getattr, holders, spec)
    if holder.HasField(name) and not bounds.allow(value := getattr(holder, name)):
        raise _wrong("OUT_OF_RANGE", path, f"{value:g} is not {bounds}")


def _check_length(spec: Spec, base: BaseSpec) -> None:
    bounds = Bounds(2, base.context_length)
    if spec.HasField("max_length") and not bounds.allow(spec.max_length):
        message = f"{spec.max_length} is not {bounds}: the base's context has {base.context_length} tokens"
        raise _wrong("OUT_OF_RANGE", "max_length", message)


def _check_batches(spec: Spec) -> None:
    batch = spec.batch_size if spec.HasField("batch_size") else DEFAULT_BATCH
    if spec.HasField("micro_batch_size") and batch % spec.micro_batch_size:
        message = f"a batch of {batch} cannot be divided into parts of {spec.micro_batch_size}"
        raise _wrong("BATCH_NOT_DIVISIBLE", "micro_batch_size", message)
    warmup = spec.optimizer.warmup_steps
    if spec.HasField("steps") and warmup >= spec.steps and warmup:
        message = f"{warmup} steps of warm-up leave nothing of {spec.steps} steps"
        raise _wrong("OUT_OF_RANGE", "optimizer.warmup_steps", message)


def _check_data(spec: Spec) -> None:
    for digest, field in datasets_of(spec):
        holder, _, name = field.rpartition(".")
        with naming(holder, {"digest": name}):
            check_dataset_digest(digest)


def _check_s2ft(settings: training_pb2.S2ftSettings, base: BaseSpec) -> None:
    given = [name for name in S2FT_PLACES if settings.HasField(name)]  # type: ignore[arg-type]
    shares = [name for name in given if getattr(settings, name)] if given else DEFAULT_SHARES
    if not shares:
        raise _wrong("SELECTS_NOTHING", "s2ft", "no share is above 0, so that nothing would be trained")
    for share in shares:
        for layer in range(len(base.layers)):
            path = f"model.layers.{layer}.{S2FT_PLACES[share]}"
            if path not in base.linears:
                message = f"s2ft takes a base with Linears named as in Llama, and {base.name} has no {path}"
                raise FailedPreconditionError(message, reason="METHOD_NOT_FOR_BASE", field="spec.method")
    if len(settings.disjoint_from) > MAX_DISJOINT:
        message = f"{len(settings.disjoint_from)} items; {MAX_DISJOINT} are allowed"
        raise _wrong("OUT_OF_RANGE", "s2ft.disjoint_from", message)
    for index, name in enumerate(settings.disjoint_from):
        field = f"s2ft.disjoint_from[{index}]"
        read_reference(name, f"spec.{field}")
        if name in settings.disjoint_from[:index]:
            raise _wrong("DUPLICATE_ADAPTER", field, f"{name!r} is named before")


def _check_publishing(publish: training_pb2.PublishSettings) -> None:
    with naming("spec.publish", {"adapter_name": "adapter_name", "aliases": "aliases", "labels": "labels"}):
        check_adapter_name(publish.adapter_name)
        if len(publish.aliases) > MAX_ALIASES:
            message = f"{len(publish.aliases)} items; {MAX_ALIASES} are allowed"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="aliases")
        if publish.keep_aliases and publish.aliases:
            message = "the spec names aliases to point at the version, and says to keep all where they are"
            raise InvalidArgumentError(message, reason="ALIASES_KEPT", field="aliases")
        for index, alias in enumerate(publish.aliases):
            check_alias(alias, f"aliases[{index}]")
        if JOB_LABEL in publish.labels:
            message = f"{JOB_LABEL} is the server's to say: it names the job that made a version"
            raise InvalidArgumentError(message, reason="INVALID_LABEL", field=f"labels[{JOB_LABEL}]")
        if len(publish.labels) == MAX_LABELS:
            message = f"{MAX_LABELS} labels are too many: at most {MAX_LABELS - 1}, beside the one of the server's own"
            raise InvalidArgumentError(message, reason="INVALID_LABEL", field="labels")
        check_labels(publish.labels)


def _wrong(reason: str, field: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field=f"spec.{field}")
