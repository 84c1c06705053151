"""LoRAM: a LoRA that is trained on a pruned copy of the base, and written for the base itself.

On the copy it is a LoRA like any other. On the original its factors keep their small shapes and act on the channels
that were kept; only what is written has the original's shapes, with zeros. Where nothing was to be pruned it is a LoRA
of the base, and written as one. Runs on the thread that owns the model.
Source: LoRAM, arXiv:2502.13533.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motley_adapters.kinds.loram import write_cut, write_loram_manifest
from motley_adapters.kinds.loram_recovery import recover
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import inspect_adapter
from motley_bases.kept_channels import kept_by_path
from motley_bases.pruned_geometry import KeptChannels
from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.errors import CheckpointError, SettingsError
from motley_trainer.methods.lora import AttachedLora, Lora, resolve_targets
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.methods.loram_linear import RecoveredLinear
from motley_trainer.methods.method import Context
from motley_trainer.spec.settings import LoramSettings

WHOLE = KeptChannels()


@dataclass(frozen=True, slots=True)
class Loram:
    """Train a LoRA on the copy, or put what was trained there beside the original's Linears."""

    settings: LoramSettings

    def attach(self, model: PreTrainedModel, context: Context, resumed: Mapping[str, Tensor] | None) -> AttachedLora:
        """Put factors beside the Linears that are meant, of the same names and shapes on the copy and on the original.

        Semantics: on the original of a copy the factors are there to be copied in, not to be trained.
        Raises: SettingsError with reason NO_SUCH_MODULE or RANK_TOO_LARGE, naming the field; CheckpointError with
        reason CHECKPOINT_OF_ANOTHER if the copy is of another base.
        """
        copy = context.copy
        if copy is not None and copy.fingerprint != context.spec.fingerprint:
            return self._attach_recovered(model, context.spec, copy)
        try:
            return Lora(self.settings.lora).attach(model, context, resumed)
        except SettingsError as error:
            raise _inside_loram(error) from error

    def check_targets(self, spec: BaseSpec) -> None:
        """Refuse settings that do not fit a copy, given its facts alone.

        Raises: SettingsError with reason NO_SUCH_MODULE or RANK_TOO_LARGE, naming the field.
        """
        try:
            resolve_targets(self.settings.lora, spec)
        except SettingsError as error:
            raise _inside_loram(error) from error

    def _attach_recovered(self, model: PreTrainedModel, spec: BaseSpec, copy: PrunedCopy) -> AttachedRecovered:
        if copy.original_fingerprint != spec.fingerprint:
            message = f"the copy that was trained on was made of {copy.original_fingerprint}, not {spec.fingerprint}"
            raise CheckpointError(message, reason="CHECKPOINT_OF_ANOTHER", field="base")
        manifest = copy.manifest()
        kept = {} if manifest is None else kept_by_path(manifest, spec)
        adapted: dict[str, RecoveredLinear] = {}
        for path, target in resolve_targets(self.settings.lora, spec).items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)  # the facts of the base say so
            of = kept.get(path, WHOLE)
            adapted[path] = RecoveredLinear(linear, of, rank=target.rank, scaling=target.scaling)
            model.set_submodule(path, adapted[path])
        return AttachedRecovered(spec, adapted, copy, kept)


class AttachedRecovered(AttachedLora):
    """The factors of a copy inside its original."""

    def __init__(
        self,
        spec: BaseSpec,
        adapted: Mapping[str, RecoveredLinear],
        copy: PrunedCopy,
        kept: Mapping[str, KeptChannels],
    ) -> None:
        super().__init__(spec, adapted, None)
        self._copy = copy
        self._kept = kept

    def write(self, directory: Path, provenance: Mapping[str, object]) -> str:
        """Scatter the factors to the original's shapes and write them as kind loram, and return the digest."""
        pairs = {
            path: recover(
                LoraPair(lora.lora_a.detach(), lora.lora_b.detach(), lora.scaling),
                self._kept.get(path, WHOLE),
                *self._spec.linears[path],
            )
            for path, lora in self._adapted.items()
        }
        write_peft_lora(directory, pairs)
        manifest = self._copy.manifest()
        write_loram_manifest(
            directory,
            self._spec,
            trained_on=self._copy.fingerprint,
            prune_manifest=None if manifest is None else write_cut(directory, manifest),
            provenance={**provenance, **self.facts(), "copy": dict(self._copy.facts)},
        )
        return inspect_adapter(directory, self._spec).spec.digest


def _inside_loram(error: SettingsError) -> SettingsError:
    """Name a field of the LoRA as it is reached from the spec."""
    assert error.field is not None  # a LoRA's settings are refused by their names
    message = error.message.replace(error.field, f"loram.{error.field}", 1)
    return SettingsError(message, reason=error.reason, field=f"loram.{error.field}")
