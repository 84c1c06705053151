"""The section on LoQT: what was done, in which order it is told, and what has to be known to read it.

Owns words; every number comes from the result file.
"""

from __future__ import annotations

from claims import claims_table
from loqt_claims import list_claims
from loqt_plan import CONTINUED, FULL, GROWTH, KEPT_MOMENTS, LOQT, NEVER, RATES, SCRATCH, chosen_rate
from loqt_tables import STARTS, rate, rates_table, ways_table
from measured_on import measured_on
from readings import Reading
from tables import paragraph


def loqt_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## LoQT against full training",
        _opening(reading),
        claims_table(list_claims(reading)),
        _reading_the_claims(),
        "### How whole bases were trained",
        _training(reading),
        _rates(reading),
        rates_table(reading),
        "### What they came to",
        _ways(),
        ways_table(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    return paragraph(
        f"""The Linears of the layers are held in NF4, and of each only one low-rank factor learns at a time, which is
        merged into the weights again and again ([arXiv:2405.16528](https://arxiv.org/abs/2405.16528); the method `loqt`
        of `motley train`). What comes out is a base and no adapter. Measured by `python benchmarks/quality/loqt.py`
        {measured_on(reading)}."""
    )


def _reading_the_claims() -> str:
    return paragraph(
        """The paper's figures are perplexities on C4 of LLaMA models trained from nothing, of 60M, 130M, 350M and 1B
        parameters; ours are losses (nats a token) of a text with little to learn, after a small share of the steps that
        the base itself was made with. Which optimizer's step is the better one early says little of where a long
        training ends. GaLore and ReLoRA, which the paper compares with too, are not in this repository."""
    )


def _training(reading: Reading) -> str:
    setting = reading["setting"]
    return paragraph(
        f"""The text is the base's own prose, which is an eighth of what it has learned: a sentence a sample, drawn
        anew for each of {len(reading["seeds"])} seeds, {setting["rows"]} samples a step. On from the base
        {setting["steps"][CONTINUED]} steps are taken, and {setting["steps"][SCRATCH]} from the drawn weights of a base
        that is half as wide and half as deep, or it would get nowhere in so few. A tenth is warm-up, then comes a
        cosine. The rank is a quarter of the hidden size, and the first merge comes after
        {setting["intervals"][SCRATCH]} steps from scratch and {setting["intervals"][CONTINUED]} from the base; each
        later interval is that, and {GROWTH["growth"]:g} to the power of the merges so far. LoQT comes out of a training
        job; full training is the same loop with AdamW on every weight in float32. Both are measured as the base that
        they write, in bfloat16, on {setting["held_out"]} sentences that no sample has."""
    )


def _rates(reading: Reading) -> str:
    at_edge = [
        f"{way} {STARTS[start]}"
        for (start, way), rates in RATES.items()
        if chosen_rate(reading["trials"], start, way) in (rates[0], rates[-1])
    ]
    told = f"At the end of what was tried lies the choice for {' and '.join(at_edge)}." if at_edge else ""
    return paragraph(
        f"""Full training and LoQT had three learning rates each to choose from, under a seed that nothing else was
        measured by. {told} Every other kind of LoQT learns at LoQT's rate, {rate(reading, SCRATCH)} and
        {rate(reading, CONTINUED)}, which may not be its own best."""
    )


def _ways() -> str:
    return paragraph(
        f"""The mean over the seeds, the least and the greatest. `{NEVER}` chooses its factors before the first step and
        keeps them: a LoRA of this rank on a quantized base, of which one factor learns; its embeddings and norms learn
        as everybody's do.
        `{KEPT_MOMENTS}` keeps the optimizer's moments over a merge, as the authors' code does; `{LOQT}` and all others
        begin them anew. `{FULL}` has no merges to count."""
    )
