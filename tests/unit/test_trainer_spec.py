"""The JSON of a TrainingSpec is understood to the last field, or refused by the name that the proto gives it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import json_format
from motley.v1 import training_pb2
from motley_trainer.errors import SettingsError
from motley_trainer.job.schedule import rate, warmup_steps
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    GateSettings,
    LoraSettings,
    OptimizerSettings,
    OverLength,
    S2ftSettings,
    Schedule,
    TrainingMethod,
    TrainingSpec,
    derived_seed,
)

DATA = f"sha256:{'a' * 64}"
OTHER = f"sha256:{'b' * 64}"


def from_wire(**fields: Any) -> TrainingSpec:
    """Read a message as a worker hands it on."""
    message = json_format.ParseDict({"dataset": DATA, **fields}, training_pb2.TrainingSpec())
    return read_spec(json_format.MessageToDict(message, preserving_proto_field_name=True))


def test_what_is_not_said_is_as_the_proto_says() -> None:
    spec = from_wire(method="TRAINING_METHOD_LORA")
    assert spec == TrainingSpec(TrainingMethod.LORA, LoraSettings(8, 16.0), DATA, spec.digest)
    assert (spec.steps, spec.epochs, spec.batch_size, spec.micro_batch_size) == (None, 3.0, 16, 16)
    assert (spec.max_length, spec.over_length, spec.seed) == (None, OverLength.TRUNCATE, 0)
    assert (spec.checkpoint_steps, spec.quantization) == (50, None)
    assert spec.optimizer == OptimizerSettings(2e-4, Schedule.LINEAR, None, 0.0, 0.9, 0.999, 1.0)
    assert spec.gate == GateSettings(None, 1.0, None)
    s2ft = from_wire(method="TRAINING_METHOD_S2FT").settings
    assert s2ft == S2ftSettings(0.05, 0.02, 0.0, 0.0, ChannelScore.RANDOM, ChannelOrder.SMALL, ChannelBudget.LAYER)
    assert isinstance(s2ft, S2ftSettings)
    assert (s2ft.disjoint_from, s2ft.calibration_samples) == ((), 64)


def test_everything_that_is_said_is_read() -> None:
    spec = from_wire(
        method="TRAINING_METHOD_LORA",
        lora={
            "rank": 4, "alpha": 3, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 0.5}, "dropout": 0.25,
        },
        quantization="nf4", steps=70, batch_size=8, micro_batch_size=2, max_length=99,
        over_length="OVER_LENGTH_REFUSE", seed="-9007199254740993", checkpoint_steps=7,
        optimizer={
            "learning_rate": 1e-3, "schedule": "LEARNING_RATE_SCHEDULE_COSINE", "warmup_steps": 3, "weight_decay": 0.1,
            "beta1": 0.8, "beta2": 0.95, "max_gradient_norm": 0,
        },
        gate={"dataset": OTHER, "max_loss_ratio": 0.9, "min_exact_match": 0.5},
        publish={"adapter_name": "a", "aliases": ["b"], "labels": {"c": "d"}},
    )  # fmt: skip
    assert spec == TrainingSpec(
        TrainingMethod.LORA,
        LoraSettings(4, 3.0, True, ("q_proj",), {"q_proj": 2}, {"model.layers.0.self_attn.q_proj": 0.5}, 0.25),
        DATA, spec.digest, "nf4", 70, None, 8, 2, 99, OverLength.REFUSE, -9007199254740993, 7,
        OptimizerSettings(1e-3, Schedule.COSINE, 3, 0.1, 0.8, 0.95, 0.0),
        GateSettings(OTHER, 0.9, 0.5),
    )  # fmt: skip
    assert spec.datasets == (DATA, OTHER)


def test_s2ft_is_read_and_one_share_switches_the_defaults_off() -> None:
    settings = from_wire(
        method="TRAINING_METHOD_S2FT",
        s2ft={
            "down_share": 0.5, "score": "CHANNEL_SCORE_WEIGHT_ACTIVATION", "order": "CHANNEL_ORDER_LARGE",
            "budget": "CHANNEL_BUDGET_GLOBAL", "disjoint_from": ["a@1"], "calibration_samples": 5,
        },
        epochs=0.5,
    ).settings  # fmt: skip
    assert settings == S2ftSettings(
        0.0, 0.5, 0.0, 0.0,
        ChannelScore.WEIGHT_ACTIVATION, ChannelOrder.LARGE, ChannelBudget.GLOBAL, ("a@1",), 5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": None}, "method"),
        ({"method": "TRAINING_METHOD_MAGIC"}, "method"),
        ({"method": 7}, "method"),
        ({"s2ft": {}}, "s2ft"),
        ({"dataset": "data"}, "dataset"),
        ({"dataset": None}, "dataset"),
        ({"lora": []}, "lora"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": True}}, "lora.rank"),
        ({"lora": {"rank": 2.5}}, "lora.rank"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"alpha": math.inf}}, "lora.alpha"),
        ({"lora": {"use_rslora": 1}}, "lora.use_rslora"),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules"),
        ({"lora": {"target_modules": [""]}}, "lora.target_modules"),
        ({"lora": {"rank_pattern": {"q_proj": 0}}}, 'lora.rank_pattern["q_proj"]'),
        ({"lora": {"alpha_pattern": {"q_proj": "1"}}}, 'lora.alpha_pattern["q_proj"]'),
        ({"lora": {"alpha_pattern": {"": 1}}}, "lora.alpha_pattern"),
        ({"lora": {"dropout": 1}}, "lora.dropout"),
        ({"lora": {"bias": "all"}}, "lora.bias"),
        ({"quantization": "int8"}, "quantization"),
        ({"steps": 0}, "steps"),
        ({"steps": 3, "epochs": 1}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": math.nan}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "micro_batch_size": 5}, "micro_batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"over_length": "SPLIT"}, "over_length"),
        ({"seed": "9223372036854775808"}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"checkpoint_steps": 0}, "checkpoint_steps"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate"),
        ({"optimizer": {"schedule": "LEARNING_RATE_SCHEDULE_STEP"}}, "optimizer.schedule"),
        ({"steps": 5, "optimizer": {"warmup_steps": 5}}, "optimizer.warmup_steps"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay"),
        ({"optimizer": {"beta1": 1}}, "optimizer.beta1"),
        ({"optimizer": {"beta2": -0.1}}, "optimizer.beta2"),
        ({"optimizer": {"max_gradient_norm": -1}}, "optimizer.max_gradient_norm"),
        ({"optimizer": {"momentum": 1}}, "optimizer.momentum"),
        ({"gate": {"dataset": "other"}}, "gate.dataset"),
        ({"gate": {"max_loss_ratio": 0}}, "gate.max_loss_ratio"),
        ({"gate": {"min_exact_match": 1.5}}, "gate.min_exact_match"),
        ({"publish": "now"}, "publish"),
        ({"speed": "high"}, "speed"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    spec = {"method": "TRAINING_METHOD_LORA", "dataset": DATA, **fields}
    with pytest.raises(SettingsError) as refused:
        read_spec(spec)
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", field)
    assert refused.value.message.startswith(f"{field} ")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"o_share": 0}, "s2ft"),
        ({"o_share": 1.5}, "s2ft.o_share"),
        ({"score": "CHANNEL_SCORE_LUCK"}, "s2ft.score"),
        ({"calibration_samples": 0}, "s2ft.calibration_samples"),
        ({"disjoint_from": [1]}, "s2ft.disjoint_from"),
    ],
)
def test_s2ft_settings_that_cannot_be_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_spec({"method": "TRAINING_METHOD_S2FT", "dataset": DATA, "s2ft": settings})
    assert refused.value.field == field


@pytest.mark.parametrize("ratio", ["1/0", "1/00", "0/0", "1", "3/2", "-1/2", "half", "."])
def test_a_ratio_that_is_none_is_refused(ratio: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_spec({"method": "TRAINING_METHOD_LORAM", "dataset": DATA, "loram": {"ratio": ratio}})
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", "loram.ratio")


def test_what_a_stranger_wrote_is_quoted_in_part() -> None:
    with pytest.raises(SettingsError) as refused:
        read_spec({"method": "TRAINING_METHOD_LORA", "dataset": DATA, "over_length": "x" * 10_000})
    assert len(refused.value.message) < 400


def test_the_digest_does_not_depend_on_the_order_of_fields() -> None:
    one = {"method": "TRAINING_METHOD_LORA", "dataset": DATA, "steps": 5}
    assert read_spec(one).digest == read_spec(dict(reversed(one.items()))).digest
    assert read_spec(one).digest != read_spec({**one, "steps": 6}).digest


def test_seeds_for_different_purposes_differ() -> None:
    assert len({derived_seed(seed, purpose, 1) for seed in (-1, 0, 1) for purpose in ("a", "b")}) == 6
    assert all(0 <= derived_seed(seed, "a") < 1 << 63 for seed in range(100))


# --- The learning rate


def rates(num_steps: int, **settings: Any) -> list[float]:
    return [rate(OptimizerSettings(learning_rate=1.0, **settings), step, num_steps) for step in range(num_steps)]


def test_the_rate_rises_over_the_warmup_and_then_follows_its_schedule() -> None:
    assert rates(6, warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])
    assert rates(4, warmup_steps=0, schedule=Schedule.CONSTANT) == [1.0] * 4
    cosine = rates(5, warmup_steps=1, schedule=Schedule.COSINE)
    assert cosine == pytest.approx([1 / 2, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2])


def test_the_warmup_is_a_tenth_of_the_steps_and_a_hundred_at_most() -> None:
    assert [warmup_steps(OptimizerSettings(), steps) for steps in (1, 25, 999, 5000)] == [0, 2, 99, 100]


def test_a_warmup_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(SettingsError) as refused:
        warmup_steps(OptimizerSettings(warmup_steps=10), 10)
    assert refused.value.field == "optimizer.warmup_steps"


@pytest.mark.parametrize(
    ("loram", "field"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": False}, "ratio"),
        ({"ratio": 0.5}, "ratio"),
        ({"layers": []}, "layers"),
        ({"layers": 0}, "layers"),
        ({"pruning": "LORAM_PRUNING_SEMI_STRUCTURED", "pattern": 0}, "pattern"),
        ({"same_cut_as": []}, "same_cut_as"),
        ({"ratio": "0", "layers": "zebra"}, "layers"),
        ({"ratio": "0", "layers": "0:1"}, "layers"),
        ({"ratio": "0", "pruning": "LORAM_PRUNING_RANDOM"}, "pruning"),
        ({"ratio": "0", "calibration_samples": 1}, "calibration_samples"),
        ({"ratio": "0", "alignment": {"dataset": OTHER}}, "alignment"),
    ],
    ids=str,
)
def test_what_is_said_of_loram_is_a_text_and_has_its_use(loram: dict[str, object], field: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_spec({"method": "TRAINING_METHOD_LORAM", "dataset": DATA, "loram": loram})
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", f"loram.{field}")
