"""What structural pruning costs the embedded base: perplexity and skills by criterion and cut, bytes and FLOPs.

Every seed has texts of its own: one that is calibrated and recovered on, prose that perplexity is measured on, words
that skills are asked about. Pruned and trained in float32 on one thread, with the functions that `motley base prune`
calls; what is recovered is rounded to the base's bfloat16, as the command stores it. Bytes and FLOPs are those of
bases that the command's own function wrote.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pruning_plan as plan
import torch
from cells import Row, measure_cells, parse_options, write
from costs import CPU, forward_flops, sizes, weight_bytes
from embedded import NUM_SKILLS, Texts, draw_texts, known_skills_right, write_text
from motley_bases.checkpoint import resolve_base
from motley_bases.loader import load_model, load_tokenizer
from motley_bases.prune_manifest import LayerKeep
from motley_bases.quantization import NONE
from motley_trainer.pruning.iterative import Pruned, prune_in_steps
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.prune import prune_base
from motley_trainer.pruning.recovery import recover
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.settings import PruneSettings, RecoverySettings, Selection, parse_layers, parse_ratio
from motley_trainer.pruning.surgery import num_parameters
from motley_trainer.pruning.texts import CalibrationText, WindowedText, draw_calibration, read_windows
from subject import EMBEDDED
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECOVERY = RecoverySettings(
    steps=plan.RECOVERY_STEPS, batch_size=plan.RECOVERY_ROWS, learning_rate=plan.RECOVERY_RATE
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """The whole base and one seed's texts. Shapes: evaluation [N, T] token ids."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    learned: WindowedText
    evaluation: WindowedText
    seed: int

    def calibration(self, num_windows: int) -> CalibrationText:
        """Draw the windows to calibrate on; fewer are among more."""
        drawn, _ = draw_calibration(
            self.learned, self.evaluation, num_windows=num_windows, seed=self.seed, path=Path("learned.txt")
        )
        return drawn


@cache
def open_bench(seed: int) -> Bench:
    """Load the base and make one seed's texts, once in a process."""
    torch.set_num_threads(1)
    directory = resolve_base(EMBEDDED)
    tokenizer = load_tokenizer(directory)
    texts = draw_texts(
        seed,
        learned_letters=plan.LEARNED_LETTERS,
        held_out_letters=plan.EVALUATION_WINDOWS * plan.WINDOW,
        words_per_skill=plan.WORDS_PER_SKILL,
    )
    with tempfile.TemporaryDirectory() as folder:
        learned = read_windows(
            write_text(Path(folder, "learned.txt"), texts.learned), tokenizer, plan.WINDOW, field="calibration"
        )
        held_out = read_windows(
            write_text(Path(folder, "held_out.txt"), texts.held_out), tokenizer, plan.WINDOW, field="evaluation"
        )
    evaluation = WindowedText(held_out.windows[: plan.EVALUATION_WINDOWS], held_out.sha256)
    return Bench(load_model(directory, torch.float32, CPU, NONE), tokenizer, texts, learned, evaluation, seed)


def measure(cell: plan.Cell, seed: int) -> Row:
    """Measure one cell under one seed.

    Semantics: `unlike` counts the groups that go, where `param_first` on the fewer windows would have kept them.
    """
    bench = open_bench(seed)
    model = copy.deepcopy(bench.base)
    row: Row = {}
    if cell.cut is not None and cell.criterion is not None:
        pruned = prune(model, cell.cut, cell.criterion, bench, cell.windows)
        row["gone"] = len(groups_gone(pruned, bench.base))
        if cell.is_compared:
            usual = prune(copy.deepcopy(bench.base), cell.cut, "param_first", bench, plan.NUM_WINDOWS)
            row["unlike"] = len(groups_gone(pruned, bench.base) - groups_gone(usual, bench.base))
    if cell.recovered:
        recover(model, bench.learned.windows, RECOVERY, seed=seed)
        round_weights(model)
    return row | {
        "parameters": num_parameters(model),
        "perplexity": round(perplexity(model, bench.evaluation.windows), 4),
        "skills": round(known_skills_right(model, bench.tokenizer, bench.texts.words), 4),
    }


def prune(model: PreTrainedModel, cut: str, criterion: str, bench: Bench, num_windows: int) -> Pruned:
    """Prune a model in place, as `motley base prune` does it."""
    settings = make_settings(cut, criterion, bench.seed, num_windows)
    windows: Tensor = bench.calibration(num_windows).calibration
    return prune_in_steps(model, settings, windows)


def make_settings(cut: str, criterion: str, seed: int, num_windows: int = plan.NUM_WINDOWS) -> PruneSettings:
    """Return the settings that a cut's flags mean."""
    flags = plan.CUTS[cut]
    first_layer, end_layer = parse_layers(flags.layers)
    return PruneSettings(
        ratio=parse_ratio(flags.ratio),
        first_layer=first_layer,
        end_layer=end_layer,
        criterion=Criterion(criterion),
        selection=Selection(flags.selection),
        seed=seed,
        num_windows=num_windows,
        window=plan.WINDOW,
    )


def groups_gone(pruned: Pruned, base: PreTrainedModel) -> set[tuple[int, str, int]]:
    """Return which heads and channels are gone, by layer and number in the whole base."""
    heads, channels = range(base.config.num_key_value_heads), range(base.config.intermediate_size)
    whole = LayerKeep(ffn_channels=tuple(channels), kv_heads=tuple(heads))
    gone: set[tuple[int, str, int]] = set()
    for layer, keep in enumerate(pruned.layers):
        kept = keep or whole
        gone |= {(layer, "head", head) for head in set(heads) - set(kept.kv_heads)}
        gone |= {(layer, "channel", channel) for channel in set(channels) - set(kept.ffn_channels)}
    return gone


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Make every weight one that bfloat16 has."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def measure_costs() -> dict[str, Any]:
    """Write the base of every cut, and return what each takes.

    Semantics: pruned by `l2`, which needs no text; within layers, sizes do not depend on the criterion.
    """
    costs = {"whole": cost_of(resolve_base(EMBEDDED))}
    with tempfile.TemporaryDirectory() as folder:
        for name in plan.CUTS:
            report = prune_base(EMBEDDED, make_settings(name, "l2", 0), Path(folder, name))
            costs[name] = cost_of(report.directory)
            print(f"{name}: {costs[name]}", flush=True)
    return costs


def cost_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint takes once loaded."""
    flops = forward_flops(checkpoint, plan.WINDOW)
    return sizes(checkpoint) | {"bytes": asdict(weight_bytes(checkpoint)), "flops": asdict(flops)}


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    costs = measure_costs()
    cells = measure_cells(plan.list_cells(), measure, options)
    config = load_model(resolve_base(EMBEDDED), torch.float32, CPU, NONE).config
    setting = {
        "window": plan.WINDOW,
        "evaluation_windows": plan.EVALUATION_WINDOWS,
        "learned_letters": plan.LEARNED_LETTERS,
        "words_per_skill": plan.WORDS_PER_SKILL,
        "skills": NUM_SKILLS,
        "recovery": {"steps": RECOVERY.steps, "rows": RECOVERY.batch_size, "rate": RECOVERY.learning_rate},
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "ffn_channels": config.intermediate_size,
    }
    write("quality_pruning", {"setting": setting, "cells": cells, "costs": costs}, options)


if __name__ == "__main__":
    main()
