"""The section on S2FT and LoRA: what was done, in which order it is told, and what has to be known to read it.

Owns words; every number comes from the result file.
"""

from __future__ import annotations

from statistics import fmean

from claims import claims_table
from measured_on import measured_on
from readings import Reading
from s2ft_claims import list_claims
from s2ft_plan import (
    CONTENT,
    FUSED,
    KNOWN_EVERY,
    LORA,
    LORA_THERE,
    METHODS,
    RANK,
    RANK_THERE,
    S2FT,
    SELECTIONS,
    SKILLS,
    Fusion,
    chosen_rate,
    rates_of,
)
from s2ft_tables import fusions_table, methods_table, num_parameters, rates_table, selections_table
from tables import number, paragraph


def s2ft_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## S2FT against LoRA",
        _opening(reading),
        claims_table(list_claims(reading)),
        _reading_the_claims(reading),
        "### What was trained",
        _training(reading),
        _rates(reading),
        rates_table(reading),
        "### Learned and forgotten",
        _methods(reading),
        methods_table(reading),
        "### Which channels",
        _selections(reading),
        selections_table(reading),
        "### Two at once",
        _fusions(reading),
        fusions_table(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    return paragraph(
        f"""Whole heads and FFN channels are chosen, and a dense block on each is trained with full rank
        ([arXiv:2412.06289](https://arxiv.org/abs/2412.06289); the method `s2ft` of `motley train`), beside low-rank
        factors of as many numbers (`lora`). Measured by `python benchmarks/quality/s2ft.py`
        {measured_on(reading)}."""
    )


def _reading_the_claims(reading: Reading) -> str:
    return paragraph(
        f"""The paper's figures are of LLaMA-3-8B: the mean over eight sets of commonsense questions, then over seven of
        arithmetic. Here an answer is right as a whole or wrong, and losses are those of the answers to words that no
        line to learn from had. Where all or none are right on both sides, only the loss can decide. Of the skills,
        `{CONTENT}` puts another letter in the place of each; `{SKILLS[1]}` has letters read in another order, which
        takes other patterns of attention. S2FT on `o_proj` and `down_proj` changes what is written, and where a head
        looks only through what the layers before wrote."""
    )


def _training(reading: Reading) -> str:
    setting = reading["setting"]
    sizes = {way: num_parameters(reading, way) for way in METHODS}
    return paragraph(
        f"""Every adapter comes out of a training job, run in the measuring process by the trainer's own code:
        {setting["steps"]} steps of {setting["rows"]} lines in float32, AdamW and a linear schedule with a tenth of
        warm-up. {len(reading["seeds"])} seeds draw their own lines, and what else is random. S2FT trains {sizes[S2FT]}
        numbers: {setting.get("o_heads", 2)} of {setting["heads"]} heads in `o_proj` and
        {setting.get("down_channels", 77)} of {setting["ffn_channels"]} channels in `down_proj`, in each of
        {setting["layers"]} layers. LoRA of rank {RANK} on all Linears trains {sizes[LORA]}, and of rank
        {RANK_THERE} on the two that S2FT has {sizes[LORA_THERE]}. What scores channels by activations or gradients sees
        64 lines of the training data. For each skill {setting["asked"]} words are asked; {setting["known_asked"]}
        answers of the skills that the base knows, and {setting["prose_letters"]:,} letters of prose, tell what is
        left of those."""
    )


def _rates(reading: Reading) -> str:
    at_edge = [
        f"{way} on `{skill}`" if way in METHODS[:2] else f"S2FT, {way}, on `{skill}`"
        for way, skill in (*((way, skill) for skill in SKILLS for way in METHODS), *_others())
        if chosen_rate(reading["trials"], way, skill) in (rates_of(way)[0], rates_of(way)[-1])
    ]
    told = f"At the end of what was tried lies the choice for {_and(at_edge)}." if at_edge else ""
    return paragraph(
        f"""Each way and skill had three learning rates to choose from, around what did best in a first look, and took
        the one with the least loss on held-out words under a seed that nothing else was measured by. {told} What is
        fused was trained at the rate of `{CONTENT}`. Beside each loss stands that of the base's own skills after this
        training: a greater rate learns more, up to a point, and forgets more."""
    )


def _methods(reading: Reading) -> str:
    return paragraph(
        """Trained on lines of one skill and on nothing else, an adapter may well answer everything as that skill: what
        is left of the base's own skills, by the loss of their answers, and of its prose. The mean over the seeds, the
        least and the greatest."""
    )


def _selections(reading: Reading) -> str:
    return paragraph(
        f"""The same on `{CONTENT}` by which channels are trained, with the least or the greatest score; random is the
        line of the table above."""
    )


def _fusions(reading: Reading) -> str:
    shared = fmean(reading.figures(Fusion(S2FT), "shared", part="fusions"))
    return paragraph(
        f"""`{FUSED[0]}` and `{FUSED[1]}`, trained apart and summed with weights of 1. For this, one line in
        {KNOWN_EVERY} to learn from was of a skill that the base knows, so that an adapter does its own where it is
        asked for. With the same seed both have the same channels, {number(shared)} in all; disjoint ones are those that
        `disjoint_from` leaves. A LoRA has no channels, and is on all Linears."""
    )


def _others() -> list[tuple[str, str]]:
    return [(way, CONTENT) for way in SELECTIONS if way != S2FT]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
