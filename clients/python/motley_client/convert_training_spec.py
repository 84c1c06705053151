"""What a training job is asked to do: TrainingSpec to protobuf and to its JSON, and back.

Owns both directions of that one message; the requests that carry it are made in `convert_training`. Knows nothing of
channels. Pure functions. A value that protobuf cannot hold is an InvalidArgumentError naming the field, raised before
anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from motley.v1 import training_pb2

from motley_client.convert_adapters import strings
from motley_client.convert_fields import checked
from motley_client.errors import InvalidArgumentError
from motley_client.types_training_spec import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    Gate,
    LearningRateSchedule,
    LoraSettings,
    OptimizerSettings,
    OverLength,
    PublishSettings,
    S2ftSettings,
    TrainingMethod,
    TrainingSpec,
)

METHODS = {
    training_pb2.TRAINING_METHOD_LORA: TrainingMethod.LORA,
    training_pb2.TRAINING_METHOD_S2FT: TrainingMethod.S2FT,
}
_METHOD_NUMBERS = {method: number for number, method in METHODS.items()}
_ENUMS: dict[str, Mapping[int, Enum]] = {  # by the field that has them
    "score": {
        training_pb2.CHANNEL_SCORE_RANDOM: ChannelScore.RANDOM,
        training_pb2.CHANNEL_SCORE_WEIGHT: ChannelScore.WEIGHT,
        training_pb2.CHANNEL_SCORE_ACTIVATION: ChannelScore.ACTIVATION,
        training_pb2.CHANNEL_SCORE_WEIGHT_ACTIVATION: ChannelScore.WEIGHT_ACTIVATION,
        training_pb2.CHANNEL_SCORE_GRADIENT: ChannelScore.GRADIENT,
    },
    "order": {
        training_pb2.CHANNEL_ORDER_SMALL: ChannelOrder.SMALL,
        training_pb2.CHANNEL_ORDER_LARGE: ChannelOrder.LARGE,
    },
    "budget": {
        training_pb2.CHANNEL_BUDGET_LAYER: ChannelBudget.LAYER,
        training_pb2.CHANNEL_BUDGET_GLOBAL: ChannelBudget.GLOBAL,
    },
    "schedule": {
        training_pb2.LEARNING_RATE_SCHEDULE_LINEAR: LearningRateSchedule.LINEAR,
        training_pb2.LEARNING_RATE_SCHEDULE_COSINE: LearningRateSchedule.COSINE,
        training_pb2.LEARNING_RATE_SCHEDULE_CONSTANT: LearningRateSchedule.CONSTANT,
    },
    "over_length": {
        training_pb2.OVER_LENGTH_TRUNCATE: OverLength.TRUNCATE,
        training_pb2.OVER_LENGTH_REFUSE: OverLength.REFUSE,
    },
}
_SCALARS = (
    *("dataset", "quantization", "steps", "epochs", "batch_size", "micro_batch_size", "max_length"),
    *("over_length", "seed", "checkpoint_steps"),
)
_PARTS = {"optimizer": OptimizerSettings, "gate": Gate, "publish": PublishSettings}


def spec_message(spec: TrainingSpec) -> training_pb2.TrainingSpec:
    """Make the message of a spec; what is None is left to the server.

    Raises: InvalidArgumentError for a spec without settings, or with both steps and epochs: the message has room for
    one of them, and would forget the other.
    """
    if spec.method is None:
        raise _refusal("LoraSettings or S2ftSettings say the method, and one of them is needed", "spec.method")
    if spec.steps is not None and spec.epochs is not None:
        raise _refusal("a job lasts so many steps or so many epochs, not both", "spec.epochs")
    return _message(spec)


def spec(message: training_pb2.TrainingSpec) -> TrainingSpec:
    """Read a spec."""
    scalars = {name: _value(message, name) for name in _SCALARS}
    return TrainingSpec(
        **scalars | {"quantization": message.quantization or None},
        settings=_settings(message),
        publish=PublishSettings(**_values(message.publish)),
        optimizer=OptimizerSettings(**_values(message.optimizer)) if message.HasField("optimizer") else None,
        gate=Gate(**_values(message.gate)) if message.HasField("gate") else None,
    )


def spec_of_json(text: str | bytes) -> TrainingSpec:
    """Read a spec from the JSON of its message; a field that the message does not have is refused.

    Raises: InvalidArgumentError.
    """
    try:
        message = json_format.Parse(text, training_pb2.TrainingSpec())
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise _refusal(f"no JSON of a TrainingSpec: {error}", "spec") from error
    found = spec(message)
    if found.settings is None:
        raise _refusal("name a method", "spec.method")
    if message.method and METHODS.get(message.method) is not found.method:
        raise _refusal("the method and the settings are of two methods", "spec.method")
    return found


def spec_json(spec: TrainingSpec) -> dict[str, Any]:
    """Return the JSON of a spec's message, with names as the proto spells them."""
    return json_format.MessageToDict(_message(spec), preserving_proto_field_name=True)


def _message(spec: TrainingSpec) -> training_pb2.TrainingSpec:
    message = training_pb2.TrainingSpec()
    parts = {name: getattr(spec, name) for name in _PARTS}
    if spec.method is not None:
        message.method = _METHOD_NUMBERS[spec.method]
        parts[spec.method.value] = spec.settings
    _fill(message, "spec", {name: getattr(spec, name) for name in _SCALARS})
    for name, part in parts.items():
        if part is None:
            continue
        if not isinstance(part, _PARTS.get(name, type(part))):
            raise _refusal(f"{part!r} is no {_PARTS[name].__name__}", f"spec.{name}")
        inner = getattr(message, name)
        inner.SetInParent()  # all unset is not the same as not there
        _fill(inner, f"spec.{name}", {field.name: getattr(part, field.name) for field in fields(part)})
    return message


def _settings(message: training_pb2.TrainingSpec) -> LoraSettings | S2ftSettings | None:
    kind = message.WhichOneof("method_settings") or getattr(METHODS.get(message.method), "value", None)
    if kind == TrainingMethod.LORA.value:
        return LoraSettings(**_values(message.lora))
    if kind == TrainingMethod.S2FT.value:
        return S2ftSettings(**_values(message.s2ft))
    return None


def _fill(message: Message, path: str, values: Mapping[str, Any]) -> None:
    """Put values into a message's fields of the same names, each checked under its path."""
    for name, value in values.items():
        field = f"{path}.{name}"
        if value is None:
            continue
        if name in _ENUMS:
            message.MergeFrom(checked(field, _of_enum, kind=type(message), name=name, value=value))
        elif isinstance(getattr(message, name), str | int | float | Mapping):
            message.MergeFrom(checked(field, type(message), **{name: value}))
        else:
            getattr(message, name).extend(strings(field, value))


def _of_enum(kind: type[Message], name: str, value: object) -> Message:
    for number, member in _ENUMS[name].items():
        if value in (member, member.value):
            return kind(**{name: number})
    raise ValueError(f"{value!r} is none of {', '.join(str(member.value) for member in _ENUMS[name].values())}")


def _values(message: Message) -> dict[str, Any]:
    return {field.name: _value(message, field.name) for field in message.DESCRIPTOR.fields}


def _value(message: Message, name: str) -> Any:
    """Read a field as its dataclass has it: what is not set is None, where the message can tell."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not message.HasField(name):
        return None
    found = getattr(message, name)
    if name in _ENUMS:
        return _ENUMS[name].get(found)
    if isinstance(found, bool | int | float | str):
        return found
    return dict(found) if isinstance(found, Mapping) else tuple(found)


def _refusal(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {message}", reason="INVALID_VALUE", field=field)
