"""The section on LoRAM: what was done, in which order it is told, and what has to be known to read it.

Owns words; every number comes from the result file.
"""

from __future__ import annotations

from fractions import Fraction

from claims import claims_table
from loram_claims import list_claims
from loram_plan import (
    MIDDLE,
    QLORAM,
    RANK,
    RATES,
    RATIOS,
    SKILL,
    STRUCTURED,
    WHOLE,
    Lesson,
    chosen_rate,
    cut_layers,
    list_lessons,
)
from loram_tables import alignments_table, gone, lesson_name, lessons_table, rates_table, trained
from measured_on import measured_on
from readings import Reading
from tables import paragraph


def loram_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## LoRAM: trained on a smaller copy",
        _opening(reading),
        claims_table(list_claims(reading)),
        _reading_the_claims(),
        "### What was trained",
        _training(reading),
        _alignment(reading),
        _rates(reading),
        alignments_table(reading),
        rates_table(reading),
        "### On the copy, and on the base",
        _measuring(),
        lessons_table(reading),
        f"![Losses over ratios, on the copy and on the base](../benchmarks/results/{reading.name}.png)",
        "### What this cannot tell",
        _limits(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    return paragraph(
        f"""A LoRA is trained on a pruned copy of the base, and its factors are then scattered to the base's own shapes,
        with zeros where something was left out ([arXiv:2502.13533](https://arxiv.org/abs/2502.13533); the method
        `loram` of `motley train`). Measured by `python benchmarks/quality/loram.py` {measured_on(reading)}."""
    )


def _reading_the_claims() -> str:
    return paragraph(
        f"""The paper's figures are of LLaMA-2 with 13 billion parameters, tuned on OpenHermes, and answers of GSM8K
        unless a claim says otherwise; its perplexities before and after recovery are of LLaMA-2 with 70 billion. Here
        one skill is learned, `{SKILL}`, which puts another letter in the place of each; an answer is right as a whole
        or wrong, and losses are those of the answers to words that no line to learn from had. The untuned base gives no
        answer of the skill's form, so that it is easily passed by in loss. Where all or none are right on both sides,
        only the loss can decide."""
    )


def _training(reading: Reading) -> str:
    setting = reading["setting"]
    return paragraph(
        f"""Every adapter comes out of a training job, run in the measuring process by the trainer's own code:
        {setting["steps"]} steps of {setting["rows"]} lines in float32, AdamW and a linear schedule with a tenth of
        warm-up, rank {RANK} on all Linears. {len(reading["seeds"])} seeds draw their own lines, and what else is
        random. Of {setting["layers"]} layers {setting["layers"] - 2} are cut (`{cut_layers(setting["layers"])}`). Each
        has {setting["kv_heads"]} key-value heads and {setting["ffn_channels"]} FFN channels: {_and(RATIOS)} of the
        channels go, and of the heads as many as are whole in that, which is {_heads_gone(setting["kv_heads"])}.
        *Structured* takes those whose loss the first lines estimate to cost least, *random* any. *Unstructured* and
        *4:8* set single weights to zero by SparseGPT on the same lines; they keep all shapes, train as many numbers as
        a LoRA, and need no recovery beyond putting the same factors beside the base's weights. On the base a LoRA has
        {trained(reading, WHOLE)} numbers, on a structured copy at {MIDDLE}
        {trained(reading, Lesson(STRUCTURED, MIDDLE))}. NF4 is QLoRAM: the copy is held in 4 bits while it is trained
        on, and the base it is measured on in float32 like the others."""
    )


def _alignment(reading: Reading) -> str:
    aligned = reading["setting"]["alignment"]
    return paragraph(
        f"""Alignment trains the copy before, on plain text of the base's own generator: half prose and half lines of
        the skills that the base knows, {aligned["letters"]:,} letters, of which {aligned["steps"]} steps see
        {aligned["rows"]} windows of {aligned["window"]} tokens each. *Plain* trains every weight but those that give
        the logits, in float32, as the paper does; *LoQT* trains them with the Linears in NF4, a low-rank factor of each
        at a time, merged every 15 steps at first, at {MIDDLE} alone. The adapter's factors then learn beside weights
        that the base does not have."""
    )


def _rates(reading: Reading) -> str:
    unlike: dict[tuple[str, str | None, str], Lesson] = {}
    for lesson in list_lessons():
        unlike.setdefault((lesson.way, lesson.alignment, lesson.quantization), lesson)
    ends = (RATES[0], RATES[-1])
    at_end = [lesson_name(_at_middle(one)) for one in unlike.values() if chosen_rate(reading["trials"], one) in ends]
    told = f"At the end of what was tried lies the choice for {_and(at_end, '; ')}." if at_end else ""
    return paragraph(
        f"""Rates were chosen under a seed that nothing else was measured by, each as the one with the least loss on the
        base, which is after recovery: first that of the alignment, with the copy at {MIDDLE} and {RATES[1]:g} for the
        factors, then that of the factors. What was chosen at {MIDDLE} holds for the other ratios too. A rate that is
        best on the base need not be on the copy. {told}"""
    )


def _at_middle(lesson: Lesson) -> Lesson:
    """Return what a rate was chosen on."""
    return lesson if lesson.ratio is None else Lesson(lesson.way, MIDDLE, lesson.alignment, lesson.quantization)


def _measuring() -> str:
    return paragraph(
        """On the base is what the job's own gate measured, with the recovered adapter. On the copy is what the same
        factors did before: the copy is loaded from the job's folder as it was trained on, with the factors of the
        job's last checkpoint. The loss of prose is that of the base or the copy alone, on held-out text. P is how many
        numbers are trained. The mean over the seeds, the least and the greatest."""
    )


def _limits(reading: Reading) -> str:
    lost = ", ".join(f"{gone(reading, Lesson(STRUCTURED, ratio))} at {ratio}" for ratio in RATIOS)
    return paragraph(
        f"""There is one small base. Where one of {reading["setting"]["kv_heads"]} key-value heads of a layer goes, so
        does {1 / reading["setting"]["kv_heads"]:.0%} of its patterns of attention, and no ratio between takes a share
        of them: it is a coarser cut than of a model with many heads. Of
        all parameters a structured copy lacks {lost}; the copy in NF4 ({lesson_name(QLORAM)}) as many, each of the rest
        in fewer bits. The text of an alignment comes from the generator that the base was trained on, which no other
        base can count on. `{SKILL}` needs little but what a token is turned into; a skill that needs other patterns of
        attention may be lost in other ways. The paper's alignment sees 100 million tokens. After so
        few steps a training may not have got going at all, whatever was left out, and one such seed of five weighs most
        in a mean: hence the wide spreads."""
    )


def _heads_gone(num_heads: int) -> str:
    return _and([f"{int(num_heads * Fraction(ratio))} at {ratio}" for ratio in RATIOS])


def _and(names: list[str] | tuple[str, ...], comma: str = ", ") -> str:
    return names[0] if len(names) == 1 else f"{comma.join(names[:-1])} and {names[-1]}"
