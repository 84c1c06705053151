"""S2FT: whole heads and FFN channels are chosen, and a dense block on each is trained with full rank.

What is written has indices in the base's own numbers, so it is served on the base as it is. Runs on the thread that
owns the model.
Source: S2FT, arXiv:2412.06289.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from motley_adapters.kinds import s2ft as kind
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.reader import inspect_adapter
from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch
from motley_trainer.errors import SettingsError
from motley_trainer.methods.adapted_linear import disabled
from motley_trainer.methods.channel_linear import ChannelLinear
from motley_trainer.methods.method import Context
from motley_trainer.methods.s2ft_scores import score_sites
from motley_trainer.methods.s2ft_selection import random_scores, select_items
from motley_trainer.methods.s2ft_sites import Place, Site, sites_of
from motley_trainer.spec.settings import ChannelScore, S2ftSettings, derived_seed


class S2ft:
    """Train chosen channels of o_proj and down_proj, and of v_proj and up_proj where that is asked for."""

    def __init__(self, settings: S2ftSettings) -> None:
        self._settings = settings

    def attach(
        self, model: PreTrainedModel, context: Context, resumed: Mapping[str, Tensor] | None
    ) -> AttachedChannels:
        """Choose channels, or take those of a checkpoint, and put a block beside each Linear that has some.

        Raises: UnsuitableBaseError with reason NO_CHANNELS; SettingsError with reason NOT_ENOUGH_CHANNELS, or NOT_S2FT
        for an adapter in `disjoint_from` that has no channels; and what reading such an adapter does.
        """
        places = [(place, share) for place, share in self._shares() if share > 0]
        sites = {site.path: site for place, _ in places for site in sites_of(context.spec, place)}
        if resumed is None:
            channels = self._choose(model, context, places)
        else:
            channels = {sites[name.removesuffix(CHANNELS)]: tensor for name, tensor in resumed.items()}
        model.requires_grad_(False)
        attached: dict[str, ChannelLinear] = {}
        for site in sorted(channels, key=lambda site: site.path):
            linear = model.get_submodule(site.path)
            assert isinstance(linear, nn.Linear)  # the base's facts say so
            attached[site.path] = ChannelLinear(linear, site.place.side, channels[site])
            model.set_submodule(site.path, attached[site.path])
        return AttachedChannels(context.spec, attached, self._settings)

    def _shares(self) -> Sequence[tuple[Place, float]]:
        asked = self._settings
        return (
            (Place.O_PROJ, asked.o_share),
            (Place.DOWN_PROJ, asked.down_share),
            (Place.V_PROJ, asked.v_share),
            (Place.UP_PROJ, asked.up_share),
        )

    def _choose(
        self, model: PreTrainedModel, context: Context, places: Sequence[tuple[Place, float]]
    ) -> dict[Site, Tensor]:
        asked = self._settings
        claimed = _claimed(context, asked.disjoint_from)
        chosen: dict[Site, Tensor] = {}
        for place, share in places:
            sites = sites_of(context.spec, place)
            if asked.score is ChannelScore.RANDOM:
                scores = random_scores(sites, derived_seed(context.seed, "channels", place))
            else:
                scores = score_sites(
                    model,
                    context.spec,
                    sites,
                    asked.score,
                    lambda: context.calibration(asked.calibration_samples),
                )
            taken = {site: _items(site, claimed.get((site.path, place.side), frozenset())) for site in sites}
            items = select_items(sites, scores, share, asked.budget, asked.order, taken)
            chosen |= {site: site.channels(of_site) for site, of_site in items.items()}
        return chosen


CHANNELS = ".channels"


class AttachedChannels:
    """The blocks of one training."""

    def __init__(self, base: BaseSpec, linears: Mapping[str, ChannelLinear], settings: S2ftSettings) -> None:
        self._base = base
        self._linears = linears
        self._settings = settings

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the blocks."""
        return {f"{path}.block": linear.block for path, linear in self._linears.items()}

    def buffers(self) -> Mapping[str, Tensor]:
        """Return the channels."""
        return {f"{path}{CHANNELS}": linear.channels for path, linear in self._linears.items()}

    def extra_loss(self, batch: Batch) -> Tensor | None:
        """Return nothing: the task's loss is all."""
        return None

    def report(self) -> Mapping[str, object]:
        """Tell nothing."""
        return {}

    def write(self, directory: Path, provenance: Mapping[str, object]) -> str:
        """Write an S2FT directory, and return its digest."""
        blocks = {
            path: ChannelBlock(linear.side, linear.channels.to("cpu", torch.int32), linear.block.detach().cpu())
            for path, linear in self._linears.items()
        }
        return write_s2ft(directory, self._base, blocks, provenance={**provenance, **self.facts()})

    def facts(self) -> Mapping[str, object]:
        """Return how many channels of how many Linears were chosen, and how, and how many parameters that is."""
        asked = self._settings
        is_scored = asked.score is not ChannelScore.RANDOM
        needs_samples = is_scored and asked.score is not ChannelScore.WEIGHT
        return {
            "num_trained_parameters": sum(linear.block.numel() for linear in self._linears.values()),
            "num_modules": len(self._linears),
            "num_channels": sum(len(linear.channels) for linear in self._linears.values()),
            "shares": self._shares(),
            "selection": str(asked.score),
            "order": str(asked.order) if is_scored else None,
            "budget": str(asked.budget),
            "calibration_samples": asked.calibration_samples if needs_samples else 0,
            "disjoint_from": list(asked.disjoint_from),
        }

    def _shares(self) -> Mapping[str, float]:
        """Return which share of its channels each place trains: what was asked for, in whole heads and channels."""
        shares = {}
        for place in Place:
            ends = f".{place.value}"
            if chosen := sum(len(linear.channels) for path, linear in self._linears.items() if path.endswith(ends)):
                total = sum(site.num_items * site.item_size for site in sites_of(self._base, place))
                shares[place.value] = chosen / total
        return shares

    def disabled(self) -> AbstractContextManager[None]:
        """Make the model the base alone for a while."""
        return disabled(self._linears.values())


def _claimed(context: Context, names: Sequence[str]) -> dict[tuple[str, str], frozenset[int]]:
    """Return the channels of the adapters that must not be touched, by path and side."""
    claimed: dict[tuple[str, str], frozenset[int]] = {}
    for index, (name, directory) in enumerate(zip(names, context.adapters, strict=True)):
        spec = inspect_adapter(directory, context.spec).spec
        if spec.kind != kind.KIND:
            message = f"{name} is of kind {spec.kind}: only adapters of kind {kind.KIND} have channels"
            raise SettingsError(message, reason="NOT_S2FT", field=f"s2ft.disjoint_from[{index}]")
        for path, channels in spec.channels.items():
            known = claimed.get((path, channels.side), frozenset())
            claimed[path, channels.side] = known.union(channels.indices)
    return claimed


def _items(site: Site, channels: frozenset[int]) -> frozenset[int]:
    """Return the items that have one of these channels at least."""
    return frozenset(channel // site.item_size for channel in channels)
