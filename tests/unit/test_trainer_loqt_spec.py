"""LoQT's settings are read to the last field, or refused by the name that the proto gives it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format
from motley.v1 import training_pb2
from motley_trainer.errors import SettingsError
from motley_trainer.job.alignment import alignment_spec
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import (
    LoqtDecomposition,
    LoqtOptimizer,
    LoqtSchedule,
    LoqtSettings,
    LoqtStart,
    LoramSettings,
    TrainingSpec,
)

DATA, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def from_wire(**fields: Any) -> TrainingSpec:
    """Read a message as a worker hands it on."""
    message = json_format.ParseDict({"dataset": DATA, **fields}, training_pb2.TrainingSpec())
    return read_spec(json_format.MessageToDict(message, preserving_proto_field_name=True))


def loqt(**settings: Any) -> TrainingSpec:
    return from_wire(method="TRAINING_METHOD_LOQT", loqt=settings)


def loram(**settings: Any) -> TrainingSpec:
    return from_wire(method="TRAINING_METHOD_LORAM", loram={"alignment": {"dataset": OTHER, "loqt": settings}})


def test_what_is_not_said_is_as_the_proto_says() -> None:
    spec = from_wire(method="TRAINING_METHOD_LOQT")
    assert spec.settings == LoqtSettings()
    assert spec.settings == LoqtSettings(
        LoqtStart.BASE,
        None,
        0.5,
        5,
        LoqtSchedule.EXPONENTIAL,
        None,
        1.2,
        LoqtDecomposition.SVD,
        LoqtOptimizer.ADAMW,
        False,
    )
    assert (spec.quantization, spec.optimizer.has_8bit_moments) == (None, False)


def test_everything_that_is_said_is_read() -> None:
    spec = loqt(
        start="LOQT_START_SCRATCH", rank=3, scale=0.25, compensation_steps=0, schedule="LOQT_SCHEDULE_LINEAR",
        merge_interval=7, growth=2.5, decomposition="LOQT_DECOMPOSITION_EIGH", optimizer="LOQT_OPTIMIZER_ADAMW_8BIT",
        keep_moments=True,
    )  # fmt: skip
    assert spec.settings == LoqtSettings(
        LoqtStart.SCRATCH,
        3,
        0.25,
        0,
        LoqtSchedule.LINEAR,
        7,
        2.5,
        LoqtDecomposition.EIGH,
        LoqtOptimizer.ADAMW_8BIT,
        True,
    )
    assert spec.optimizer.has_8bit_moments


@pytest.mark.parametrize(
    ("schedule", "growth"), [("EXPONENTIAL", 1.2), ("STATIC", 0.0), ("LINEAR", 100.0), ("NEVER", 0.0)]
)
def test_growth_is_by_the_schedule(schedule: str, growth: float) -> None:
    settings = loqt(schedule=f"LOQT_SCHEDULE_{schedule}").settings
    assert isinstance(settings, LoqtSettings)
    assert settings.growth == growth


def test_an_alignment_by_loqt_is_a_settings_of_its_own() -> None:
    spec = loram(rank=4, optimizer="LOQT_OPTIMIZER_ADAMW_8BIT")
    assert isinstance(spec.settings, LoramSettings)
    alignment = spec.settings.alignment
    assert alignment is not None
    assert alignment.loqt == LoqtSettings(rank=4, optimizer=LoqtOptimizer.ADAMW_8BIT)
    assert alignment_spec(spec, alignment).optimizer.has_8bit_moments
    assert not spec.optimizer.has_8bit_moments


def test_an_empty_message_asks_for_loqt_all_the_same() -> None:
    spec = loram()
    assert isinstance(spec.settings, LoramSettings)
    assert spec.settings.alignment is not None
    assert spec.settings.alignment.loqt == LoqtSettings()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"start": "LOQT_START_ELSEWHERE"}, "start"),
    ({"rank": 0}, "rank"),
    ({"rank": 1 << 17}, "rank"),
    ({"scale": 0}, "scale"),
    ({"scale": -1.0}, "scale"),
    ({"scale": float("nan")}, "scale"),
    ({"scale": float("inf")}, "scale"),
    ({"compensation_steps": -1}, "compensation_steps"),
    ({"compensation_steps": 101}, "compensation_steps"),
    ({"schedule": "LOQT_SCHEDULE_DAILY"}, "schedule"),
    ({"merge_interval": 0}, "merge_interval"),
    ({"merge_interval": 1}, "merge_interval"),
    ({"growth": 0.9}, "growth"),
    ({"growth": float("inf")}, "growth"),
    ({"schedule": "LOQT_SCHEDULE_LINEAR", "growth": -1}, "growth"),
    ({"schedule": "LOQT_SCHEDULE_STATIC", "growth": 2}, "growth"),
    ({"schedule": "LOQT_SCHEDULE_NEVER", "growth": 2}, "growth"),
    ({"schedule": "LOQT_SCHEDULE_NEVER", "merge_interval": 5}, "merge_interval"),
    ({"schedule": "LOQT_SCHEDULE_NEVER", "keep_moments": True}, "keep_moments"),
    ({"decomposition": "LOQT_DECOMPOSITION_QR"}, "decomposition"),
    ({"optimizer": "LOQT_OPTIMIZER_SGD"}, "optimizer"),
    ({"keep_moments": 1}, "keep_moments"),
    ({"bits": 4}, "bits"),
]


@pytest.mark.parametrize(("settings", "field"), WRONG, ids=str)
def test_what_cannot_be_is_refused_by_its_field(settings: dict[str, Any], field: str) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"method": "TRAINING_METHOD_LOQT", "loqt": settings}, "loqt"),
        (
            {"method": "TRAINING_METHOD_LORAM", "loram": {"alignment": {"dataset": OTHER, "loqt": settings}}},
            "loram.alignment.loqt",
        ),
    ]
    for spec, path in asked:
        with pytest.raises(SettingsError) as refused:
            read_spec({"dataset": DATA, **spec})
        assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", f"{path}.{field}")


@pytest.mark.parametrize("steps", [0, 5])
def test_what_is_not_quantized_has_nothing_to_compensate_for(steps: int) -> None:
    settings = {"compensation_steps": steps}
    alignment = {"alignment": {"dataset": OTHER, "loqt": settings}}
    for method, asked, path in (("LOQT", settings, "loqt"), ("LORAM", alignment, "loram.alignment.loqt")):
        fields: dict[str, Any] = {"method": f"TRAINING_METHOD_{method}", method.lower(): asked}
        assert from_wire(**fields, quantization="nf4").quantization == "nf4"
        with pytest.raises(SettingsError) as refused:
            from_wire(**fields, quantization="none")
        assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", f"{path}.compensation_steps")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"publish": {"adapter_name": "a"}}, "publish"),
        ({"quantization": "int8"}, "quantization"),
        ({"lora": {}}, "lora"),
        ({"loqt": []}, "loqt"),
    ],
)
def test_what_does_not_go_with_a_base_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_spec({"method": "TRAINING_METHOD_LOQT", "dataset": DATA, **fields})
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", field)


def test_an_alignment_begins_from_the_pruned_copy_and_from_nothing_else() -> None:
    with pytest.raises(SettingsError) as refused:
        loram(start="LOQT_START_SCRATCH")
    assert refused.value.field == "loram.alignment.loqt.start"
