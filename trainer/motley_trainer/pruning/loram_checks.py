"""What a LoRAM copy of a base cannot be: refused from config and settings alone, before a weight is read.

Fields are named as the wire spells them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from motley_bases.pruned import check_prunable, decoder_shape, is_pruned
from motley_bases.quantization import CONFIG_FIELD, NONE, stored_quantization
from transformers import PreTrainedConfig

from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.pruning.counting import CountingRule, kept_count
from motley_trainer.pruning.groups import layer_groups
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.settings import PruneSettings
from motley_trainer.spec.settings import LoramPruning, LoramSettings


def takes_copy(asked: LoramSettings) -> bool:
    """Tell whether anything is to go at all: where nothing is, the base itself is trained on."""
    return asked.same_cut_as is not None or asked.pruning is LoramPruning.SEMI_STRUCTURED or asked.ratio > 0


def needs_calibration(asked: LoramSettings) -> bool:
    """Tell whether samples are looked at."""
    return asked.same_cut_as is None and asked.pruning is not LoramPruning.RANDOM


def prune_settings(asked: LoramSettings, seed: int = 0) -> PruneSettings:
    """Return LoRAM's settings as pruning has them; its rule counts.

    Raises: SettingsError, naming the field.
    """
    first, end = (None, None) if asked.layers is None else asked.layers
    with naming_loram():
        return PruneSettings(
            ratio=asked.ratio,
            first_layer=first,
            end_layer=end,
            rule=CountingRule.LORAM,
            criterion=Criterion.RANDOM if asked.pruning is LoramPruning.RANDOM else Criterion.PARAM_FIRST,
            seed=seed,
        )


def pruned_layers(asked: LoramSettings, num_layers: int) -> range:
    """Return the layers that are pruned.

    Semantics: unless some are named, single weights go from all layers, heads and channels from the rule's own.
    Raises: SettingsError with reason LAYER_RANGE.
    """
    if asked.layers is None and asked.pruning.keeps_shapes:
        return range(num_layers)
    settings = prune_settings(asked)
    with naming_loram():
        return settings.layers(num_layers)


def check_copy(asked: LoramSettings, config: PreTrainedConfig) -> None:
    """Refuse a copy that cannot be made of a base.

    Raises: UnsupportedBaseError with reason NOT_PRUNABLE; UnsuitableBaseError with reason ALREADY_PRUNED or
    ALREADY_QUANTIZED; SettingsError with reason LAYER_RANGE, EMPTY_LAYER, LOQT_FILLS_ZEROS or BAD_SPEC.
    """
    if not takes_copy(asked):
        if asked.alignment is not None:
            message = "loram.alignment makes up for what was pruned, and with loram.ratio 0 nothing is"
            raise SettingsError(message, reason="BAD_SPEC", field="loram.alignment")
        return
    if asked.alignment is not None and asked.alignment.loqt is not None and _keeps_zeros(asked):
        message = "loram.alignment.loqt adds to every weight, and would fill the zeros that this pruning leaves"
        raise SettingsError(message, reason="LOQT_FILLS_ZEROS", field="loram.alignment.loqt")
    check_prunable(config)
    if is_pruned(config):
        message = "the base is a pruned one: train LoRAM for its original"
        raise UnsuitableBaseError(message, reason="ALREADY_PRUNED", field="model_type")
    if stored_quantization(getattr(config, CONFIG_FIELD, None)) != NONE:
        message = "the base is stored quantized: serve the checkpoint that it was made of, quantized at load"
        raise UnsuitableBaseError(message, reason="ALREADY_QUANTIZED", field=CONFIG_FIELD)
    if asked.same_cut_as is not None:
        return
    shape = decoder_shape(config)
    layers = pruned_layers(asked, shape.num_layers)
    if asked.pruning is LoramPruning.SEMI_STRUCTURED:
        _check_pattern(asked, {shape.hidden_size, shape.ffn_size, shape.num_heads * shape.head_dim})
    elif not asked.pruning.keeps_shapes:
        with naming_loram():
            for groups in layer_groups(shape, layers.start):
                kept_count(groups, asked.ratio, rule=CountingRule.LORAM)


def _keeps_zeros(asked: LoramSettings) -> bool:
    return asked.same_cut_as is None and asked.pruning.keeps_shapes


@contextmanager
def naming_loram() -> Iterator[None]:
    """Name the fields of a pruning's settings as those of LoRAM's, whose they are here."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(error.message, reason=error.reason, field=f"loram.{error.field}") from error


def _check_pattern(asked: LoramSettings, widths: set[int]) -> None:
    assert asked.pattern is not None  # the reader of the spec has filled it in
    _, of = asked.pattern
    for width in sorted(widths):
        if width % of:
            message = f"loram.pattern is of every {of} weights of a row, and rows of {width} are no multiple of that"
            raise SettingsError(message, reason="BAD_SPEC", field="loram.pattern")
