"""The method `goat`: a mixture of low-rank experts beside chosen Linears, begun from slices of the base's spectrum.

Trained on the base as it is, quantized or not, with the correction that keeps the first output near the base's as a
residual of its own, so what is served is what was trained. Experts, routers and residuals are float32 on every base.
Checkpoints hold the residuals, so that no spectrum is taken twice in one job. Runs on the thread that owns the model.
Source: GOAT, arXiv:2502.16894, with its scale in the text's form and padding left out of what is balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from motley_adapters.kinds.goat import GoatModule, write_goat
from motley_adapters.reader import inspect_adapter
from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch
from motley_trainer.methods.adapted_linear import disabled
from motley_trainer.methods.goat_linear import GoatLinear
from motley_trainer.methods.goat_routing import balance_loss, count_picks, tokens_of
from motley_trainer.methods.goat_start import (
    blank_start,
    check_start,
    fresh_router,
    geometry_of,
    scales_of,
    sliced_start,
    spectrum_source,
)
from motley_trainer.methods.method import Context
from motley_trainer.methods.spectra import Spectra
from motley_trainer.methods.targets import named_linears
from motley_trainer.spec.settings import GoatScale, GoatSettings, derived_seed

_DROPS, _PICKS, _SOURCE = "dropout_state", "picks", "spectrum_source"
_SHARE_DIGITS = 6
_MAX_SHARES = 4096  # that a manifest has one by one: it has to stay small enough to be read


@dataclass(frozen=True, slots=True)
class Goat:
    """Train a mixture of experts."""

    settings: GoatSettings

    def attach(self, model: PreTrainedModel, context: Context, resumed: Mapping[str, Tensor] | None) -> AttachedGoat:
        """Put experts, a router and a residual beside the Linears that are meant.

        Raises: SettingsError with reason NO_SUCH_MODULE; RANK_TOO_LARGE for a Linear whose spectrum has no room for
        the experts; INVALID_GEOMETRY for settings that no reader lets through; or WEIGHT_TOO_LARGE where experts or
        residual would begin too large to be served; naming the field.
        """
        asked = self.settings
        paths = named_linears(asked.target_modules, context.spec, "goat.target_modules")
        scales = scales_of(asked, context.spec, paths)
        initial = torch.Generator().manual_seed(derived_seed(context.seed, "router"))
        drops = torch.Generator(device=model.device).manual_seed(derived_seed(context.seed, "dropout"))
        if resumed is not None and _DROPS in resumed:
            drops.set_state(resumed[_DROPS])
        spectra = Spectra(context.spectra)
        adapted: dict[str, GoatLinear] = {}
        for place, (path, scale) in enumerate(scales.items()):
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)  # the facts of the base say so
            router = fresh_router(asked.experts, linear.in_features, initial)
            if resumed is None:
                context.on_part("taking spectra", place, len(scales))
                start = sliced_start(
                    linear, path, asked, scale=scale, seed=context.seed, router=router, spectra=spectra
                )
                check_start(start, path, asked, scale)
            else:
                start = blank_start(router, resumed[f"{path}.residual_a"], resumed[f"{path}.residual_b"])
            adapted[path] = GoatLinear(
                linear,
                start,
                top_k=asked.top_k,
                scale=scale,
                residual_scaling=geometry_of(asked).residual_scaling,
                dropout=asked.dropout,
                drops=drops,
            )
            model.set_submodule(path, adapted[path])
        return AttachedGoat(context.spec, asked, adapted, drops, resumed)


class AttachedGoat:
    """The experts of one training."""

    def __init__(
        self,
        spec: BaseSpec,
        settings: GoatSettings,
        adapted: Mapping[str, GoatLinear],
        drops: torch.Generator,
        resumed: Mapping[str, Tensor] | None,
    ) -> None:
        self._spec = spec
        self._settings = settings
        self._adapted = adapted
        self._drops = drops
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{path}.{name}": parameter
            for path, goat in adapted.items()
            for name, parameter in (("goat_a", goat.goat_a), ("goat_b", goat.goat_b), ("router", goat.router))
        }
        if resumed is None:
            device = drops.device
            self._picks = torch.zeros(len(adapted), settings.experts, dtype=torch.int64, device=device)
            self._source = spectrum_source(spec)
        else:
            self._picks = resumed[_PICKS].to(drops.device, copy=True)
            self._source = bytes(resumed[_SOURCE].tolist()).decode()
        self._told = self._picks.clone()

    def buffers(self) -> Mapping[str, Tensor]:
        """Return the residuals, what dropout draws from, and where tokens went so far."""
        residuals = {
            f"{path}.{name}": factor
            for path, goat in self._adapted.items()
            for name, factor in (("residual_a", goat.residual_a), ("residual_b", goat.residual_b))
        }
        source = torch.tensor(list(self._source.encode()), dtype=torch.uint8)
        return {**residuals, _DROPS: self._drops.get_state(), _PICKS: self._picks, _SOURCE: source}

    def extra_loss(self, batch: Batch) -> Tensor | None:
        """Return the balance losses of all Linears, summed, times their coefficient, and count where tokens went.

        Semantics: each is of this forward pass's tokens, padding left out. Where a step has several, each counts by the
        share of the samples, so a step of micro-batches evens out each of them and not only their sum.
        """
        total = None
        for place, goat in enumerate(self._adapted.values()):
            routed = goat.take_routed()
            is_token = tokens_of(batch, len(routed.chosen))
            picks = count_picks(routed.chosen, goat.num_experts, is_token)
            self._picks[place] += picks
            if self._settings.balance_loss > 0:
                loss = balance_loss(routed, picks, is_token)
                total = loss if total is None else total + loss
        return None if total is None else total * self._settings.balance_loss

    def report(self) -> Mapping[str, object]:
        """Tell each expert's share of the tokens since the last report, by Linear."""
        picks = self._picks - self._told
        self._told = self._picks.clone()
        shares = self._shares(picks)
        return (
            {"routing": {"modules": {path: {"shares": of_path} for path, of_path in shares.items()}}} if shares else {}
        )

    def write(self, directory: Path, provenance: Mapping[str, object]) -> str:
        """Write a GOAT directory with its residual, read it as a server does, and return its digest.

        Raises: AdapterFormatError for what no server would take.
        """
        asked = self._settings
        modules = {
            path: GoatModule(
                a=goat.goat_a.detach().cpu(),
                b=goat.goat_b.detach().cpu(),
                router=goat.router.detach().cpu(),
                scale=goat.scale,
                residual_a=goat.residual_a.cpu(),
                residual_b=goat.residual_b.cpu(),
            )
            for path, goat in self._adapted.items()
        }
        is_theoretical = asked.scale is GoatScale.THEORETICAL
        write_goat(
            directory,
            self._spec,
            geometry_of(asked),
            modules,
            details={"eta": asked.eta, "rank_for_scale": str(asked.rank_for_scale)} if is_theoretical else {},
            provenance={**provenance, **self.facts()},
        )
        return inspect_adapter(directory, self._spec).spec.digest

    def facts(self) -> Mapping[str, object]:
        """Return how many parameters are trained, the routers' apart, of what spectrum, and where all tokens went.

        Semantics: of Linears whose weights are zero there is no spectrum: their experts begin at zero and stay there.
        """
        num_blank = sum(not bool(goat.residual_a.any()) for goat in self._adapted.values())
        num_of_routers = sum(goat.router.numel() for goat in self._adapted.values())
        num_parameters = sum(parameter.numel() for parameter in self.parameters.values())
        return {
            "num_trained_parameters": num_parameters,
            "num_expert_parameters": num_parameters - num_of_routers,
            "num_router_parameters": num_of_routers,
            "num_modules": len(self._adapted),
            "spectrum": self._source,
            "num_routed_tokens": int(self._picks.sum(1).max()) // self._settings.top_k,
            **self._spread(),
            **({"num_modules_without_spectrum": num_blank} if num_blank else {}),
        }

    def disabled(self) -> AbstractContextManager[None]:
        """Make the model the base alone for a while."""
        return disabled(self._adapted.values())

    def _spread(self) -> dict[str, object]:
        """Return every expert's share of all tokens, or of too many experts what of each Linear tells how even it is.

        Semantics: effective is how many experts an even spread that chance hits as often would have.
        """
        shares = self._shares(self._picks)
        if sum(map(len, shares.values())) <= _MAX_SHARES:
            return {"expert_shares": shares}
        even = {path: 1 / sum(share * share for share in of_path) for path, of_path in shares.items()}
        spread = {
            path: {"least": min(of_path), "greatest": max(of_path), "effective": round(even[path], 3)}
            for path, of_path in shares.items()
        }
        return {"expert_spread": spread}

    def _shares(self, picks: Tensor) -> dict[str, list[float]]:
        """Return the experts' shares of picks [M, E] by path, of the Linears that tokens went through."""
        rows = zip(self._adapted, picks.tolist(), strict=True)
        return {path: [round(n / sum(row), _SHARE_DIGITS) for n in row] for path, row in rows if sum(row)}
