"""The check of a spec for LoQT, and for LoRAM that aligns by it: what can be followed, and each refusal by its path."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from motley.v1 import training_pb2 as pb
from motley_server.errors import InvalidArgumentError
from motley_server.rpc.convert_training import text_of
from motley_server.rpc.training_sizes import least_adapter_bytes
from motley_server.rpc.training_spec import check_spec
from motley_trainer.spec.reading import read_spec
from rpc_harness import make_base
from training_calls import DATA, digest_of, samples, spec_with

BASE = make_base()  # the smaller side of its keys' and values' Linears is 8, of all others 16
OTHER = digest_of(samples(seed=1))
STATIC, LINEAR, NEVER = pb.LOQT_SCHEDULE_STATIC, pb.LOQT_SCHEDULE_LINEAR, pb.LOQT_SCHEDULE_NEVER


def loqt_with(spec: dict[str, Any] | None = None, **settings: Any) -> pb.TrainingSpec:
    """Return a spec of LoQT that is right but for what is said."""
    said = {"method": pb.TRAINING_METHOD_LOQT, "dataset": digest_of(DATA), "loqt": pb.LoqtSettings(**settings)}
    return pb.TrainingSpec(**said | (spec or {}))


def aligned_with(cut: dict[str, Any] | None = None, **settings: Any) -> pb.TrainingSpec:
    """Return a spec of LoRAM whose copy is aligned by LoQT."""
    alignment = pb.LoramAlignment(dataset=OTHER, loqt=pb.LoqtSettings(**settings))
    loram = {"layers": "0:1", "lora": {"rank": 4}, "alignment": alignment} | (cut or {})
    return spec_with(method=pb.TRAINING_METHOD_LORAM, loram=pb.LoramSettings(**loram))


GOOD: dict[str, pb.TrainingSpec] = {
    "LoQT as it comes": loqt_with(),
    "LoQT without settings": pb.TrainingSpec(method=pb.TRAINING_METHOD_LOQT, dataset=digest_of(DATA)),
    "from scratch": loqt_with(start=pb.LOQT_START_SCRATCH),
    "a rank as large as the smallest side": loqt_with(rank=8),
    "held as it is": loqt_with({"quantization": "none"}),
    "held in NF4": loqt_with({"quantization": "nf4"}),
    "no compensation": loqt_with(compensation_steps=0),
    "as much compensation as there may be": loqt_with(compensation_steps=100),
    "powers that stay": loqt_with(schedule=pb.LOQT_SCHEDULE_EXPONENTIAL, growth=1.0),
    "every other step": loqt_with({"steps": 3}, schedule=STATIC, merge_interval=2, keep_moments=True),
    "intervals that stay": loqt_with(schedule=LINEAR, growth=0.0),
    "never": loqt_with(schedule=NEVER, scale=1e-3),
    "eight bits": loqt_with(decomposition=pb.LOQT_DECOMPOSITION_EIGH, optimizer=pb.LOQT_OPTIMIZER_ADAMW_8BIT),
}
ALIGNED: dict[str, pb.TrainingSpec] = {
    "alignment by LoQT": aligned_with(),
    "alignment by LoQT of another's cut": aligned_with({"layers": "", "same_cut_as": "rows"}, rank=8),
    "alignment by LoQT within what is left": aligned_with(rank=8, schedule=STATIC, merge_interval=5),
}


@pytest.mark.parametrize("name", GOOD)
def test_settings_that_can_be_followed_are_let_through(name: str) -> None:
    assert check_spec(GOOD[name], BASE) == "loqt"
    assert read_spec(json.loads(text_of(GOOD[name]))).method == "loqt", "a worker reads it too"


@pytest.mark.parametrize("name", ALIGNED)
def test_alignment_that_can_be_followed_is_let_through(name: str) -> None:
    assert check_spec(ALIGNED[name], BASE) == "loram"
    assert read_spec(json.loads(text_of(ALIGNED[name]))).method == "loram", "a worker reads it too"


# Of both, below the settings.
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "rank 0": ({"rank": 0}, "OUT_OF_RANGE", ".rank"),
    "a rank over the smallest side": ({"rank": 9}, "RANK_TOO_LARGE", ".rank"),
    "scale 0": ({"scale": 0.0}, "OUT_OF_RANGE", ".scale"),
    "a negative scale": ({"scale": -0.5}, "OUT_OF_RANGE", ".scale"),
    "a scale of infinity": ({"scale": math.inf}, "OUT_OF_RANGE", ".scale"),
    "a scale of NaN": ({"scale": math.nan}, "OUT_OF_RANGE", ".scale"),
    "compensation before the first": ({"compensation_steps": -1}, "OUT_OF_RANGE", ".compensation_steps"),
    "compensation without end": ({"compensation_steps": 101}, "OUT_OF_RANGE", ".compensation_steps"),
    "an interval of 0": ({"merge_interval": 0}, "OUT_OF_RANGE", ".merge_interval"),
    "an interval of 1": ({"schedule": STATIC, "merge_interval": 1}, "OUT_OF_RANGE", ".merge_interval"),
    "an interval of 0 that grows": ({"schedule": LINEAR, "merge_interval": 0}, "OUT_OF_RANGE", ".merge_interval"),
    "powers that fall": ({"growth": 0.9}, "OUT_OF_RANGE", ".growth"),
    "powers that explode": ({"growth": 1e7}, "OUT_OF_RANGE", ".growth"),
    "intervals that shrink": ({"schedule": LINEAR, "growth": -1.0}, "OUT_OF_RANGE", ".growth"),
    "intervals of NaN": ({"schedule": LINEAR, "growth": math.nan}, "OUT_OF_RANGE", ".growth"),
    "growth of what stays": ({"schedule": STATIC, "growth": 1.2}, "SETTING_NOT_USED", ".growth"),
    "growth of nothing": ({"schedule": NEVER, "growth": 1.2}, "SETTING_NOT_USED", ".growth"),
    "an interval of nothing": ({"schedule": NEVER, "merge_interval": 9}, "SETTING_NOT_USED", ".merge_interval"),
    "moments of nothing": ({"schedule": NEVER, "keep_moments": True}, "SETTING_NOT_USED", ".keep_moments"),
}  # fmt: skip


def refused(spec: pb.TrainingSpec) -> tuple[str, str | None]:
    with pytest.raises(InvalidArgumentError) as caught:
        check_spec(spec, BASE)
    assert len(caught.value.message) < 400
    return caught.value.reason, caught.value.field


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_followed_are_refused_by_the_fields_path(name: str) -> None:
    settings, reason, field = BAD[name]
    assert refused(loqt_with(**settings)) == (reason, f"spec.loqt{field}")
    assert refused(aligned_with(**settings)) == (reason, f"spec.loram.alignment.loqt{field}")


@pytest.mark.parametrize(
    ("spec", "reason", "field"),
    [
        ({"publish": pb.PublishSettings(adapter_name="trained")}, "SETTING_NOT_USED", "publish"),
        ({"publish": pb.PublishSettings()}, "SETTING_NOT_USED", "publish"),
        ({"quantization": "int8"}, "UNKNOWN_QUANTIZATION", "quantization"),
        ({"loqt": None, "lora": pb.LoraSettings()}, "SETTINGS_OF_ANOTHER_METHOD", "lora"),
        ({"method": pb.TRAINING_METHOD_LORA}, "SETTINGS_OF_ANOTHER_METHOD", "loqt"),
        ({"dataset": "mine"}, "INVALID_DIGEST", "dataset"),
        ({"batch_size": 8, "micro_batch_size": 3}, "BATCH_NOT_DIVISIBLE", "micro_batch_size"),
    ],
    ids=str,
)
def test_what_does_not_go_with_loqt_is_refused(spec: dict[str, Any], reason: str, field: str) -> None:
    assert refused(loqt_with(spec)) == (reason, f"spec.{field}")


@pytest.mark.parametrize(("steps", "interval"), [(20, 20), (20, 21)])
def test_an_interval_that_is_never_over_is_refused_where_the_steps_are_known(steps: int, interval: int) -> None:
    wanted = ("OUT_OF_RANGE", "spec.loqt.merge_interval")
    assert refused(loqt_with({"steps": steps}, merge_interval=interval)) == wanted
    assert check_spec(loqt_with({"steps": steps}, merge_interval=steps - 1), BASE) == "loqt"
    assert check_spec(loqt_with({"epochs": 1.0}, merge_interval=interval), BASE) == "loqt", "the data tell"


def test_an_interval_that_an_alignment_is_never_over_is_refused_by_its_field() -> None:
    wanted = ("OUT_OF_RANGE", "spec.loram.alignment.loqt.merge_interval")
    assert refused(aligned_with(merge_interval=100)) == wanted  # which is how many steps there are unless set
    spec = aligned_with(merge_interval=99)
    assert check_spec(spec, BASE) == "loram"
    spec.loram.alignment.steps = 99
    assert refused(spec) == wanted


def test_what_is_not_quantized_has_nothing_to_compensate_for() -> None:
    specs = {"loqt": loqt_with(compensation_steps=0), "loram.alignment.loqt": aligned_with(compensation_steps=5)}
    for field, spec in specs.items():
        spec.quantization = "none"
        assert refused(spec) == ("SETTING_NOT_USED", f"spec.{field}.compensation_steps")


@pytest.mark.parametrize(
    "cut",
    [
        {"pruning": pb.LORAM_PRUNING_UNSTRUCTURED},
        {"pruning": pb.LORAM_PRUNING_SEMI_STRUCTURED},
        {"pruning": pb.LORAM_PRUNING_SEMI_STRUCTURED, "pattern": "2:4"},
    ],
    ids=str,
)
def test_weights_that_must_stay_zero_are_not_aligned_by_loqt(cut: dict[str, Any]) -> None:
    assert refused(aligned_with(cut)) == ("LOQT_FILLS_ZEROS", "spec.loram.alignment.loqt")


@pytest.mark.parametrize("start", [pb.LOQT_START_BASE, pb.LOQT_START_SCRATCH])
def test_alignment_begins_at_the_copy_and_nowhere_else(start: pb.LoqtStart.ValueType) -> None:
    assert refused(aligned_with(start=start)) == ("SETTING_NOT_USED", "spec.loram.alignment.loqt.start")


def test_the_rank_of_an_alignment_fits_what_pruning_leaves() -> None:
    cut = {"ratio": "7/8", "lora": {"rank": 4}}  # of 32 channels 4 are left
    assert check_spec(aligned_with(cut, rank=4), BASE) == "loram"
    with pytest.raises(InvalidArgumentError, match="once it is pruned has 4") as caught:
        check_spec(aligned_with(cut, rank=5), BASE)
    assert (caught.value.reason, caught.value.field) == ("RANK_TOO_LARGE", "spec.loram.alignment.loqt.rank")


def test_a_base_that_is_pruned_can_be_trained_and_its_job_publishes_no_bytes() -> None:
    assert check_spec(loqt_with(), replace(BASE, pruned_from="sha256:" + "a" * 64)) == "loqt"
    assert least_adapter_bytes(loqt_with(), BASE) == 0
