"""Whether a training spec makes sense, for the base that is served, before a job is queued by it.

Everything that can be refused without the data is refused here, by the field's full path, so that no worker finds it
out. What tenants own, a spec names; whether it is there is looked up elsewhere. Pure checks; run on the event loop's
thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.errors import InvalidArgumentError
from motley_server.registry.aliases import MAX_ALIASES, check_alias
from motley_server.registry.dataset_records import check_dataset_digest
from motley_server.registry.labels import MAX_LABELS, check_labels
from motley_server.registry.ownership import check_adapter_name
from motley_server.rpc.convert_training import MAKE_BASES, METHODS
from motley_server.rpc.fields import naming
from motley_server.rpc.lease_scope import JOB_LABEL
from motley_server.rpc.lora_targets import check_targets
from motley_server.rpc.training_bounds import Bounds, check_bounds, wrong
from motley_server.rpc.training_goat import check_goat
from motley_server.rpc.training_loqt import check_loqt
from motley_server.rpc.training_loram import check_loram
from motley_server.rpc.training_s2ft import check_s2ft

Spec = training_pb2.TrainingSpec

DEFAULT_BATCH: Final = 16
QUANTIZATIONS: Final = ("none", "nf4")
ALIGNMENT: Final = "spec.loram.alignment.dataset"


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that a spec reads, as it names it: in which field, of which kind it must be, and what for."""

    name: str
    field: str
    kind: str
    purpose: str


def check_spec(spec: Spec, base: BaseSpec) -> str:
    """Refuse a spec that no worker could follow, and return its method.

    Raises: InvalidArgumentError with the field below `spec`; FailedPreconditionError (reason=METHOD_NOT_FOR_BASE).
    """
    method = METHODS.get(spec.method)
    if method is None:
        raise wrong("METHOD_REQUIRED", "method", f"say how to train: {', '.join(METHODS.values())}")
    settings = spec.WhichOneof("method_settings")
    if settings not in (None, method):
        message = f"the settings are of {settings}, and the method is {method}"
        raise wrong("SETTINGS_OF_ANOTHER_METHOD", str(settings), message)
    check_bounds(spec)
    _check_length(spec, base)
    _check_batches(spec)
    _check_data(spec)
    if spec.quantization and spec.quantization not in QUANTIZATIONS:
        message = f"{spec.quantization[:40]!r} is neither {' nor '.join(QUANTIZATIONS)}"
        raise wrong("UNKNOWN_QUANTIZATION", "quantization", message)
    _check_settings(spec, method, base)
    if spec.method not in MAKE_BASES:
        _check_publishing(spec.publish)
    elif spec.HasField("publish"):
        raise wrong("SETTING_NOT_USED", "publish", f"{method} makes a base, and publishes no adapter")
    return method


def datasets_of(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield the digests that a spec names, each with its field."""
    yield spec.dataset, "spec.dataset"
    if spec.gate.dataset:
        yield spec.gate.dataset, "spec.gate.dataset"
    if spec.loram.HasField("alignment"):
        yield spec.loram.alignment.dataset, ALIGNMENT


def adapters_of(spec: Spec) -> Iterator[NamedAdapter]:
    """Yield the adapters that a spec reads, in its order, which is that of a worker's too."""
    for index, name in enumerate(spec.s2ft.disjoint_from):
        yield NamedAdapter(name, f"spec.s2ft.disjoint_from[{index}]", "s2ft", "channels are apart from those")
    if spec.loram.same_cut_as:
        yield NamedAdapter(spec.loram.same_cut_as, "spec.loram.same_cut_as", "loram", "a cut is taken over")


def _check_settings(spec: Spec, method: str, base: BaseSpec) -> None:
    match method:
        case "lora":
            check_targets(spec.lora, base, "lora")
        case "s2ft":
            check_s2ft(spec.s2ft, base)
        case "goat":
            check_goat(spec.goat, base)
        case "loram":
            check_loram(spec.loram, base, spec.quantization)
        case "loqt":
            check_loqt(spec.loqt, base, spec.quantization, spec.steps if spec.HasField("steps") else None)


def _check_length(spec: Spec, base: BaseSpec) -> None:
    bounds = Bounds(2, base.context_length)
    if spec.HasField("max_length") and not bounds.allow(spec.max_length):
        message = f"{spec.max_length} is not {bounds}: the base's context has {base.context_length} tokens"
        raise wrong("OUT_OF_RANGE", "max_length", message)


def _check_batches(spec: Spec) -> None:
    batch = spec.batch_size if spec.HasField("batch_size") else DEFAULT_BATCH
    if spec.HasField("micro_batch_size") and batch % spec.micro_batch_size:
        message = f"a batch of {batch} cannot be divided into parts of {spec.micro_batch_size}"
        raise wrong("BATCH_NOT_DIVISIBLE", "micro_batch_size", message)
    warmup = spec.optimizer.warmup_steps
    if spec.HasField("steps") and warmup >= spec.steps and warmup:
        message = f"{warmup} steps of warm-up leave nothing of {spec.steps} steps"
        raise wrong("OUT_OF_RANGE", "optimizer.warmup_steps", message)


def _check_data(spec: Spec) -> None:
    for digest, field in datasets_of(spec):
        holder, _, name = field.rpartition(".")
        with naming(holder, {"digest": name}):
            check_dataset_digest(digest)


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
