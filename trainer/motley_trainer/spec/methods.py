"""The settings of each method, read from their JSON as the wire spells it.

What goes with what is checked here too: what is there is understood, or refused by its name. Pure.
"""

from __future__ import annotations

import re
from fractions import Fraction

from motley_trainer.spec.bounds import MAX_ALPHA, MAX_BATCH, MAX_RANK, MAX_SAMPLES, MAX_STEPS, MIN_GOAT_SCALE
from motley_trainer.spec.json_fields import JsonFields
from motley_trainer.spec.loqt import read_loqt
from motley_trainer.spec.settings import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    GoatScale,
    GoatScaleRank,
    GoatSegments,
    GoatSettings,
    LoqtSettings,
    LoramAlignment,
    LoramPruning,
    LoramSettings,
    LoraSettings,
    S2ftSettings,
    Settings,
    TrainingMethod,
)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RATIO = re.compile(r"[0-9]{1,9}/0*[1-9][0-9]{0,8}|[0-9]{0,9}\.?[0-9]{1,9}")
_PAIR = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")


def read_settings(method: TrainingMethod, fields: JsonFields, quantization: str | None) -> Settings:
    """Read the settings of a method; `quantization` is the spec's, with which not all of them go.

    Raises: SettingsError with reason BAD_SPEC and the field as the proto spells it.
    """
    match method:
        case TrainingMethod.LORA:
            return _lora(fields)
        case TrainingMethod.S2FT:
            return _s2ft(fields)
        case TrainingMethod.GOAT:
            return _goat(fields)
        case TrainingMethod.LORAM:
            return _loram(fields, quantization)
        case TrainingMethod.LOQT:
            return read_loqt(fields, quantization)


def read_digest(fields: JsonFields, name: str) -> str:
    """Read a dataset's digest.

    Raises: SettingsError with reason BAD_SPEC.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise fields.error(name, "is not `sha256:` and 64 hex digits")
    return value


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
        calibration_samples=fields.whole("calibration_samples", 1, MAX_SAMPLES, 64),
    )
    fields.end()
    return settings


def _goat(fields: JsonFields) -> GoatSettings:
    experts = fields.whole("experts", 1, MAX_RANK, 8)
    rank = fields.whole("rank", 1, MAX_RANK, 8)
    if rank < experts:
        raise fields.error("rank", f"is {rank}, which leaves some of {experts} experts without any")
    if rank % experts:
        raise fields.error("rank", f"is {rank}, which {experts} experts cannot share evenly")
    scale = fields.word("scale", GoatScale, "GOAT_SCALE_", GoatScale.THEORETICAL)
    idle = ("alpha",) if scale is GoatScale.THEORETICAL else ("eta", "rank_for_scale")
    for name in idle:
        if name in fields:
            raise fields.error(name, f"does not go with the scale {scale}")
    settings = GoatSettings(
        rank=rank,
        experts=experts,
        top_k=fields.whole("top_k", 1, experts, min(2, experts)),
        rho=fields.number("rho", 10.0, least=MIN_GOAT_SCALE, most=MAX_ALPHA),
        segments=fields.word("segments", GoatSegments, "GOAT_SEGMENTS_", GoatSegments.HEAD),
        scale=scale,
        eta=fields.number("eta", 1.0, least=MIN_GOAT_SCALE, most=MAX_ALPHA),
        rank_for_scale=fields.word("rank_for_scale", GoatScaleRank, "GOAT_SCALE_RANK_", GoatScaleRank.EXPERT),
        alpha=fields.number("alpha", 2.0 * rank, least=MIN_GOAT_SCALE, most=MAX_ALPHA),
        balance_loss=fields.number("balance_loss", 1e-3, least=0, most=MAX_ALPHA),
        dropout=fields.number("dropout", 0.05, least=0, below=1),
        target_modules=fields.names("target_modules"),
    )
    fields.end()
    return settings


def _loram(fields: JsonFields, quantization: str | None) -> LoramSettings:
    pruning = fields.word("pruning", LoramPruning, "LORAM_PRUNING_", LoramPruning.STRUCTURED)
    same_cut_as = fields.text("same_cut_as") if _is_said(fields, "same_cut_as") else None
    ratio, layers = _ratio(fields), _layers(fields)
    idle, who = _idle_for_loram(pruning, ratio, same_cut_as)
    for name in idle:
        if _is_said(fields, name):
            raise fields.error(name, f"does not go with {who}")
    alignment = fields.get("alignment")
    settings = LoramSettings(
        lora=_lora(fields.child("lora")),
        pruning=pruning,
        ratio=ratio,
        layers=layers,
        pattern=_pattern(fields) if pruning is LoramPruning.SEMI_STRUCTURED else None,
        same_cut_as=same_cut_as,
        calibration_samples=fields.whole("calibration_samples", 1, MAX_SAMPLES, 64),
        alignment=None if alignment is None else _alignment(fields.child("alignment"), quantization),
    )
    fields.end()
    return settings


def _idle_for_loram(pruning: LoramPruning, ratio: Fraction, same_cut_as: str | None) -> tuple[tuple[str, ...], str]:
    """Return the settings that nothing would be done with, and what has no use for them."""
    if same_cut_as is not None:
        return ("pruning", "ratio", "layers", "pattern", "calibration_samples"), "same_cut_as"
    if pruning is LoramPruning.SEMI_STRUCTURED:
        return ("ratio",), f"the pruning {pruning}"
    if ratio == 0:
        return ("pruning", "layers", "pattern", "calibration_samples", "alignment"), "ratio 0, which prunes nothing"
    samples = ("calibration_samples",) if pruning is LoramPruning.RANDOM else ()
    return ("pattern", *samples), f"the pruning {pruning}"


def _is_said(fields: JsonFields, name: str) -> bool:
    """Tell whether a field is there; an empty text is not, as on the wire."""
    return fields.get(name) not in (None, "")


def _alignment(fields: JsonFields, quantization: str | None) -> LoramAlignment:
    settings = LoramAlignment(
        dataset=read_digest(fields, "dataset"),
        steps=fields.whole("steps", 1, MAX_STEPS, 100),
        learning_rate=fields.number("learning_rate", 5e-5, above=0, most=MAX_ALPHA),
        batch_size=fields.whole("batch_size", 1, MAX_BATCH, 16),
        loqt=_aligning_loqt(fields.child("loqt"), quantization) if fields.get("loqt") is not None else None,
    )
    fields.end()
    return settings


def _aligning_loqt(fields: JsonFields, quantization: str | None) -> LoqtSettings:
    if fields.get("start"):
        raise fields.error("start", "is not asked here: what is aligned is the pruned copy")
    return read_loqt(fields, quantization)


def _ratio(fields: JsonFields) -> Fraction:
    text = fields.text("ratio") if _is_said(fields, "ratio") else "1/2"
    if not _RATIO.fullmatch(text) or not 0 <= Fraction(text) < 1:
        raise fields.error("ratio", "is no ratio from 0 to below 1, such as 1/2 or 0.65")
    return Fraction(text)


def _layers(fields: JsonFields) -> tuple[int, int] | None:
    if not _is_said(fields, "layers"):
        return None
    found = _PAIR.fullmatch(fields.text("layers"))
    if found is None or int(found[1]) >= int(found[2]):
        raise fields.error("layers", "is not A:B with A below B")
    return int(found[1]), int(found[2])


def _pattern(fields: JsonFields) -> tuple[int, int]:
    found = _PAIR.fullmatch(fields.text("pattern") if _is_said(fields, "pattern") else "4:8")
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise fields.error("pattern", "is not N:M with N above 0 and below M, such as 4:8")
    return int(found[1]), int(found[2])
