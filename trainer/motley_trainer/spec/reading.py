"""The JSON of a TrainingSpec, read into the facts of `settings.py`.

It is proto JSON with the proto's own field names: enums by name, 64-bit numbers perhaps as strings. What is there is
understood, or refused by the name that the proto gives it. Pure.
"""

from __future__ import annotations

import hashlib
import json

from motley_trainer.spec.bounds import MAX_ALPHA, MAX_BATCH, MAX_EPOCHS, MAX_LENGTH, MAX_STEPS
from motley_trainer.spec.json_fields import JsonFields
from motley_trainer.spec.methods import read_digest, read_settings
from motley_trainer.spec.settings import (
    GateSettings,
    LoqtOptimizer,
    LoqtSettings,
    OptimizerSettings,
    OverLength,
    Schedule,
    TrainingMethod,
    TrainingSpec,
)

MAX_SEED = 1 << 63
QUANTIZATIONS = ("none", "nf4")


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
    quantization = _quantization(fields)
    settings = read_settings(method, fields.child(method.value), quantization)
    has_8bit_moments = isinstance(settings, LoqtSettings) and settings.optimizer is LoqtOptimizer.ADAMW_8BIT
    batch_size = fields.whole("batch_size", 1, MAX_BATCH, 16)
    steps = fields.whole_or_none("steps", 1, MAX_STEPS)
    if steps is not None and "epochs" in fields:
        raise fields.error("epochs", "does not go with steps: one of them says how long")
    spec = TrainingSpec(
        method=method,
        settings=settings,
        dataset=read_digest(fields, "dataset"),
        digest=digest_of(value),
        quantization=quantization,
        steps=steps,
        epochs=fields.number("epochs", 3.0, above=0, most=MAX_EPOCHS) if steps is None else None,
        batch_size=batch_size,
        micro_batch_size=fields.whole("micro_batch_size", 1, batch_size, batch_size),
        max_length=fields.whole_or_none("max_length", 2, MAX_LENGTH),
        over_length=fields.word("over_length", OverLength, "OVER_LENGTH_", OverLength.TRUNCATE),
        seed=fields.whole("seed", -MAX_SEED, MAX_SEED - 1, 0),
        checkpoint_steps=fields.whole("checkpoint_steps", 1, MAX_STEPS, 50),
        optimizer=_optimizer(fields.child("optimizer"), steps, has_8bit_moments),
        gate=_gate(fields.child("gate")),
    )
    fields.child("publish")  # what becomes of an adapter is the worker's to know
    if isinstance(settings, LoqtSettings) and fields.get("publish"):
        raise fields.error("publish", f"does not go with the method {method}, which makes a base and publishes nothing")
    fields.end()
    return spec


def digest_of(value: object) -> str:
    """Return "sha256:..." over a value that is JSON, however its keys are ordered."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _optimizer(fields: JsonFields, steps: int | None, has_8bit_moments: bool) -> OptimizerSettings:
    settings = OptimizerSettings(
        learning_rate=fields.number("learning_rate", 2e-4, above=0, most=MAX_ALPHA),
        schedule=fields.word("schedule", Schedule, "LEARNING_RATE_SCHEDULE_", Schedule.LINEAR),
        warmup_steps=fields.whole_or_none("warmup_steps", 0, MAX_STEPS if steps is None else steps - 1),
        weight_decay=fields.number("weight_decay", 0.0, least=0, most=MAX_ALPHA),
        beta1=fields.number("beta1", 0.9, least=0, below=1),
        beta2=fields.number("beta2", 0.999, least=0, below=1),
        max_gradient_norm=fields.number("max_gradient_norm", 1.0, least=0, most=MAX_ALPHA),
        has_8bit_moments=has_8bit_moments,
    )
    fields.end()
    return settings


def _gate(fields: JsonFields) -> GateSettings:
    settings = GateSettings(
        dataset=read_digest(fields, "dataset") if fields.get("dataset") else None,
        max_loss_ratio=fields.number("max_loss_ratio", 1.0, above=0, most=MAX_ALPHA),
        min_exact_match=fields.number_or_none("min_exact_match", least=0, most=1),
    )
    fields.end()
    return settings


def _quantization(fields: JsonFields) -> str | None:
    return fields.one_of("quantization", QUANTIZATIONS) if fields.get("quantization") else None
