"""The section on GOAT: what was done, in which order it is told, and what has to be known to read it.

Owns words; every number comes from the result file.
"""

from __future__ import annotations

from math import sqrt

from claims import claims_table
from goat_claims import list_claims
from goat_plan import (
    BALANCE,
    EXPERTS,
    GOAT,
    IDLE,
    LORA,
    LORA_LARGE,
    PLAIN_SCALE,
    RANK,
    RANK_LARGE,
    RATES,
    RHO,
    SKILL,
    TARGETS,
    TOP_K,
    chosen_rate,
)
from goat_tables import balance_table, count, methods_table, rates_table, segments_table, sweep_table
from measured_on import measured_on
from readings import Reading
from tables import paragraph


def goat_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## GOAT against LoRA",
        _opening(reading),
        claims_table(list_claims(reading)),
        _reading_the_claims(reading),
        "### What was trained with experts",
        _training(reading),
        _rates(reading),
        rates_table(reading),
        "### Experts beside one LoRA",
        paragraph(
            """Each way at its own rate: the mean over the seeds, the least and the greatest. Numbers of a LoRA are all
            in A and B."""
        ),
        methods_table(reading),
        "### Two scales over learning rates",
        _sweep(reading),
        sweep_table(reading),
        f"![Loss and right answers by learning rate and scale](../benchmarks/results/{reading.name}.png)",
        "### Where tokens go",
        _balance(reading),
        balance_table(reading),
        "### Which directions of the spectrum",
        _segments(reading),
        segments_table(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    return paragraph(
        f"""A rank is split among experts, each begun from another slice of the weight's spectrum, among which a router
        chooses token by token, and multiplied by a scale worked out beforehand
        ([arXiv:2502.16894](https://arxiv.org/abs/2502.16894); the method `goat` of `motley train`). Measured by
        `python benchmarks/quality/goat.py` {measured_on(reading)}."""
    )


def _reading_the_claims(reading: Reading) -> str:
    return paragraph(
        f"""The paper's figures are of CLIP ViT-B/32 on seven sets of images; then, where there are four, of LLaMA-2-7B
        on arithmetic and on eight sets of commonsense questions, and of RoBERTa-large on seven of GLUE. Here one skill
        is learned, `{SKILL}`, which puts another letter in the place of each; an answer is right as a whole or wrong,
        and losses are those of the answers to words that no line to learn from had. All are after
        {reading["setting"]["steps"]} steps, at which the loss may still be falling: a lower one tells first of all who
        learns faster. Ways that have a rate of their own are compared each at the best of those tried."""
    )


def _training(reading: Reading) -> str:
    setting = reading["setting"]
    scales = " and ".join(f"{_scale(side):.1f} where it has {side}" for side in setting["sides"])
    return paragraph(
        f"""Adapters come out of training jobs, run in the measuring process by the trainer's own code:
        {setting["steps"]} steps of {setting["rows"]} lines in float32, AdamW and a linear schedule with a tenth of
        warm-up, on {_and([f"`{name}`" for name in TARGETS])} of each of {setting["layers"]} layers.
        {len(reading["seeds"])} seeds draw their own lines, and what else is random; {setting["asked"]} words are asked.
        GOAT has {EXPERTS} experts that share a rank of {RANK}, of which a token goes through {TOP_K}, rho {RHO}, and no
        dropout, as the LoRA has none. That is {count(reading, GOAT)} numbers in A and B, as in a LoRA of rank {RANK}
        ({count(reading, LORA)}); the routers' {count(reading, GOAT, "router_parameters")} come on top, for which a LoRA
        of rank {RANK_LARGE} stands in, with {count(reading, LORA_LARGE)} in all. The theoretical scale is
        sqrt(3n/d), d being an expert's rank and n what a Linear reads: {scales}. The plain one is {PLAIN_SCALE}, alpha
        over the rank of all experts together, as the LoRA's. The released scripts have alpha over one expert's rank,
        which was not measured. A mixture from zero is GOAT but for its start, which the trainer does not have: each A
        as a LoRA's, each B zero, and no residual. That start alone is the measuring script's; what follows is the
        trainer's."""
    )


def _rates(reading: Reading) -> str:
    at_edge = [way for way, tried in RATES.items() if chosen_rate(reading["trials"], way) in _ends(tried)]
    told = f"At the end of what was tried lies the choice for {_and(at_edge)}." if at_edge else ""
    return paragraph(
        f"""Each way had a few learning rates to choose from, around what did best in a first look, and took the one
        with the least loss on held-out words under a seed that nothing else was measured by. {told} The larger LoRA
        has the smaller one's rate, and what differs from GOAT by its balance loss or its directions has GOAT's."""
    )


def _sweep(reading: Reading) -> str:
    rate = chosen_rate(reading["trials"], GOAT)
    return paragraph(
        f"""Both scales at the same rates, all seeds. The scale is also in the start, where it takes from A and B what
        it gives to their product, so that both begin from the same outputs. AdamW steps by as much whatever the size of
        a gradient, so a greater scale acts much as a greater rate does: to compare at one rate alone would be to
        compare rates. The table above has each at its best; for the theoretical scale that is {rate:g}."""
    )


def _balance(reading: Reading) -> str:
    return paragraph(
        f"""The balance loss adds, for each Linear, how unevenly tokens are spread, times {BALANCE:g}. Shares are of the
        tokens of all steps, padding left out, as a job reports them; an even one is {1 / EXPERTS:.1%}. An expert's
        least and greatest share are the mean over the Linears, then those of all of them. Effective experts are one
        over the sum of the squared shares, in the mean: {EXPERTS} where all shares are even. Idle is an expert with
        less than {IDLE / EXPERTS:.2%} of the tokens; there are {_num_experts(reading)} in all."""
    )


def _segments(reading: Reading) -> str:
    return paragraph(
        f"""GOAT whose experts begin from other directions of each weight's spectrum: the {RANK} of the largest singular
        values, those of the smallest, or of blocks drawn at random. All at GOAT's rate,
        {chosen_rate(reading["trials"], GOAT):g}."""
    )


def _scale(in_features: int) -> float:
    return sqrt(3 * in_features * EXPERTS / RANK)


def _num_experts(reading: Reading) -> int:
    return int(reading["setting"]["layers"]) * len(TARGETS) * EXPERTS


def _ends(tried: tuple[float, ...]) -> tuple[float, float]:
    return tried[0], tried[-1]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
