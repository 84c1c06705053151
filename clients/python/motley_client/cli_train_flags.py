"""The flags that say how a job trains.

Owns how those flags are called (scripts rely on it); what they make is in `cli_train_settings` and `cli_train_submit`.
Knows no server, and loads no gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from motley_client.types_training_methods import (
    ChannelBudget,
    ChannelOrder,
    ChannelScore,
    GoatScale,
    GoatScaleRank,
    GoatSegments,
    LoqtDecomposition,
    LoqtOptimizer,
    LoqtSchedule,
    LoramPruning,
    TrainingMethod,
)
from motley_client.types_training_spec import LearningRateSchedule, OverLength

# The panels of the help, by which it is known whose a flag is.
PUBLISHING, GATE, STEPS = "What becomes of it", "What it is measured by", "How it trains"
RANK, FACTORS = "Of --method lora, goat, loram and loqt", "Of --method lora, goat and loram"
LORA, S2FT, GOAT, LORAM = "Of --method lora and loram", "Of --method s2ft", "Of --method goat", "Of --method loram"
START, LOQT = "Of --method loqt", "Of --method loqt, and of loram with --align-by-loqt"


def _flag(help: str, panel: str, metavar: str | None = None, name: str | None = None) -> Any:
    names = [] if name is None else [name]
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True, slots=True)
class TrainingFlags:
    """What was said of a job; None, empty and False are what nobody said."""

    adapter: Annotated[str | None, _flag("The adapter that gets a new version.", PUBLISHING, "NAME")] = None
    alias: Annotated[
        list[str] | None, _flag("Point it at the version, not `default`; may be repeated.", PUBLISHING, "ALIAS")
    ] = None
    keep_aliases: Annotated[
        bool, _flag("Point no alias at it: NAME@N alone means it.", PUBLISHING, name="--keep-aliases")
    ] = False
    label: Annotated[list[str] | None, _flag("Label the version; may be repeated.", PUBLISHING, "KEY=VALUE")] = None
    eval: Annotated[str | None, _flag("Measure on this data, as DATA is given; else a part of DATA.", GATE, "FILE")] = (
        None
    )
    max_loss_ratio: Annotated[
        float | None, _flag("Publish if the loss is at most X times what it was (1).", GATE, "X")
    ] = None
    min_exact_match: Annotated[float | None, _flag("Publish if this share of answers is exactly right.", GATE, "X")] = (
        None
    )
    method: Annotated[
        TrainingMethod | None, _flag("How to train, and the adapter's kind; loqt makes a base.", STEPS)
    ] = None
    steps: Annotated[int | None, _flag("Steps of the optimizer.", STEPS, "N")] = None
    epochs: Annotated[float | None, _flag("Passes over the data (3).", STEPS, "E")] = None
    batch_size: Annotated[int | None, _flag("Samples a step (16).", STEPS, "N")] = None
    micro_batch_size: Annotated[int | None, _flag("Samples at once (the batch).", STEPS, "N")] = None
    lr: Annotated[float | None, _flag("The learning rate (2e-4).", STEPS, "X")] = None
    schedule: Annotated[LearningRateSchedule | None, _flag("How it goes on (linear).", STEPS)] = None
    warmup: Annotated[int | None, _flag("Steps of warm-up (a tenth, at most 100).", STEPS, "N")] = None
    max_length: Annotated[int | None, _flag("Tokens of a sample (512).", STEPS, "N")] = None
    over_length: Annotated[OverLength | None, _flag("What becomes of longer ones (truncate).", STEPS)] = None
    seed: Annotated[int | None, _flag("The same seed and data give the same adapter (0).", STEPS, "N")] = None
    quantization: Annotated[
        str | None, _flag("How to hold the base (as it is served; of loqt nf4).", STEPS, "none|nf4")
    ] = None
    checkpoint_steps: Annotated[int | None, _flag("Steps between checkpoints (50).", STEPS, "N")] = None
    rank: Annotated[
        int | None, _flag("The rank, of all experts together (8; of loqt a quarter of the hidden size).", RANK, "R")
    ] = None
    alpha: Annotated[
        float | None, _flag("The scale, over the rank, of goat an expert's (twice the rank).", FACTORS, "A")
    ] = None
    target: Annotated[
        list[str] | None, _flag("A Linear, by name or path (all of the layers); may be repeated.", FACTORS, "NAME")
    ] = None
    dropout: Annotated[float | None, _flag("Share of inputs left out (0; of goat 0.05).", FACTORS, "X")] = None
    rslora: Annotated[bool, _flag("Scale by alpha over the rank's root.", LORA, name="--rslora")] = False
    o_share: Annotated[float | None, _flag("Share of o_proj's heads (0.05 if none is said).", S2FT, "X")] = None
    down_share: Annotated[float | None, _flag("Share of down_proj's channels (0.02 likewise).", S2FT, "X")] = None
    score: Annotated[ChannelScore | None, _flag("How channels are scored (random).", S2FT)] = None
    order: Annotated[ChannelOrder | None, _flag("Which to take, by score (small).", S2FT)] = None
    budget: Annotated[ChannelBudget | None, _flag("Of what the shares are (layer).", S2FT)] = None
    disjoint_from: Annotated[
        list[str] | None, _flag("Take no channel of this adapter; may be repeated.", S2FT, "NAME")
    ] = None
    experts: Annotated[int | None, _flag("Experts of a Linear, which share the rank (8).", GOAT, "N")] = None
    top_k: Annotated[int | None, _flag("Experts that a token goes through (2).", GOAT, "K")] = None
    rho: Annotated[float | None, _flag("What divides what the experts begin as (10).", GOAT, "X")] = None
    segments: Annotated[GoatSegments | None, _flag("Where in the spectrum they begin (head).", GOAT)] = None
    scale: Annotated[GoatScale | None, _flag("What they are multiplied by (theoretical).", GOAT)] = None
    eta: Annotated[float | None, _flag("Of the theory: full fine-tuning's rate over --lr (1).", GOAT, "X")] = None
    rank_for_scale: Annotated[GoatScaleRank | None, _flag("Of the theory: which rank (expert).", GOAT)] = None
    balance_loss: Annotated[float | None, _flag("What the balance loss counts (1e-3; 0 is none).", GOAT, "X")] = None
    pruning: Annotated[LoramPruning | None, _flag("What goes while it trains (structured).", LORAM)] = None
    ratio: Annotated[str | None, _flag("How much of it goes, as 1/2 or 0.65 (1/2).", LORAM, "X")] = None
    layers: Annotated[
        str | None,
        _flag("Prune layers A to B - 1 (all; of whole heads all but the first 4 and the last 2).", LORAM, "A:B"),
    ] = None
    pattern: Annotated[str | None, _flag("Of semi-structured: keep N of every M (4:8).", LORAM, "N:M")] = None
    same_cut_as: Annotated[
        str | None, _flag("Prune what was pruned for this adapter, and nothing else.", LORAM, "NAME")
    ] = None
    align_with: Annotated[
        str | None, _flag("First train the pruned base on this plain text, as DATA is given.", LORAM, "FILE")
    ] = None
    align_steps: Annotated[int | None, _flag("Steps of that (100).", LORAM, "N")] = None
    align_learning_rate: Annotated[float | None, _flag("Its learning rate (5e-5).", LORAM, "X")] = None
    align_batch_size: Annotated[int | None, _flag("Samples a step of it (16).", LORAM, "N")] = None
    align_by_loqt: Annotated[
        bool, _flag("Hold it in NF4 for that, and train low-rank factors.", LORAM, name="--align-by-loqt")
    ] = False
    align_rank: Annotated[int | None, _flag("Their rank (a quarter of the hidden size).", LORAM, "R")] = None
    start: Annotated[
        str | None,
        _flag("Train on from BASE, which is served, or from drawn weights.", START, "BASE|scratch", "--from"),
    ] = None
    factor_scale: Annotated[float | None, _flag("What the factors' product counts (0.5).", LOQT, "X")] = None
    merge_interval: Annotated[
        int | None, _flag("Merge the factors after so many steps (100, or a fifth).", LOQT, "N")
    ] = None
    merge_schedule: Annotated[
        LoqtSchedule | None, _flag("How that goes on from merge to merge (exponential).", LOQT)
    ] = None
    growth: Annotated[float | None, _flag("The base of the powers (1.2), of linear the steps (100).", LOQT, "X")] = None
    compensation_steps: Annotated[
        int | None, _flag("Rounds in which factors take up what NF4 loses (5).", LOQT, "N")
    ] = None
    decomposition: Annotated[LoqtDecomposition | None, _flag("How directions are found (svd).", LOQT)] = None
    optimizer: Annotated[LoqtOptimizer | None, _flag("What steps are taken by (adamw).", LOQT)] = None
    keep_moments: Annotated[bool, _flag("Keep the optimizer's moments over a merge.", LOQT, name="--keep-moments")] = (
        False
    )

    def said(self, *panels: str) -> list[str]:
        """Return the flags of these panels, or of all, that were said, by their names."""
        hints = get_type_hints(TrainingFlags, include_extras=True)
        return [
            _called(hints[one.name].__metadata__[0], one.name)
            for one in fields(self)
            if not any(getattr(self, one.name) is nothing for nothing in (None, False))
            and getattr(self, one.name) != []
            and (not panels or hints[one.name].__metadata__[0].rich_help_panel in panels)
        ]


def _called(option: OptionInfo, name: str) -> str:
    """Return what a flag is called: the name that it was given, found as a default here, or the field's."""
    return option.default if isinstance(option.default, str) else "--" + name.replace("_", "-")
