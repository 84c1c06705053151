"""What a training job is asked to do: TrainingSpec to protobuf and to its JSON, and back.

Owns both directions of that one message; the requests that carry it are made in `convert_training`. Knows nothing of
channels. Pure functions. A value that protobuf cannot hold is an InvalidArgumentError naming the field, raised before
anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from fractions import Fraction
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from motley.v1 import training_pb2

from motley_client.convert_adapters import strings
from motley_client.convert_fields import checked
from motley_client.errors import InvalidArgumentError
from motley_client.types_training_methods import (
    METHODS_OF_SETTINGS,
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    GoatScale,
    GoatScaleRank,
    GoatSegments,
    LoqtDecomposition,
    LoqtOptimizer,
    LoqtSchedule,
    LoqtSettings,
    LoqtStart,
    LoramAlignment,
    LoramPruning,
    LoraSettings,
    MethodSettings,
    TrainingMethod,
)
from motley_client.types_training_spec import (
    Gate,
    LearningRateSchedule,
    OptimizerSettings,
    OverLength,
    PublishSettings,
    TrainingSpec,
)

METHODS = {
    training_pb2.TRAINING_METHOD_LORA: TrainingMethod.LORA,
    training_pb2.TRAINING_METHOD_S2FT: TrainingMethod.S2FT,
    training_pb2.TRAINING_METHOD_GOAT: TrainingMethod.GOAT,
    training_pb2.TRAINING_METHOD_LORAM: TrainingMethod.LORAM,
    training_pb2.TRAINING_METHOD_LOQT: TrainingMethod.LOQT,
}
_METHOD_NUMBERS = {method: number for number, method in METHODS.items()}
_KINDS: tuple[type[Enum], ...] = (
    *(ChannelScore, ChannelOrder, ChannelBudget, GoatSegments, GoatScale, GoatScaleRank, LoramPruning),
    *(LoqtStart, LoqtSchedule, LoqtDecomposition, LoqtOptimizer, LearningRateSchedule, OverLength),
)


def _members(kind: type[Enum]) -> Mapping[int, Enum]:
    """Return the members of an enum by the numbers that the proto's enum of that name has for theirs."""
    enum = training_pb2.DESCRIPTOR.enum_types_by_name[kind.__name__]
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {enum.values_by_name[prefix + member.name].number: member for member in kind}


_ENUMS = {kind.__name__: _members(kind) for kind in _KINDS}  # as the proto calls them
_SCALARS = (
    *("dataset", "quantization", "steps", "epochs", "batch_size", "micro_batch_size", "max_length"),
    *("over_length", "seed", "checkpoint_steps"),
)
_PARTS = {"optimizer": OptimizerSettings, "gate": Gate, "publish": PublishSettings}
# Messages inside of a method's settings, as the proto calls them.
_INNER = {kind.__name__: kind for kind in (LoraSettings, LoramAlignment, LoqtSettings)}
_SETTINGS = {method.value: kind for kind, method in METHODS_OF_SETTINGS.items()}


def spec_message(spec: TrainingSpec) -> training_pb2.TrainingSpec:
    """Make the message of a spec; what is None is left to the server.

    Raises: InvalidArgumentError for a spec without settings, or with both steps and epochs: the message has room for
    one of them, and would forget the other; for one that does not say what to publish, though its method does.
    """
    if spec.method is None:
        names = " or ".join(kind.__name__ for kind in _SETTINGS.values())
        raise _refusal(f"{names} say the method, and one of them is needed", "spec.method")
    if spec.steps is not None and spec.epochs is not None:
        raise _refusal("a job lasts so many steps or so many epochs, not both", "spec.epochs")
    if spec.publish is None and spec.method is not TrainingMethod.LOQT:
        raise _refusal("name the adapter that gets a new version", "spec.publish")
    return _message(spec)


def spec(message: training_pb2.TrainingSpec) -> TrainingSpec:
    """Read a spec."""
    scalars = {name: _value(message, name) for name in _SCALARS}
    return TrainingSpec(
        **scalars | {"quantization": message.quantization or None},
        settings=_settings(message),
        publish=PublishSettings(**_values(message.publish)) if message.HasField("publish") else None,
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
        if part is not None:
            _fill_part(getattr(message, name), f"spec.{name}", part, _PARTS.get(name, type(part)))
    return message


def _settings(message: training_pb2.TrainingSpec) -> MethodSettings | None:
    name = message.WhichOneof("method_settings") or getattr(METHODS.get(message.method), "value", None)
    return _SETTINGS[name](**_values(getattr(message, name))) if name in _SETTINGS else None


def _fill_part(message: Message, path: str, part: Any, kind: type[Any]) -> None:
    """Put a part into the message of the same fields."""
    if not isinstance(part, kind):
        raise _refusal(f"{part!r} is no {kind.__name__}", path)
    message.SetInParent()  # all unset is not the same as not there
    _fill(message, path, {field.name: getattr(part, field.name) for field in fields(part)})


def _fill(message: Message, path: str, values: Mapping[str, Any]) -> None:
    """Put values into a message's fields of the same names, each checked under its path."""
    for name, value in values.items():
        field = f"{path}.{name}"
        if value is None:
            continue
        if (enum := _enum_of(message, name)) is not None:
            message.MergeFrom(checked(field, _of_enum, kind=type(message), name=name, enum=enum, value=value))
        elif (inner := _inner_of(message, name)) is not None:
            _fill_part(getattr(message, name), field, value, inner)
        elif isinstance(getattr(message, name), str):
            message.MergeFrom(checked(field, type(message), **{name: _text(field, value)}))
        elif isinstance(getattr(message, name), int | float | Mapping):
            message.MergeFrom(checked(field, type(message), **{name: value}))
        else:
            getattr(message, name).extend(strings(field, value))


def _text(field: str, value: object) -> str:
    """Return a text as it is, and a fraction as it is written."""
    if not isinstance(value, str | Fraction):
        hint = "; a ratio is written as '1/2' or '0.65', or given as a Fraction" if field.endswith(".ratio") else ""
        raise _refusal(f"{value!r} is no text{hint}", field)
    return str(value)


def _of_enum(kind: type[Message], name: str, enum: Mapping[int, Enum], value: object) -> Message:
    for number, member in enum.items():
        if value in (member, member.value):
            return kind(**{name: number})
    raise ValueError(f"{value!r} is none of {', '.join(str(member.value) for member in enum.values())}")


def _enum_of(message: Message, name: str) -> Mapping[int, Enum] | None:
    """Return the members, by number, of the enum that a field is of; None for any other field."""
    enum = message.DESCRIPTOR.fields_by_name[name].enum_type
    return None if enum is None else _ENUMS[enum.name]


def _inner_of(message: Message, name: str) -> type[Any] | None:
    """Return what a field that is a message inside of settings is read as; None for any other field."""
    inner = message.DESCRIPTOR.fields_by_name[name].message_type
    return None if inner is None else _INNER.get(inner.name)


def _values(message: Message) -> dict[str, Any]:
    return {field.name: _value(message, field.name) for field in message.DESCRIPTOR.fields}


def _value(message: Message, name: str) -> Any:
    """Read a field as its dataclass has it: what is not set is None, where the message can tell."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not message.HasField(name):
        return None
    found = getattr(message, name)
    if (enum := _enum_of(message, name)) is not None:
        return enum.get(found)
    if (inner := _inner_of(message, name)) is not None:
        return inner(**_values(found))
    if isinstance(found, bool | int | float | str):
        return found
    return dict(found) if isinstance(found, Mapping) else tuple(found)


def _refusal(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {message}", reason="INVALID_VALUE", field=field)
