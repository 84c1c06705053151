"""What a job is asked to do becomes its message and comes back; what is left open stays open, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from typing import Any, cast

import pytest
from motley.v1 import training_pb2
from motley_client import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    Gate,
    GoatScale,
    GoatScaleRank,
    GoatSegments,
    GoatSettings,
    InvalidArgumentError,
    LearningRateSchedule,
    LoqtDecomposition,
    LoqtOptimizer,
    LoqtSchedule,
    LoqtSettings,
    LoqtStart,
    LoramAlignment,
    LoramPruning,
    LoramSettings,
    LoraSettings,
    OptimizerSettings,
    OverLength,
    PublishSettings,
    S2ftSettings,
    TrainingMethod,
    TrainingSpec,
)
from motley_client.convert_training_spec import spec, spec_json, spec_message, spec_of_json
from training_words import DIGEST, SPEC
from training_words import spec_message as told

LORA = LoraSettings(
    rank=4,
    alpha=8.5,
    use_rslora=True,
    target_modules=("q_proj", "v_proj"),
    rank_pattern={"k_proj": 2},
    alpha_pattern={"k_proj": 1.5},
    dropout=0.0,
)
S2FT = S2ftSettings(
    o_share=0.1,
    down_share=0.0,
    v_share=0.2,
    up_share=0.3,
    score=ChannelScore.WEIGHT_ACTIVATION,
    order=ChannelOrder.LARGE,
    budget=ChannelBudget.GLOBAL,
    disjoint_from=("legal", "poems@2"),
    calibration_samples=7,
)
GOAT = GoatSettings(
    rank=16,
    experts=4,
    top_k=1,
    rho=3.5,
    segments=GoatSegments.MINOR,
    scale=GoatScale.THEORETICAL,
    eta=0.1,
    rank_for_scale=GoatScaleRank.TOTAL,
    alpha=2.0,
    balance_loss=0.0,
    dropout=0.0,
    target_modules=("q_proj",),
)
LOQT = LoqtSettings(
    start=LoqtStart.SCRATCH,
    rank=16,
    scale=0.25,
    compensation_steps=0,
    schedule=LoqtSchedule.LINEAR,
    merge_interval=9,
    growth=0.0,
    decomposition=LoqtDecomposition.EIGH,
    optimizer=LoqtOptimizer.ADAMW_8BIT,
    keep_moments=True,
)
LORAM = LoramSettings(
    lora=LORA,
    pruning=LoramPruning.SEMI_STRUCTURED,
    ratio="0.65",
    layers="4:6",
    pattern="4:8",
    same_cut_as="legal@2",
    calibration_samples=7,
    alignment=LoramAlignment(DIGEST, 9, 1e-5, 2, LoqtSettings(rank=3, schedule=LoqtSchedule.NEVER)),
)
WHOLE = TrainingSpec(
    dataset=DIGEST,
    settings=LORA,
    publish=PublishSettings("legal", ("prod",), {"team": "search"}, keep_aliases=True),
    quantization="nf4",
    epochs=0.5,
    batch_size=8,
    micro_batch_size=2,
    max_length=64,
    over_length=OverLength.REFUSE,
    seed=-3,
    checkpoint_steps=5,
    optimizer=OptimizerSettings(1e-4, LearningRateSchedule.COSINE, 0, 0.1, 0.8, 0.9, 0.0),
    gate=Gate("sha256:held", 0.9, 0.0),
)
OPEN = TrainingSpec(dataset=DIGEST, settings=S2ftSettings(), publish=PublishSettings("legal"))
GOAT_OPEN = dataclasses.replace(OPEN, settings=GoatSettings())
LORAM_OPEN = dataclasses.replace(OPEN, settings=LoramSettings())
LOQT_OPEN = dataclasses.replace(OPEN, settings=LoqtSettings(), publish=None)


@pytest.mark.parametrize(
    "asked",
    [
        SPEC,
        WHOLE,
        OPEN,
        dataclasses.replace(WHOLE, settings=S2FT, epochs=None, steps=9),
        dataclasses.replace(OPEN, optimizer=OptimizerSettings(), gate=Gate()),
        GOAT_OPEN,
        LORAM_OPEN,
        dataclasses.replace(WHOLE, settings=GOAT),
        dataclasses.replace(WHOLE, settings=LORAM),
        LOQT_OPEN,
        dataclasses.replace(WHOLE, settings=LOQT, publish=None),
        dataclasses.replace(WHOLE, settings=LOQT),
        dataclasses.replace(OPEN, settings=LoramSettings(lora=LoraSettings(), alignment=LoramAlignment(""))),
    ],
)
def test_a_spec_comes_back_as_it_was_asked_for(asked: TrainingSpec) -> None:
    assert spec(training_pb2.TrainingSpec.FromString(spec_message(asked).SerializeToString())) == asked
    assert spec_of_json(json.dumps(spec_json(asked))) == asked
    assert isinstance(hash(asked), int)


def test_a_spec_says_what_it_was_given_and_nothing_else() -> None:
    assert spec_message(SPEC) == told()
    assert {field.name for field, _ in spec_message(OPEN).ListFields()} == {"method", "dataset", "s2ft", "publish"}
    assert spec_message(OPEN).s2ft.ListFields() == []


def test_only_what_makes_a_base_may_publish_nothing() -> None:
    assert not spec_message(LOQT_OPEN).HasField("publish")
    with pytest.raises(InvalidArgumentError) as caught:
        spec_message(dataclasses.replace(SPEC, publish=None))
    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", "spec.publish")


def test_a_zero_is_said_and_not_left_open() -> None:
    message = spec_message(dataclasses.replace(WHOLE, settings=S2FT))

    assert message.s2ft.HasField("down_share")
    assert message.gate.HasField("min_exact_match")
    assert message.optimizer.HasField("warmup_steps")
    assert message.optimizer.HasField("max_gradient_norm")
    assert not spec_message(OPEN).HasField("gate")


def test_the_settings_say_the_method() -> None:
    asked = (SPEC, OPEN, GOAT_OPEN, LORAM_OPEN, LOQT_OPEN)
    assert [one.method for one in asked] == list(TrainingMethod)
    assert {spec_message(one).method for one in asked} == set(training_pb2.TrainingMethod.values()) - {0}
    for one in asked:
        assert one.method is not None
        assert spec_message(one).WhichOneof("method_settings") == one.method.value


def test_a_message_inside_of_settings_is_there_if_it_was_given_and_else_not() -> None:
    assert spec_message(LORAM_OPEN).loram.ListFields() == []
    given = dataclasses.replace(OPEN, settings=LoramSettings(lora=LoraSettings(), alignment=LoramAlignment(DIGEST)))
    message = spec_message(given).loram
    assert (message.HasField("lora"), message.lora.ListFields()) == (True, [])
    assert message.alignment == training_pb2.LoramAlignment(dataset=DIGEST)
    whole = spec_message(dataclasses.replace(OPEN, settings=LORAM)).loram
    assert whole.lora == spec_message(dataclasses.replace(OPEN, settings=LORA)).lora
    assert (whole.ratio, whole.same_cut_as, whole.alignment.steps) == ("0.65", "legal@2", 9)


@pytest.mark.parametrize(
    ("part", "field", "enum", "members"),
    [
        ("s2ft", "score", training_pb2.ChannelScore, ChannelScore),
        ("s2ft", "order", training_pb2.ChannelOrder, ChannelOrder),
        ("s2ft", "budget", training_pb2.ChannelBudget, ChannelBudget),
        ("goat", "segments", training_pb2.GoatSegments, GoatSegments),
        ("goat", "scale", training_pb2.GoatScale, GoatScale),
        ("goat", "rank_for_scale", training_pb2.GoatScaleRank, GoatScaleRank),
        ("loram", "pruning", training_pb2.LoramPruning, LoramPruning),
        ("loqt", "start", training_pb2.LoqtStart, LoqtStart),
        ("loqt", "schedule", training_pb2.LoqtSchedule, LoqtSchedule),
        ("loqt", "decomposition", training_pb2.LoqtDecomposition, LoqtDecomposition),
        ("loqt", "optimizer", training_pb2.LoqtOptimizer, LoqtOptimizer),
        ("optimizer", "schedule", training_pb2.LearningRateSchedule, LearningRateSchedule),
        (None, "over_length", training_pb2.OverLength, OverLength),
    ],
)
def test_every_enum_travels(part: str | None, field: str, enum: Any, members: Any) -> None:
    def asked(value: Any) -> TrainingSpec:
        kinds: dict[str, Any] = {
            "s2ft": S2ftSettings,
            "goat": GoatSettings,
            "loram": LoramSettings,
            "loqt": LoqtSettings,
        }
        if part is None:
            return dataclasses.replace(OPEN, over_length=value)
        if part == "optimizer":
            return dataclasses.replace(OPEN, optimizer=OptimizerSettings(schedule=value))
        return dataclasses.replace(OPEN, settings=kinds[part](**{field: value}))

    sent = {member: spec_message(asked(member)) for member in members}
    numbers = {member: getattr(getattr(message, part) if part else message, field) for member, message in sent.items()}
    assert set(numbers.values()) == set(enum.values()) - {0}
    assert {member: spec(message) for member, message in sent.items()} == {member: asked(member) for member in members}
    strange = sent[next(iter(members))]
    setattr(getattr(strange, part) if part else strange, field, 99)
    assert spec(strange) == asked(None)


def test_a_method_that_the_client_does_not_know_has_no_settings() -> None:
    message = told()
    message.ClearField("lora")
    assert spec(message).settings == LoraSettings(), "all of them left open"
    message.method = cast(Any, 99)
    read = spec(message)
    assert (read.settings, read.method) == (None, None)
    assert spec_json(read).keys() == {"dataset", "steps", "publish"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"settings": None}, "spec.method"),
        ({"settings": "lora"}, "spec.method"),
        ({"steps": 1, "epochs": 1.0}, "spec.epochs"),
        ({"gate": 5}, "spec.gate"),
        ({"gate": OptimizerSettings()}, "spec.gate"),
        ({"publish": "legal"}, "spec.publish"),
        ({"dataset": "\ud800"}, "spec.dataset"),
        ({"steps": 2**31}, "spec.steps"),
        ({"seed": 2**63}, "spec.seed"),
        ({"over_length": "cut"}, "spec.over_length"),
        ({"batch_size": 1.5}, "spec.batch_size"),
        ({"settings": LoraSettings(rank=cast(int, "8"))}, "spec.lora.rank"),
        ({"settings": LoraSettings(target_modules=cast(Any, "q_proj"))}, "spec.lora.target_modules"),
        ({"settings": LoraSettings(rank_pattern={"a": cast(int, "b")})}, "spec.lora.rank_pattern"),
        ({"settings": S2ftSettings(score=cast(ChannelScore, "best"))}, "spec.s2ft.score"),
        ({"settings": S2ftSettings(disjoint_from=("\ud800",))}, "spec.s2ft.disjoint_from"),
        ({"settings": GoatSettings(experts=2**31)}, "spec.goat.experts"),
        ({"settings": GoatSettings(segments=cast(Any, "tail"))}, "spec.goat.segments"),
        ({"settings": GoatSettings(target_modules=cast(Any, "q_proj"))}, "spec.goat.target_modules"),
        ({"settings": LoramSettings(ratio=cast(Any, 0.5))}, "spec.loram.ratio"),
        ({"settings": LoramSettings(pruning=cast(Any, "most"))}, "spec.loram.pruning"),
        ({"settings": LoramSettings(lora=cast(Any, GoatSettings()))}, "spec.loram.lora"),
        ({"settings": LoramSettings(lora=LoraSettings(rank=2**31))}, "spec.loram.lora.rank"),
        ({"settings": LoramSettings(alignment=cast(Any, DIGEST))}, "spec.loram.alignment"),
        (
            {"settings": LoramSettings(alignment=LoramAlignment(DIGEST, steps=cast(int, 0.5)))},
            "spec.loram.alignment.steps",
        ),
        ({"optimizer": OptimizerSettings(learning_rate=cast(float, "x"))}, "spec.optimizer.learning_rate"),
        ({"publish": PublishSettings("a", labels={"a": cast(str, 5)})}, "spec.publish.labels"),
        ({"publish": PublishSettings("a", aliases=cast(Any, "prod"))}, "spec.publish.aliases"),
    ],
)
def test_what_cannot_be_asked_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        spec_message(dataclasses.replace(SPEC, **change))

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "spec"),
        ("[", "spec"),
        ("[1]", "spec"),
        ('{"lora": {}, "rate": 1}', "spec"),
        ('{"lora": {"rank": "many"}}', "spec"),
        ('{"s2ft": {"score": "BEST"}}', "spec"),
        ('{"lora": {}, "s2ft": {}}', "spec"),
        ('{"lora": {}, "steps": 1, "epochs": 1}', "spec"),
        ('{"lora": {}, "seed": 1, "seed": 2}', "spec"),
        ("{}", "spec.method"),
        ('{"method": "TRAINING_METHOD_S2FT", "lora": {}}', "spec.method"),
        ('{"method": "TRAINING_METHOD_LORA", "loram": {}}', "spec.method"),
        ('{"goat": {}, "loram": {}}', "spec"),
        ('{"goat": {"alignment": {}}}', "spec"),
    ],
)
def test_json_that_is_no_spec_is_refused(text: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        spec_of_json(text)

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


def test_types_show_every_field_of_their_messages() -> None:
    pairs = (
        (LoraSettings, training_pb2.LoraSettings),
        (S2ftSettings, training_pb2.S2ftSettings),
        (GoatSettings, training_pb2.GoatSettings),
        (LoramSettings, training_pb2.LoramSettings),
        (LoramAlignment, training_pb2.LoramAlignment),
        (OptimizerSettings, training_pb2.OptimizerSettings),
        (Gate, training_pb2.Gate),
        (PublishSettings, training_pb2.PublishSettings),
    )
    for kind, message in pairs:
        assert {field.name for field in dataclasses.fields(kind)} == {field.name for field in message.DESCRIPTOR.fields}
    names = {field.name for field in dataclasses.fields(TrainingSpec)} - {"settings"}
    names |= {"method", *(method.value for method in TrainingMethod)}
    assert names == {field.name for field in training_pb2.TrainingSpec.DESCRIPTOR.fields}


def test_a_ratio_is_a_fraction_or_a_text() -> None:
    def message(ratio: Any) -> training_pb2.TrainingSpec:
        publish = PublishSettings(adapter_name="mine")
        return spec_message(TrainingSpec(dataset="", settings=LoramSettings(ratio=ratio), publish=publish))

    assert [message(ratio).loram.ratio for ratio in ("0.65", Fraction("0.65"), "")] == ["0.65", "13/20", ""]
    for ratio in (0.5, 0, True):
        with pytest.raises(
            InvalidArgumentError, match=re.escape(f"{ratio!r} is no text; a ratio is written")
        ) as caught:
            message(ratio)
        assert caught.value.field == "spec.loram.ratio"
