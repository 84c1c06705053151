"""PEFT's LoRA config: every field is read, harmless or refused by name.

A field that changes the served function and is silently dropped is a wrong model, so a field that is not in the table
is refused too: a new PEFT has to be looked at, not guessed at. It knows the config alone: no tensors, no base. Pure
functions; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import show

T = TypeVar("T")

MAX_RANK = 1 << 16
MAX_NAMES = 4096
MAX_ALPHA = 1e30  # far beyond any use, and still far from where float32 ends

SUPPORTED_FIELDS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
)

HARMLESS_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "task_type": "a label",
        "auto_mapping": "how PEFT finds a model class",
        "peft_version": "a label",
        "base_model_name_or_path": "a name, and names are not identities",
        "revision": "a name",
        "inference_mode": "whether PEFT freezes the weights",
        "lora_dropout": "off outside training",
        "megatron_config": "how Megatron's own layers are split; a Linear has none",
        "megatron_core": "a module name",
        "loftq_config": "read with init_lora_weights=loftq only, which is refused",
        "eva_config": "how factors were initialized",
        "corda_config": "read with init_lora_weights=corda only, which is refused",
        "lora_ga_config": "read with init_lora_weights=lora_ga only, which is refused",
        "qalora_group_size": "read with use_qalora only, which is refused",
        "runtime_config": "where PEFT computes",
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and the values with which it does nothing."""

    inactive: tuple[object, ...]
    why: str


REFUSED_FIELDS: Mapping[str, Refusal] = MappingProxyType(
    {
        "use_dora": Refusal((False,), "DoRA rescales the base's weight"),
        "bias": Refusal(("none",), "trained biases are not low-rank"),
        "lora_bias": Refusal((False,), "a bias on B is not low-rank"),
        "fan_in_fan_out": Refusal((False,), "it is for layers that are no Linear"),
        "modules_to_save": Refusal((None, []), "whole modules cannot be exchanged per request"),
        "trainable_token_indices": Refusal((None, [], {}), "trained embedding rows are not low-rank"),
        "layer_replication": Refusal((None, []), "it builds another model"),
        "target_parameters": Refusal((None, []), "parameters outside a Linear take no adapter"),
        "alora_invocation_tokens": Refusal((None,), "an adapter is on for all tokens or none"),
        "use_qalora": Refusal((False,), "QALoRA pools the inputs of A"),
        "velora_config": Refusal((None,), "VeLoRA keeps state of its own"),
        "monteclora_config": Refusal((None,), "MonteCLoRA samples the factors"),
        "use_bdlora": Refusal((None,), "block-diagonal factors are stored differently"),
        "arrow_config": Refusal((None,), "Arrow routes between adapters"),
        "kasa_config": Refusal((None,), "KaSA truncates the base's weight"),
        "ensure_weight_tying": Refusal((False,), "factors shared by embedding and lm_head are not served"),
    }
)

# These leave the base's weight as it is. The others write a remainder into it, and their factors alone are half of
# the model.
_PURE_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """What of the config decides the served function.

    Semantics: `target_modules` and `exclude_modules` are an expression for the whole path (str) or names matched as
    suffixes (tuple).
    """

    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    def scaling(self, alpha: float, rank: int) -> float:
        """Return the factor on B A for a module of this alpha and rank."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_lora_config(fields: Mapping[str, object]) -> PeftLoraConfig:
    """Turn the fields of adapter_config.json into facts.

    Raises: AdapterFormatError with reason UNKNOWN_FIELD, UNSUPPORTED_FIELD, MISSING_FIELD or INVALID_FIELD, the
    field as `adapter_config.NAME`.
    """
    _check_known(fields)
    _check_refused(fields)
    _check_initialization(fields.get("init_lora_weights", True))
    config = PeftLoraConfig(
        rank=_required(fields, "r", _rank),
        lora_alpha=_required(fields, "lora_alpha", _number),
        use_rslora=_read("use_rslora", fields.get("use_rslora", False), _flag),
        rank_pattern=_pattern(fields, "rank_pattern", _rank),
        alpha_pattern=_pattern(fields, "alpha_pattern", _number),
        target_modules=_required(fields, "target_modules", _names),
        exclude_modules=_read("exclude_modules", fields.get("exclude_modules") or [], _names),
        layers_to_transform=_read("layers_to_transform", fields.get("layers_to_transform"), _indices),
        layers_pattern=_read("layers_pattern", fields.get("layers_pattern") or [], _name_list),
    )
    _check_consistent(config)
    return config


def _check_known(fields: Mapping[str, object]) -> None:
    known = SUPPORTED_FIELDS | HARMLESS_FIELDS.keys() | REFUSED_FIELDS.keys()
    for name in fields:
        if name not in known:
            raise _error("UNKNOWN_FIELD", name, "is not a field that is known here, so what it changes is not either")
    if fields.get("peft_type") != "LORA":
        raise _error("UNSUPPORTED_FIELD", "peft_type", f"is {show(fields.get('peft_type'))}; only LORA is read")


def _check_refused(fields: Mapping[str, object]) -> None:
    for name, refusal in REFUSED_FIELDS.items():
        if name in fields and not any(_same(fields[name], value) for value in refusal.inactive):
            raise _error("UNSUPPORTED_FIELD", name, f"is {show(fields[name])}: {refusal.why}")


def _same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


def _check_initialization(value: object) -> None:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PURE_INITIALIZATIONS):
        return
    hint = "save it with path_initial_model_for_weight_conversion to make it a plain LoRA"
    problem = f"is {show(value)}, which trains against a changed base weight; {hint}"
    raise _error("UNSUPPORTED_FIELD", "init_lora_weights", problem)


def _check_consistent(config: PeftLoraConfig) -> None:
    if not config.target_modules:
        raise _error("INVALID_FIELD", "target_modules", "names no module")
    if isinstance(config.target_modules, str) and config.layers_to_transform:
        raise _error("INVALID_FIELD", "layers_to_transform", "cannot go with target_modules as an expression")
    if config.layers_pattern and not config.layers_to_transform:
        raise _error("INVALID_FIELD", "layers_pattern", "means nothing without layers_to_transform")


def _required(fields: Mapping[str, object], name: str, read: Callable[[object], T]) -> T:
    if fields.get(name) is None:
        raise _error("MISSING_FIELD", name, "is missing; PEFT writes it")
    return _read(name, fields[name], read)


def _read(name: str, value: object, read: Callable[[object], T]) -> T:
    try:
        return read(value)
    except _InvalidError as error:
        raise _error("INVALID_FIELD", name, f"is {show(value)}, not {error}") from None


def _pattern(fields: Mapping[str, object], name: str, read: Callable[[object], T]) -> dict[str, T]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise _error("INVALID_FIELD", name, f"is {show(value)}, not a map of at most {MAX_NAMES} names")
    return {key: _read(f'{name}["{key}"]', item, read) for key, item in value.items()}


class _InvalidError(Exception):
    """Say what a value should have been."""


def _rank(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _InvalidError(f"a whole number from 1 to {MAX_RANK}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _InvalidError("a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_ALPHA:
        raise _InvalidError("a finite number of a size that float32 can hold")
    return number


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _InvalidError("true or false")
    return value


def _names(value: object) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _name_list(value)


def _name_list(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > MAX_NAMES or not all(isinstance(i, str) and i for i in items):
        raise _InvalidError(f"a list of at most {MAX_NAMES} names")
    return tuple(items)


def _indices(value: object) -> tuple[int, ...]:
    items = [] if value is None else [value] if type(value) is int else value
    if not isinstance(items, list) or not all(type(item) is int and item >= 0 for item in items):
        raise _InvalidError("a list of layer numbers")
    return tuple(items)


def _error(reason: str, name: str, problem: str) -> AdapterFormatError:
    field = f"adapter_config.{name}"
    return AdapterFormatError(f"{field} {problem}", reason=reason, field=field)
