"""The JSON of a TrainingSpec, read into the facts of `settings.py`.

It is proto JSON with the proto's own field names: enums by name, 64-bit numbers perhaps as strings. What is there is
understood, or refused by the name that the proto gives it. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re

from motley_trainer.spec.json_fields import JsonFields
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
)

MAX_RANK = 1 << 16
MAX_COUNT = 1 << 31
MAX_SEED = 1 << 63
MAX_ALPHA = 1e30  # as far as an adapter's file may go
QUANTIZATIONS = ("none", "nf4")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def read_spec(value: object) -> TrainingSpec:
    """Read a TrainingSpec.

    Raises: SettingsError with reason BAD_SPEC and the field as the proto spells it.
    """
    fields = JsonFields(value, "")
    method = fields.word("method", TrainingMethod, "TRAINING_METHOD_", None)
    if method is None:
        raise fields.error("method", f"is missing; it is one of {', '.join(TrainingMethod)}")
    for other in TrainingMethod:
        if other is not method and other.value in fields:
            raise fields.error(other.value, f"does not go with the method {method}")
    settings = fields.child(method.value)
    batch_size = fields.whole("batch_size", 1, MAX_COUNT, 16)
    steps = fields.whole_or_none("steps", 1, MAX_COUNT)
    if steps is not None and "epochs" in fields:
        raise fields.error("epochs", "does not go with steps: one of them says how long")
    spec = TrainingSpec(
        method=method,
        settings=_lora(settings) if method is TrainingMethod.LORA else _s2ft(settings),
        dataset=_digest(fields, "dataset"),
        digest=digest_of(value),
        quantization=_quantization(fields),
        steps=steps,
        epochs=fields.number("epochs", 3.0, above=0, most=1e9) if steps is None else None,
        batch_size=batch_size,
        micro_batch_size=fields.whole("micro_batch_size", 1, batch_size, batch_size),
        max_length=fields.whole_or_none("max_length", 2, MAX_COUNT),
        over_length=fields.word("over_length", OverLength, "OVER_LENGTH_", OverLength.TRUNCATE),
        seed=fields.whole("seed", -MAX_SEED, MAX_SEED - 1, 0),
        checkpoint_steps=fields.whole("checkpoint_steps", 1, MAX_COUNT, 50),
        optimizer=_optimizer(fields.child("optimizer"), steps),
        gate=_gate(fields.child("gate")),
    )
    fields.child("publish")  # what becomes of the adapter is the worker's to know
    fields.end()
    return spec


def digest_of(value: object) -> str:
    """Return "sha256:..." over a value that is JSON, however its keys are ordered."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _lora(fields: JsonFields) -> LoraSettings:
    rank = fields.whole("rank", 1, MAX_RANK, 8)
    alphas = fields.map("alpha_pattern")
    ranks = fields.map("rank_pattern")
    settings = LoraSettings(
        rank=rank,
        alpha=fields.number("alpha", 2.0 * rank, above=0, most=MAX_ALPHA),
        use_rslora=fields.flag("use_rslora"),
        target_modules=fields.names("target_modules"),
        rank_pattern={name: ranks.whole(name, 1, MAX_RANK, 1) for name in ranks},
        alpha_pattern={name: alphas.number(name, 1.0, above=0, most=MAX_ALPHA) for name in alphas},
        dropout=fields.number("dropout", 0.0, least=0, below=1),
    )
    fields.end()
    return settings


def _s2ft(fields: JsonFields) -> S2ftSettings:
    names = ("o_share", "down_share", "v_share", "up_share")
    is_silent = not any(name in fields for name in names)
    defaults = {"o_share": 0.05, "down_share": 0.02} if is_silent else {}
    shares = {name: fields.number(name, defaults.get(name, 0.0), least=0, most=1) for name in names}
    if not any(shares.values()):
        raise fields.error("", "has no share above 0, and so trains nothing")
    settings = S2ftSettings(
        **shares,
        score=fields.word("score", ChannelScore, "CHANNEL_SCORE_", ChannelScore.RANDOM),
        order=fields.word("order", ChannelOrder, "CHANNEL_ORDER_", ChannelOrder.SMALL),
        budget=fields.word("budget", ChannelBudget, "CHANNEL_BUDGET_", ChannelBudget.LAYER),
        disjoint_from=fields.names("disjoint_from"),
        calibration_samples=fields.whole("calibration_samples", 1, MAX_COUNT, 64),
    )
    fields.end()
    return settings


def _optimizer(fields: JsonFields, steps: int | None) -> OptimizerSettings:
    settings = OptimizerSettings(
        learning_rate=fields.number("learning_rate", 2e-4, above=0, most=MAX_ALPHA),
        schedule=fields.word("schedule", Schedule, "LEARNING_RATE_SCHEDULE_", Schedule.LINEAR),
        warmup_steps=fields.whole_or_none("warmup_steps", 0, MAX_COUNT if steps is None else steps - 1),
        weight_decay=fields.number("weight_decay", 0.0, least=0, most=MAX_ALPHA),
        beta1=fields.number("beta1", 0.9, least=0, below=1),
        beta2=fields.number("beta2", 0.999, least=0, below=1),
        max_gradient_norm=fields.number("max_gradient_norm", 1.0, least=0, most=MAX_ALPHA),
    )
    fields.end()
    return settings


def _gate(fields: JsonFields) -> GateSettings:
    settings = GateSettings(
        dataset=_digest(fields, "dataset") if fields.get("dataset") else None,
        max_loss_ratio=fields.number("max_loss_ratio", 1.0, above=0, most=MAX_ALPHA),
        min_exact_match=fields.number_or_none("min_exact_match", least=0, most=1),
    )
    fields.end()
    return settings


def _digest(fields: JsonFields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise fields.error(name, "is not `sha256:` and 64 hex digits")
    return value


def _quantization(fields: JsonFields) -> str | None:
    return fields.one_of("quantization", QUANTIZATIONS) if fields.get("quantization") else None
