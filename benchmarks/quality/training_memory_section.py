"""The section on the memory of training: claims, what was counted beside its formulas, and by what a process grew.

Owns words and tables; every number comes from the result file, or from the plan's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from claims import Claim, Finding, claims_table
from readings import Reading
from tables import megabytes, number, paragraph, spread, table
from training_memory_plan import (
    CELLS,
    FROZEN,
    FULL,
    LORA,
    NUM_CHANNELS,
    NUM_HEADS,
    RANK,
    S2FT,
    Cell,
    kept_bytes,
    num_linear_weights,
    state_bytes,
)

QLORA = {Cell(LORA, "bfloat16", "nf4"): "QLoRA"}


def training_memory_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## Memory of training",
        _opening(reading),
        claims_table(_list_claims(reading)),
        _reading_the_claims(),
        "### Counted",
        _counting(reading),
        _counts_table(reading),
        "### Measured",
        _measuring(reading),
        _growth_table(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    machine, setting = reading["machine"], reading["setting"]
    weights = reading.figures(Cell(FULL), "trained")[0]
    return paragraph(
        f"""What a step of training holds beside the base, by method, on one model and one batch: a random Llama of
        {number(weights)} parameters ({setting["layers"]} layers, hidden size {setting["hidden"]}), and
        {setting["rows"]} samples of {setting["length"]} tokens, all learned. Measured by
        `python benchmarks/quality/training_memory.py` on an {machine["cpu"]} (a process of one thread for each line,
        torch {machine["torch"]})."""
    )


def _list_claims(reading: Reading) -> list[Claim]:
    return [
        Claim(
            f"training by S2FT takes less than {told}, weights and all",
            paper,
            [
                Finding(f"{how}, {cell.dtype}", _all(reading, Cell(S2FT, cell.dtype), how), _all(reading, cell, how))
                for how in ("counted", "measured")
                for cell in (Cell(method), Cell(method, "bfloat16"))
            ],
            megabytes,
        )
        for method, told, paper in (
            (FULL, "full fine-tuning", "up to 3 times less"),
            (LORA, "LoRA", "about 10% less"),
        )
    ]


def _reading_the_claims() -> str:
    return paragraph(
        """The paper's figures are of models of 7 and 13 billion parameters on a GPU. How much is saved depends on the
        batch: what is trained has its size once, and what is kept for the backward pass has its size for each token.
        Counted is the sum of weights, gradients, moments and kept tensors; measured, the weights and by how much a
        process grew."""
    )


def _counting(reading: Reading) -> str:
    return paragraph(
        f"""With their gradients and AdamW's two moments, P trained numbers take P (b_w + b_g + 2 b_m) bytes, b being
        those of one weight, gradient, moment or, below, activation. A LoRA's factors and S2FT's blocks are float32 on
        every base; full fine-tuning has all in the base's dtype. A LoRA of rank {RANK} on all Linears trains as many
        as S2FT on {NUM_HEADS} head and {NUM_CHANNELS} channels of each layer, whose Linears have
        {number(num_linear_weights())} weights together. For the backward pass, S2FT keeps T s b_a bytes of a layer,
        of T tokens and s channels. A LoRA and full fine-tuning keep what Linears read, T I b_a each, but once for q,
        k and v and once for gate and up; a LoRA also 4 T r of what lies between its factors, and full fine-tuning
        what its head reads. What is kept is found by hooks: every storage that autograd holds counts once, and the
        base's own do not. Attention, norms and products of two inputs keep the same for all, as the lines show on
        which nothing is trained and gradients only pass. A storage that two of them keep counts for both and once in
        all, as what `o_proj` reads does, which attention keeps too; and S2FT needs no gradient before the first
        `o_proj`, so that there it keeps nothing."""
    )


def _counts_table(reading: Reading) -> str:
    rows = []
    for cell in CELLS:
        figures = {
            name: _only(reading.figures(cell, name))
            for name in ("trained", "weights", "state", "kept", "kept_by_linears")
        }
        rows.append([
            *_names(cell),
            number(figures["weights"]),
            number(figures["trained"]),
            number(figures["state"]),
            _ratio(figures["state"], state_bytes(cell)),
            number(figures["kept"]),
            number(figures["kept_by_linears"]),
            _ratio(figures["kept_by_linears"], kept_bytes(cell)),
            number(_only(_all(reading, cell, "counted"))),
        ])  # fmt: skip
    head = ("trained by", "base", "bytes of the base", "P", "bytes of what is trained", "by the formula")
    return table((*head, "bytes kept in all", "by Linears", "by the formula", "all together"), rows)


def _measuring(reading: Reading) -> str:
    setting = reading["setting"]
    gpu = (
        "" if _has_gpu(reading) else " The measuring machine had no GPU, so torch's maximum there is not in the table."
    )
    return paragraph(
        f"""By how much the process grew at most over {setting["steps"]} steps: the high-water mark of its resident
        memory, begun anew before the first step, with what is freed given back at once. The mean over
        {len(reading["seeds"])} processes, the least and the greatest. Beside it what is counted of it: gradients,
        moments and kept tensors. Gradients come while kept tensors go, and what an operation works with is in no count,
        so that growth may lie on either side.{gpu}"""
    )


def _growth_table(reading: Reading) -> str:
    rows = []
    for cell in CELLS:
        grown = reading.figures(cell, "growth")
        row = [*_names(cell), spread(grown, megabytes), megabytes(_new(reading, cell))]
        for other in (FULL, LORA):
            beside = Cell(other, cell.dtype, cell.quantization)
            is_there = beside in CELLS and cell.method not in (other, FROZEN)
            shares = [one / all_of for one, all_of in zip(
                _all(reading, cell, "measured"), _all(reading, beside, "measured"), strict=True
            )] if is_there else []  # fmt: skip
            row.append(f"{fmean(shares):.2f}" if shares else "")
        if _has_gpu(reading):
            row.append(megabytes(fmean(reading.figures(cell, "cuda_growth"))))
        rows.append(row)
    head = ("trained by", "base", "grew by", "counted", "with the base, of full fine-tuning", "of LoRA")
    return table((*head, *(("torch's maximum on the GPU",) if _has_gpu(reading) else ())), rows)


def _names(cell: Cell) -> tuple[str, str]:
    base = cell.dtype if cell.quantization == "none" else f"{cell.quantization}, computed in {cell.dtype}"
    return QLORA.get(cell, cell.method), base


def _new(reading: Reading, cell: Cell) -> float:
    """Return what is counted of a step beyond what was held before: of what is trained a fourth was."""
    return 0.75 * _only(reading.figures(cell, "state")) + _only(reading.figures(cell, "kept"))


def _all(reading: Reading, cell: Cell, how: str) -> Sequence[float]:
    """Return what the base and a step take together, seed by seed."""
    held = reading.figures(cell, "weights")
    if cell.method != FULL:
        held = [base + state / 4 for base, state in zip(held, reading.figures(cell, "state"), strict=True)]
    if how == "measured":
        return [base + grown for base, grown in zip(held, reading.figures(cell, "growth"), strict=True)]
    return [base + _new(reading, cell) for base in held]


def _only(values: Sequence[float]) -> float:
    """Return what every seed gave alike."""
    (value,) = set(values)
    return value


def _ratio(measured: float, predicted: float) -> str:
    return f"{number(predicted)} ({measured / predicted:.4f})" if predicted else number(predicted)


def _has_gpu(reading: Reading) -> bool:
    return all("cuda_growth" in row for row in reading["cells"])
