"""The section on structural pruning: what was done, in which order it is told, and what has to be known to read it.

Owns words; every number comes from the result file.
"""

from __future__ import annotations

from statistics import fmean

from claims import claims_table
from pruning_claims import list_claims, list_claims_elsewhere
from pruning_plan import ACROSS, ENDS_WHOLE, LOCAL, MAIN, NUM_WINDOWS, Cell
from pruning_tables import choices_table, cuts_table, figures_table, gone, heads_gone, recovery_table
from readings import Reading
from tables import paragraph, perplexity


def pruning_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## Structural pruning (LLM-Pruner)",
        _opening(reading),
        claims_table(list_claims(reading)),
        _reading_the_claims(reading),
        "### Other cuts",
        _elsewhere(reading),
        claims_table(list_claims_elsewhere(reading)),
        "### What was cut",
        cuts_table(reading),
        _sizes(reading),
        _texts(reading),
        "### What is left",
        "Perplexity of held-out prose: the mean over the seeds, the least and the greatest. Nothing was trained yet.",
        figures_table(reading, "perplexity"),
        "Answers of the known skills that are right, on held-out words:",
        figures_table(reading, "skills"),
        "![What is left, by criterion and cut](../benchmarks/results/quality_pruning.png)",
        "### Recovered",
        _recovery(reading),
        recovery_table(reading),
        "### What the choice hangs on",
        paragraph(
            f"""Of the groups that go, how many `param_first` on {NUM_WINDOWS} windows would have kept. Where more
            windows were read, those {NUM_WINDOWS} are among them."""
        ),
        choices_table(reading),
        "### What this cannot tell",
        _limits(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    machine = reading["machine"]
    return paragraph(
        f"""Whole heads and FFN channels are taken out, those whose loss is estimated to cost least
        ([arXiv:2305.11627](https://arxiv.org/abs/2305.11627); `motley base prune`). Measured by
        `python benchmarks/quality/pruning.py` on {machine["cores"]} cores of an {machine["cpu"]}
        ({machine["processes"]} processes of one thread, torch {machine["torch"]})."""
    )


def _reading_the_claims(reading: Reading) -> str:
    quarter, half = (gone(reading, cut) for cut in ENDS_WHOLE)
    return paragraph(
        f"""The paper's figures are of LLaMA-7B with 20% of its parameters gone and its ends whole: perplexity on
        WikiText-2 in windows of 128 tokens, and the mean over seven tasks. In place of the tasks stand the skills that
        the base knows, each answer right as a whole or wrong. Unless a claim says otherwise it was looked at with the
        ends whole, as in the paper, at {quarter} and at {half} of the parameters gone. Where all answers are right on
        both sides, nothing can be decided."""
    )


def _elsewhere(reading: Reading) -> str:
    heads = "; ".join(
        f"at {gone(reading, cut)} "
        + ", ".join(f"`{name}` {_reach(heads_gone(reading, Cell(cut, name)))}" for name in MAIN)
        for cut in ACROSS
    )
    return paragraph(
        f"""What was claimed of one criterion and another, at the other cuts: in every layer, the ends too, and across
        layers, where three of the criteria were measured. Across layers a criterion also chooses
        how many key-value heads go: {heads}. A head is many channels, so what differs there is not the order within a
        layer alone."""
    )


def _reach(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _sizes(reading: Reading) -> str:
    setting, costs = reading["setting"], reading["costs"]
    left = [costs[cut]["parameters"] for cut in LOCAL]
    return paragraph(
        f"""The whole base has {setting["layers"]} layers with {setting["kv_heads"]} key-value heads and
        {setting["ffn_channels"]} FFN channels each ([its card](../bases/motley_bases/assets/tiny/README.md)). A quarter
        of two heads is none, so the smaller cuts take channels alone, but for those across layers; a half is one head,
        and the query heads that read it. With the ends whole, {left[0] - left[1]:,} and {left[2] - left[3]:,} more
        parameters go than with a cut in every layer, since channels are whole. Across layers, all groups compete, and
        sizes depend on the criterion: those above are `l2`'s. Bytes are those of the base as it is loaded; FLOPs are
        counted as it runs, with explicit attention."""
    )


def _texts(reading: Reading) -> str:
    setting = reading["setting"]
    recovery = setting["recovery"]
    return paragraph(
        f"""Each of {len(reading["seeds"])} seeds draws its own text from the base's generator:
        {setting["learned_letters"]:,} letters to learn from, half prose and half lines of the known skills, of which
        {NUM_WINDOWS} random windows of {setting["window"]} tokens are the calibration; {setting["evaluation_windows"]}
        windows of other prose for perplexity; and for each of {setting["skills"]} skills {setting["words_per_skill"]}
        words that no skill line to learn from may have. Recovery is {recovery["steps"]} steps of a rank-8 LoRA on all
        Linears of the layers, {recovery["rows"]} windows a step, at a learning rate of {recovery["rate"]:g} (the better
        of two that were tried), merged and rounded to bfloat16."""
    )


def _recovery(reading: Reading) -> str:
    before, after = (
        perplexity(fmean(reading.figures(Cell(recovered=trained), "perplexity"))) for trained in (False, True)
    )
    return paragraph(
        f"""A window may begin in the middle of a document, as no text did that the base was trained on. Training on
        such windows therefore helps the whole base too, from {before} to {after}: what recovery gives back has to be
        read beside the first line here. The claims do so: pruned over the whole base, recovered over the whole base
        with the same training."""
    )


def _limits(reading: Reading) -> str:
    num = len(reading["seeds"])
    return paragraph(
        f"""There is one base: the {num} seeds are {num} texts, and draws from them, not {num} models. All text comes
        from one generator. Recovery trains on text like that which perplexity is then measured on: how a recovered
        base does on other text is not known. Calibration and evaluation are not alike: half of what is calibrated on
        are skill lines, in which the loss, and so every gradient, also counts the word that is asked about, which the
        base never learned to predict; perplexity is of prose alone. If two sides differed by luck alone, a claim would
        be held in up to 3 cases of 16, and reversed in as many; some
        of so many lines will be."""
    )
