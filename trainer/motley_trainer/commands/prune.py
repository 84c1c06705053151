"""The command `motley base prune`: its flags, its progress bar and what it prints.

Imports torch when it is used. Runs on the main thread.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from motley_trainer.errors import SettingsError

if TYPE_CHECKING:
    from motley_trainer.pruning.prune import PruneReport

Word = TypeVar("Word", bound=StrEnum)

CRITERIA = "param_first|param_second|param_mix|vector|l1|l2|random"
AGGREGATIONS = "sum|mean|prod|max|first|last"
RULES = "llm-pruner|loram"

LayersOption = Annotated[
    str | None,
    typer.Option(metavar="A:B", help="Prune layers A to B - 1. Unset: all, under loram but the first 4 and last 2."),
]
SelectionOption = Annotated[
    str, typer.Option(metavar="local|global", help="Let groups compete within their layer, or across all.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to estimate costs on, and to recover with.")
]
EvaluationOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Other text for perplexity; else a fifth of the calibration.")
]


def prune(
    name: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint's directory, or an embedded base.")],
    ratio: Annotated[str, typer.Option(metavar="R", help="Take this share of a pruned layer's heads and channels.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the pruned base here.")],
    layers: LayersOption = None,
    rule: Annotated[str, typer.Option(metavar=RULES, help="Round to whole heads and channels so.")] = "llm-pruner",
    criterion: Annotated[str, typer.Option(metavar=CRITERIA, help="Estimate costs so.")] = "param_first",
    aggregation: Annotated[str, typer.Option(metavar=AGGREGATIONS, help="Join a group's members so.")] = "sum",
    selection: SelectionOption = "local",
    calibration: CalibrationOption = None,
    evaluation: EvaluationOption = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Calibrate on this many windows of text.")] = 10,
    window: Annotated[int, typer.Option(metavar="T", help="A window is this many tokens.")] = 64,
    steps: Annotated[int, typer.Option(metavar="N", help="Prune in this many steps, estimating anew at each.")] = 1,
    multiple: Annotated[int, typer.Option(metavar="N", help="Keep FFN widths that are multiples of this.")] = 1,
    recover_steps: Annotated[int, typer.Option(metavar="N", help="Train what is left for so many steps.")] = 0,
    recover_rate: Annotated[float, typer.Option(metavar="LR", help="The learning rate of these steps.")] = 1e-4,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same base.")] = 0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write BASE with whole heads and FFN channels taken out of its layers: a smaller base of its own."""
    from motley_trainer.device import parse_device
    from motley_trainer.pruning.aggregation import Aggregation
    from motley_trainer.pruning.counting import CountingRule
    from motley_trainer.pruning.prune import prune_base
    from motley_trainer.pruning.saliency import Criterion
    from motley_trainer.pruning.settings import PruneSettings, RecoverySettings, Selection, parse_layers, parse_ratio

    first_layer, end_layer = (None, None) if layers is None else parse_layers(layers)
    settings = PruneSettings(
        ratio=parse_ratio(ratio),
        first_layer=first_layer,
        end_layer=end_layer,
        rule=_word(CountingRule, rule, "rule"),
        criterion=_word(Criterion, criterion, "criterion"),
        aggregation=_word(Aggregation, aggregation, "aggregation"),
        selection=_word(Selection, selection, "selection"),
        steps=steps,
        multiple=multiple,
        seed=seed,
        num_windows=windows,
        window=window,
        recovery=RecoverySettings(steps=recover_steps, learning_rate=recover_rate),
    )
    with ProgressBar() as bar:
        report = prune_base(
            name,
            settings,
            out,
            calibration=calibration,
            evaluation=evaluation,
            device=parse_device(device),
            watcher=bar,
        )
    typer.echo(json.dumps(_json(report)) if json_output else "\n".join(_lines(report)))


class ProgressBar:
    """Show each stage as a bar on stderr, where that is a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, stage: str, num_steps: int) -> None:
        """Start the bar of a stage."""
        self._task = self._progress.add_task(stage, total=num_steps)

    def advance(self) -> None:
        """Move the bar by one step."""
        self._progress.advance(self._task)


def _word(words: type[Word], text: str, field: str) -> Word:
    try:
        return words(text)
    except ValueError as error:
        known = ", ".join(words)
        raise SettingsError(f"{field} {text!r} is none of {known}", reason="UNKNOWN_WORD", field=field) from error


def _lines(report: PruneReport) -> list[str]:
    """Tell what was made, a fact a line."""
    before, after = report.num_parameters_before, report.num_parameters_after
    lines = [
        f"{report.directory}: {report.fingerprint}",
        f"parameters: {before:,} before, {after:,} after ({after / before:.2%})",
        f"heads and channels: {float(report.ratio_asked):.2%} asked to go, {float(report.ratio_gone):.2%} of their "
        "parameters gone",
        f"layers: {_layers(report)}",
        _perplexity_line(report),
    ]
    if report.num_unlike_first_order is not None:
        lines.append(f"second order: {report.num_unlike_first_order} groups kept that the first order would not have")
    if report.recovered is not None and report.recovered.digest is not None:
        lines.append(f"recovery: step {report.recovered.best_step} merged, {report.recovered.digest}")
    return lines + [f"warning: {warning}" for warning in _warnings(report)]


def _perplexity_line(report: PruneReport) -> str:
    before, pruned, trained = report.perplexity_before, report.perplexity_pruned, report.perplexity_recovered
    if before is None or pruned is None:
        return "perplexity: not measured, as there was no text"
    told = f"perplexity: {before:.3f} before, {pruned:.3f} pruned"
    if trained is not None:
        told += f", {trained:.3f} {'recovered' if trained < pruned else 'after the recovery steps'}"
    return f"{told} ({report.num_evaluation_windows} windows)"


def _warnings(report: PruneReport) -> list[str]:
    """Tell in what the recovery did not do what it is for."""
    if report.recovered is None:
        return []
    if report.recovered.digest is None:
        return ["no recovery step lowered the loss of the validation windows: nothing was merged"]
    before, pruned, trained = report.perplexity_before, report.perplexity_pruned, report.perplexity_recovered
    if before is None or pruned is None or trained is None:
        return []
    if not trained < pruned:
        return [f"the recovery steps did not help: perplexity is {trained:.3f}, not lower than {pruned:.3f} without"]
    if not trained < before:
        return [f"recovery is partial: perplexity is {trained:.3f}, not lower than {before:.3f} before pruning"]
    return []


def _layers(report: PruneReport) -> str:
    """Tell the layers' sizes, those that follow one another and are alike together."""
    runs: list[tuple[int, int, Any]] = []
    for layer, shape in enumerate(report.shapes.layers):
        if runs and runs[-1][2] == shape:
            runs[-1] = (runs[-1][0], layer, shape)
        else:
            runs.append((layer, layer, shape))
    return "; ".join(
        f"{first}{'' if first == last else f'-{last}'}: {shape.num_heads} heads over {shape.num_kv_heads}, "
        f"{shape.ffn_size} channels"
        for first, last, shape in runs
    )


def _json(report: PruneReport) -> dict[str, object]:
    return {
        "directory": str(report.directory),
        "fingerprint": report.fingerprint,
        "num_parameters_before": report.num_parameters_before,
        "num_parameters_after": report.num_parameters_after,
        "ratio_asked": float(report.ratio_asked),
        "ratio_gone": float(report.ratio_gone),
        **report.shapes.to_config(),
        "perplexity_before": report.perplexity_before,
        "perplexity_pruned": report.perplexity_pruned,
        "perplexity_recovered": report.perplexity_recovered,
        "num_evaluation_windows": report.num_evaluation_windows,
        "num_unlike_first_order": report.num_unlike_first_order,
        "recovery": None if report.recovered is None else report.recovered.digest,
        "warnings": _warnings(report),
    }
