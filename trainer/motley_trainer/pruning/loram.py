"""LoRAM's copies of a base: smaller by whole heads and channels, or of the same shapes with single weights at zero.

Owns what is loaded for it, and what is said of the copy. A copy is a base directory of its own. Which heads and
channels go is chosen here, or taken over from another copy. Runs on the calling thread.
Source: LoRAM, arXiv:2502.13533, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_model, read_parsed_config, stored_dtype
from motley_bases.prune_manifest import SCHEMA_VERSION, LayerKeep, PruneManifest
from motley_bases.quantization import NONE
from transformers import PreTrainedModel

from motley_trainer.errors import SettingsError
from motley_trainer.pruning.dense_copy import write_dense
from motley_trainer.pruning.groups import GroupKind
from motley_trainer.pruning.iterative import prune_in_steps
from motley_trainer.pruning.loram_checks import naming_loram, needs_calibration, prune_settings, pruned_layers
from motley_trainer.pruning.masks import MaskRule, PatternMask, ShareMask
from motley_trainer.pruning.sample_windows import SampleWindows
from motley_trainer.pruning.settings import PruneSettings
from motley_trainer.pruning.sparse_gpt import BLOCK_SIZE, DAMPING, sparsify
from motley_trainer.pruning.surgery import num_parameters, shrink
from motley_trainer.pruning.written import write_pruned
from motley_trainer.spec.settings import LoramPruning, LoramSettings

NO_WINDOWS = torch.empty(0, 2, dtype=torch.long)


@dataclass(frozen=True, eq=False, slots=True)
class CopyOrder:
    """What copy of which base is to be made.

    Semantics: `calibration` is there where `needs_calibration` says so; `cut` tells what to keep where the settings
    name an adapter whose cut it is.
    """

    base: Path
    settings: LoramSettings
    seed: int
    device: torch.device
    calibration: SampleWindows | None = None
    cut: PruneManifest | None = None
    on_step: Callable[[], None] = lambda: None


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """A copy in memory: `write` fills a directory with it; `facts` are what is to be remembered of it, as JSON."""

    write: Callable[[Path], str]
    facts: Mapping[str, object]


def make_copy(order: CopyOrder) -> Copy:
    """Load a base and prune it.

    Semantics: in the dtype that it is stored in where no estimate is made, in float32 otherwise.
    Raises: SettingsError with reason EMPTY_LAYER, LAYER_RANGE or NOTHING_TO_PRUNE, naming the field;
    UnsuitableBaseError with reason NOT_FINITE; BaseError for a base that cannot be read.
    """
    config = read_parsed_config(order.base)
    stored = stored_dtype(order.base, config)
    dtype = torch.float32 if needs_calibration(order.settings) else stored
    original = fingerprint(order.base)
    model = load_model(order.base, dtype, order.device, NONE)
    if order.cut is None and order.settings.pruning.keeps_shapes:
        facts = {"original_fingerprint": original, **_set_to_zero(model, order)}
        return Copy(lambda directory: write_dense(directory, model, original=order.base, dtype=stored), facts)
    manifest = _take_cut(model, order.cut) if order.cut is not None else _cut(model, order, original)

    def write(directory: Path) -> str:
        return write_pruned(directory, model, original=order.base, config=config, dtype=stored, manifest=manifest)

    return Copy(write, {"original_fingerprint": original, **_told(manifest)})


def _cut(model: PreTrainedModel, order: CopyOrder, original: str) -> PruneManifest:
    settings = prune_settings(order.settings, order.seed)
    calibration = order.calibration
    windows = NO_WINDOWS if calibration is None else calibration.windows
    with naming_loram():
        pruned = prune_in_steps(model, settings, windows.to(model.device), order.on_step)
    return _manifest(original, model, settings, pruned.layers, calibration)


def _take_cut(model: PreTrainedModel, cut: PruneManifest) -> PruneManifest:
    """Keep what another copy keeps, and say of it what that one's manifest says."""
    kept = {
        (layer, kind): indices
        for layer, keep in enumerate(cut.layers)
        if keep is not None
        for kind, indices in ((GroupKind.ATTENTION, keep.kv_heads), (GroupKind.FFN, keep.ffn_channels))
    }
    shrink(model, kept)
    return replace(cut, num_parameters=num_parameters(model), recovery=None, pruned_fingerprint=None)


def _manifest(
    original: str,
    model: PreTrainedModel,
    settings: PruneSettings,
    layers: tuple[LayerKeep | None, ...],
    calibration: SampleWindows | None,
) -> PruneManifest:
    pruned = settings.layers(len(layers))
    return PruneManifest(
        schema_version=SCHEMA_VERSION,
        original_fingerprint=original,
        layers=layers,
        criterion=str(settings.criterion),
        aggregation=str(settings.aggregation),
        selection=str(settings.selection),
        ratio=settings.ratio,
        steps=settings.steps,
        multiple=settings.multiple,
        rule=str(settings.rule),
        protected=(pruned.start, len(layers) - pruned.stop),
        calibration_sha256=None if calibration is None else calibration.sha256,
        calibration_tokens=0 if calibration is None else calibration.windows.numel(),
        calibration_window=0 if calibration is None else calibration.windows.shape[1],
        seed=settings.seed,
        num_parameters=num_parameters(model),
    )


def _told(manifest: PruneManifest) -> Mapping[str, object]:
    """Return of a cut what is to be remembered beside its manifest."""
    return {"pruning": manifest.criterion, "num_parameters": manifest.num_parameters, "is_smaller": True}


def _set_to_zero(model: PreTrainedModel, order: CopyOrder) -> Mapping[str, object]:
    """Set single weights to zero, and return what is to be remembered of it."""
    asked, calibration = order.settings, order.calibration
    assert calibration is not None  # `needs_calibration` says so
    layers = pruned_layers(asked, model.config.num_hidden_layers)
    found = sparsify(model, calibration.windows.to(model.device), layers, _rule(asked), order.on_step)
    if found.num_zeros == 0:
        message = f"a ratio of {float(asked.ratio):g} is less than one weight of every block of {BLOCK_SIZE} columns"
        raise SettingsError(message, reason="NOTHING_TO_PRUNE", field="loram.ratio")
    return {
        "pruning": asked.pruning.value,
        "num_parameters": num_parameters(model),
        "is_smaller": False,  # zeros are held and multiplied as other weights are
        "num_zeros": found.num_zeros,
        "num_pruned_weights": found.num_weights,
        "layers": [layers.start, layers.stop],
        "weights": "adjusted",  # those that stay are SparseGPT's, not the original's
        "damping": DAMPING,
        "block_size": BLOCK_SIZE,
        "calibration_sha256": calibration.sha256,
        "calibration_tokens": calibration.windows.numel(),
    }


def _rule(asked: LoramSettings) -> MaskRule:
    if asked.pruning is LoramPruning.UNSTRUCTURED:
        return ShareMask(asked.ratio)
    assert asked.pattern is not None  # the reader of the spec has filled it in
    return PatternMask(*asked.pattern)
