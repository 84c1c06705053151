"""Pruning from one checkpoint directory to another: the order of the stages, and what is told of them.

Runs on the calling thread, for as long as it takes; a watcher sees it go by.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from motley_bases.admission import check_config, check_stored_config
from motley_bases.checkpoint import read_config, resolve_base
from motley_bases.describe import context_length
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_model, load_tokenizer, read_parsed_config, stored_dtype
from motley_bases.prune_manifest import SCHEMA_VERSION, PruneManifest
from motley_bases.pruned import PrunedShapes, check_prunable, is_pruned, register_pruned
from motley_bases.quantization import NONE, stored_quantization
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.files.outputs import new_directory
from motley_trainer.progress import Unwatched, Watcher
from motley_trainer.pruning.iterative import Pruned, prune_in_steps
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.recovery import Recovered, recover
from motley_trainer.pruning.settings import PruneSettings
from motley_trainer.pruning.surgery import num_parameters, shapes_of
from motley_trainer.pruning.texts import CalibrationText, draw_calibration, read_windows
from motley_trainer.pruning.written import write_pruned


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning made.

    Semantics: `ratio_gone` is the share of the parameters of all heads and channels of the pruned layers that went;
    rounding to whole ones keeps it from `ratio_asked`. Perplexities are of the stored weights, in float32, on the same
    windows; None where there was no text, and after recovery where nothing was merged. `num_unlike_first_order` is
    `Pruned`'s.
    """

    directory: Path
    fingerprint: str
    num_parameters_before: int
    num_parameters_after: int
    ratio_asked: Fraction
    ratio_gone: Fraction
    shapes: PrunedShapes
    perplexity_before: float | None
    perplexity_pruned: float | None
    perplexity_recovered: float | None
    num_evaluation_windows: int
    num_unlike_first_order: int | None
    recovered: Recovered | None


@dataclass(frozen=True, slots=True)
class Texts:
    """What is learned from and what is measured on; either may not be there."""

    calibration: CalibrationText | None
    evaluation: Tensor | None


def prune_base(
    base: str,
    settings: PruneSettings,
    out: Path,
    *,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    device: torch.device | None = None,
    watcher: Watcher | None = None,
) -> PruneReport:
    """Prune a base into a new directory.

    Semantics: `base` is what `--base` says. Without an evaluation text a part of the calibration text is held out.
    Effects: writes `out`, whole or not at all.
    Raises: BaseError for a base that cannot be read or pruned; TrainerError for the rest.
    """
    watcher = watcher or Unwatched()
    directory = resolve_base(base)
    config = _checked_config(directory, settings)
    with new_directory(out) as aside:
        watcher.begin("reading", 2)
        texts = _read_texts(directory, settings, calibration, evaluation)
        watcher.advance()
        original = fingerprint(directory)
        dtype = stored_dtype(directory, config)
        model = load_model(directory, torch.float32, device or torch.device("cpu"), NONE)
        watcher.advance()
        before, num_before = _measure(model, texts, watcher), num_parameters(model)
        pruned = _prune(model, settings, texts, watcher)
        after = _measure(model, texts, watcher)
        recovered = _recover(model, settings, texts, dtype, watcher)
        is_changed = recovered is not None and recovered.digest is not None
        after_recovery = _measure(model, texts, watcher) if is_changed else None
        watcher.begin("writing", 1)
        manifest = _manifest(original, model, settings, texts, pruned, recovered)
        digest = write_pruned(aside, model, original=directory, config=config, dtype=dtype, manifest=manifest)
        watcher.advance()
    num_after = num_parameters(model)
    return PruneReport(
        directory=out,
        fingerprint=digest,
        num_parameters_before=num_before,
        num_parameters_after=num_after,
        ratio_asked=settings.ratio,
        ratio_gone=Fraction(num_before - num_after, pruned.num_group_parameters),
        shapes=shapes_of(model),
        perplexity_before=before,
        perplexity_pruned=after,
        perplexity_recovered=after_recovery,
        num_evaluation_windows=0 if texts.evaluation is None else len(texts.evaluation),
        num_unlike_first_order=pruned.num_unlike_first_order,
        recovered=recovered,
    )


def _checked_config(directory: Path, settings: PruneSettings) -> PreTrainedConfig:
    """Read the config, and refuse what cannot be pruned, or not as asked, before a weight is read."""
    register_pruned()
    check_stored_config(read_config(directory))
    config = read_parsed_config(directory)
    check_config(config)
    check_prunable(config)
    if is_pruned(config):
        raise UnsuitableBaseError(
            f"{directory} is pruned already: prune its original, with a larger ratio",
            reason="ALREADY_PRUNED",
            field="model_type",
        )
    if stored_quantization(getattr(config, "quantization_config", None)) != NONE:
        raise UnsuitableBaseError(
            f"{directory} is quantized: prune its original, and quantize what is left",
            reason="ALREADY_QUANTIZED",
            field="quantization_config",
        )
    settings.layers(config.num_hidden_layers)
    if settings.window > context_length(config):
        raise SettingsError(
            f"windows of {settings.window} tokens are longer than the base's context of {context_length(config)}",
            reason="WINDOW_TOO_LONG",
            field="window",
        )
    return config


def _read_texts(
    directory: Path,
    settings: PruneSettings,
    calibration: Path | None,
    evaluation: Path | None,
) -> Texts:
    if calibration is None and (settings.criterion.needs_gradient or settings.recovery.steps > 0):
        wanted = settings.criterion if settings.criterion.needs_gradient else "recovery"
        raise SettingsError(f"{wanted} needs a calibration text", reason="NO_CALIBRATION", field="calibration")
    tokenizer = load_tokenizer(directory)
    held_out = None
    if evaluation is not None:
        held_out = read_windows(evaluation, tokenizer, settings.window, field="evaluation")
    if calibration is None:
        return Texts(None, None if held_out is None else held_out.windows)
    text = read_windows(calibration, tokenizer, settings.window, field="calibration")
    drawn, measured = draw_calibration(
        text, held_out, num_windows=settings.num_windows, seed=settings.seed, path=calibration
    )
    return Texts(drawn, measured)


def _measure(model: PreTrainedModel, texts: Texts, watcher: Watcher) -> float | None:
    if texts.evaluation is None:
        return None
    watcher.begin("measuring", 1)
    measured = perplexity(model, texts.evaluation)
    watcher.advance()
    return measured


def _prune(model: PreTrainedModel, settings: PruneSettings, texts: Texts, watcher: Watcher) -> Pruned:
    watcher.begin("pruning", settings.steps)
    none = torch.empty(0, settings.window, dtype=torch.long)
    windows = none if texts.calibration is None else texts.calibration.calibration
    return prune_in_steps(model, settings, windows.to(model.device), watcher.advance)


def _recover(
    model: PreTrainedModel, settings: PruneSettings, texts: Texts, dtype: torch.dtype, watcher: Watcher
) -> Recovered | None:
    if settings.recovery.steps == 0 or texts.calibration is None:
        return None
    watcher.begin("recovering", settings.recovery.steps)
    learnable = texts.calibration.learnable
    recovered = recover(model, learnable, settings.recovery, seed=settings.seed, on_step=watcher.advance)
    _round(model, dtype)
    return recovered


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make every weight one that `dtype` has, so that what is measured is what is stored."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _manifest(
    original: str,
    model: PreTrainedModel,
    settings: PruneSettings,
    texts: Texts,
    pruned: Pruned,
    recovered: Recovered | None,
) -> PruneManifest:
    is_calibrated = texts.calibration is not None and settings.criterion.needs_gradient
    layers = settings.layers(len(pruned.layers))
    return PruneManifest(
        schema_version=SCHEMA_VERSION,
        original_fingerprint=original,
        layers=pruned.layers,
        ratio=settings.ratio,
        steps=settings.steps,
        multiple=settings.multiple,
        rule=str(settings.rule),
        criterion=str(settings.criterion),
        aggregation=str(settings.aggregation),
        selection=str(settings.selection),
        protected=(layers.start, len(pruned.layers) - layers.stop),
        calibration_sha256=texts.calibration.sha256 if is_calibrated and texts.calibration else None,
        calibration_tokens=settings.num_windows * settings.window if is_calibrated else 0,
        calibration_window=settings.window if is_calibrated else 0,
        seed=settings.seed,
        num_parameters=num_parameters(model),
        recovery=None if recovered is None else recovered.digest,
    )
