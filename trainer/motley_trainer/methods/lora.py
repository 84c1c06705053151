"""The method `lora`: low-rank factors beside chosen Linears, written as PEFT writes them.

Owns which Linears are meant, at which rank and scale. The factors are float32 on every base, quantized or not. Runs on
the thread that owns the model.
Source: LoRA, arXiv:2106.09685; rank-stabilized LoRA, arXiv:2312.03732; QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from motley_adapters.kinds.lora import KIND
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import read_adapter
from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch
from motley_trainer.methods.adapted_linear import disabled
from motley_trainer.methods.lora_linear import LoraLinear
from motley_trainer.methods.method import Context
from motley_trainer.methods.targets import check_rank, longest_key, named_linears, refuse_idle
from motley_trainer.spec.settings import LoraSettings, derived_seed

_DROPS = "dropout_state"


@dataclass(frozen=True, slots=True)
class Target:
    """One Linear's factors: their rank, and what their product is multiplied by."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class Lora:
    """Train a LoRA."""

    settings: LoraSettings

    def attach(self, model: PreTrainedModel, context: Context, resumed: Mapping[str, Tensor] | None) -> AttachedLora:
        """Put factors beside the Linears that are meant.

        Raises: SettingsError with reason NO_SUCH_MODULE or RANK_TOO_LARGE, naming the field.
        """
        initial = torch.Generator().manual_seed(derived_seed(context.seed, "lora"))
        drops = torch.Generator(device=model.device).manual_seed(derived_seed(context.seed, "dropout"))
        if resumed is not None and _DROPS in resumed:
            drops.set_state(resumed[_DROPS])
        adapted: dict[str, LoraLinear] = {}
        for path, target in resolve_targets(self.settings, context.spec).items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)  # the facts of the base say so
            adapted[path] = LoraLinear(
                linear,
                rank=target.rank,
                scaling=target.scaling,
                initial=initial,
                dropout=self.settings.dropout,
                drops=drops,
            )
            model.set_submodule(path, adapted[path])
        return AttachedLora(context.spec, adapted, drops if self.settings.dropout > 0 else None)


class AttachedLora:
    """A LoRA's factors inside a model."""

    def __init__(self, spec: BaseSpec, adapted: Mapping[str, LoraLinear], drops: torch.Generator | None) -> None:
        self._spec = spec
        self._adapted = adapted
        self._drops = drops
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{path}.{name}": factor
            for path, lora in adapted.items()
            for name, factor in (("lora_a", lora.lora_a), ("lora_b", lora.lora_b))
        }

    def buffers(self) -> Mapping[str, Tensor]:
        """Return the state of what dropout draws from."""
        return {} if self._drops is None else {_DROPS: self._drops.get_state()}

    def extra_loss(self, batch: Batch) -> None:
        """Add nothing to the loss."""

    def report(self) -> Mapping[str, object]:
        """Tell nothing."""
        return {}

    def write(self, directory: Path, provenance: Mapping[str, object]) -> str:
        """Write the directory that PEFT loads, with a manifest beside, and return the adapter's digest."""
        pairs = {path: LoraPair(lora.lora_a, lora.lora_b, lora.scaling) for path, lora in self._adapted.items()}
        write_peft_lora(directory, pairs)
        digest = read_adapter(directory, self._spec).spec.digest
        manifest = Manifest(KIND, self._spec.fingerprint, self._spec.fingerprint, digest)
        write_manifest(directory, manifest, {}, {**provenance, **self.facts()})
        return digest

    def facts(self) -> Mapping[str, object]:
        """Return how many parameters are trained, and in how many Linears."""
        num_parameters = sum(factor.numel() for factor in self.parameters.values())
        return {"num_trained_parameters": num_parameters, "num_modules": len(self._adapted)}

    def disabled(self) -> AbstractContextManager[None]:
        """Make the model the base alone for a while."""
        return disabled(self._adapted.values())


def resolve_targets(settings: LoraSettings, spec: BaseSpec) -> dict[str, Target]:
    """Return the Linears that settings mean, by path in the base's order, with the rank and scale of each.

    Semantics: a name means every Linear whose path ends with it at a dot, a whole path that one alone. Of several keys
    of a pattern that mean one Linear the longest counts, as it says the most.
    Raises: SettingsError with reason NO_SUCH_MODULE or RANK_TOO_LARGE, naming the field.
    """
    paths = named_linears(settings.target_modules, spec, "lora.target_modules")
    for name, keys in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        refuse_idle(keys, paths, f"lora.{name}", "no Linear that is adapted")
    return {path: _target(path, settings, spec) for path in paths}


def _target(path: str, settings: LoraSettings, spec: BaseSpec) -> Target:
    rank_key, alpha_key = longest_key(path, settings.rank_pattern), longest_key(path, settings.alpha_pattern)
    rank = settings.rank if rank_key is None else settings.rank_pattern[rank_key]
    alpha = settings.alpha if alpha_key is None else settings.alpha_pattern[alpha_key]
    check_rank(rank, path, spec, "lora.rank" if rank_key is None else f'lora.rank_pattern["{rank_key}"]')
    return Target(rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank))
