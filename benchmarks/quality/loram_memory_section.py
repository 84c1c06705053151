"""The section on the memory of LoRAM: claims, what was counted beside its formulas, and what a process had resident.

Owns words and tables; every number comes from the result file, or from the plan's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from claims import Claim, Finding, claims_table
from loram_memory_plan import (
    CELLS,
    NF4,
    RATIO,
    Cell,
    kept_bytes,
    num_parameters,
    num_trained,
    state_bytes,
    weight_bytes,
)
from readings import Reading
from tables import megabytes, number, paragraph, spread, table

QLORAM = Cell(is_copy=True, dtype="bfloat16", quantization=NF4)
HOW = ("counted", "resident")


def loram_memory_section(reading: Reading) -> str:
    """Write the section."""
    return "\n\n".join([
        "## Memory of LoRAM",
        _opening(reading),
        claims_table(_list_claims(reading)),
        _reading_the_claims(),
        "### Counted, by what is trained on",
        _counting(),
        _counts_table(reading),
        "### Resident",
        _measuring(reading),
        _resident_table(reading),
    ])  # fmt: skip


def _opening(reading: Reading) -> str:
    machine, setting = reading["machine"], reading["setting"]
    return paragraph(
        f"""What training a LoRA holds on a base, on its copy without {RATIO} of the heads and channels of every layer,
        and on that copy in 4 bits: the random Llama of {number(num_parameters(Cell(is_copy=False)))} parameters and the
        batch of the section above ({setting["layers"]} layers, hidden size {setting["hidden"]}; {setting["rows"]}
        samples of {setting["length"]} tokens). Measured by `python benchmarks/quality/loram_memory.py` on an
        {machine["cpu"]} (a process of one thread for each line, torch {machine["torch"]})."""
    )


def _list_claims(reading: Reading) -> list[Claim]:
    pairs = [(Cell(is_copy=True, dtype=dtype), Cell(is_copy=False, dtype=dtype)) for dtype in ("float32", "bfloat16")]
    return [
        Claim(
            "LoRAM takes less than a LoRA on the base",
            "29,799 MiB against 51,661 MiB (13B, 0.65 left out)",
            [_finding(reading, how, *pair) for how in HOW for pair in pairs],
            megabytes,
        ),
        Claim(
            "QLoRAM takes less than LoRAM",
            "weights of 13.08 GB against 52.34 GB (70B, 0.65 left out)",
            [_finding(reading, how, QLORAM, pairs[-1][0]) for how in HOW],
            megabytes,
        ),
    ]


def _reading_the_claims() -> str:
    return paragraph(
        """How much is saved depends on the batch: weights and what is trained have their size once, and what is kept
        for the backward pass has its size for each token, of which the copy saves what its Linears, its heads and its
        channels would have kept, and nothing of the hidden size. NF4 saves of the weights alone. What a job holds while
        it makes the copy is no part of this: for that the whole base is loaded. Single weights at zero, unstructured or
        4:8, save nothing: they are held and multiplied as others are."""
    )


def _counting() -> str:
    return paragraph(
        f"""Bytes of weights are P b_w, of the {number(num_parameters(CELLS[0]))} weights of the base and the
        {number(num_parameters(CELLS[1]))} of the copy; in NF4 each weight of the layers' Linears takes half a byte, 64
        of them a scale of one byte, 256 scales one of four bytes, and a Linear its tables; the embedding stays in
        bfloat16. What is trained
        is in float32 everywhere, with its gradients and AdamW's two moments, so 16 bytes for each number. What Linears
        keep is what they read, T I b_a, once for q, k and v and once for gate and up, and 4 T r of what lies between
        the factors. What is kept in all is found by hooks, as in the section above, and is not predicted."""
    )


def _counts_table(reading: Reading) -> str:
    rows = []
    for cell in CELLS:
        weights, trained, state, kept, by_linears = (
            _only(reading.figures(cell, name)) for name in ("weights", "trained", "state", "kept", "kept_by_linears")
        )
        rows.append([
            *_names(cell),
            *_beside(weights + _only(reading.figures(cell, "scales")), weight_bytes(cell)),
            *_beside(trained, num_trained(cell)),
            *_beside(state, state_bytes(cell)),
            *_beside(by_linears, kept_bytes(cell)),
            number(kept),
        ])  # fmt: skip
    formula = "by the formula"
    counted = ("bytes of weights", formula, "P trained", formula, "bytes of what is trained", formula)
    return table(("", "base", *counted, "bytes kept by Linears", formula, "kept in all"), rows)


def _measuring(reading: Reading) -> str:
    return paragraph(
        f"""By how much the process's resident memory was at most, over {reading["setting"]["steps"]} steps, above what
        it was before the base was loaded; a base of one layer had been trained in it then and was gone, so that what
        libraries load once does not count. The mean over {len(reading["seeds"])} processes, the least and the greatest.
        Beside it what is counted: weights, what is trained, its gradients and moments, and all that is kept. Gradients
        come while kept tensors go, and what an operation works with, or what is left of loading, is in no count, so
        that a process may lie on either side."""
    )


def _resident_table(reading: Reading) -> str:
    rows = []
    for cell in CELLS:
        beside = Cell(is_copy=False, dtype=cell.dtype)
        shares = [
            "" if cell == beside else f"{fmean(_all(reading, cell, how)) / fmean(_all(reading, beside, how)):.2f}"
            for how in HOW
        ]
        counted, resident = (_all(reading, cell, how) for how in HOW)
        rows.append([*_names(cell), megabytes(_only(counted)), shares[0], spread(resident, megabytes), shares[1]])
    return table(("", "base", "counted", "of a LoRA's", "resident", "of a LoRA's"), rows)


def _finding(reading: Reading, how: str, one: Cell, other: Cell) -> Finding:
    return Finding(f"{how}, {one.dtype}", _all(reading, one, how), _all(reading, other, how))


def _all(reading: Reading, cell: Cell, how: str) -> Sequence[float]:
    """Return what all takes together, seed by seed."""
    if how == "resident":
        return reading.figures(cell, "resident")
    parts = [reading.figures(cell, name) for name in ("weights", "scales", "state", "kept")]
    return [sum(values) for values in zip(*parts, strict=True)]


def _names(cell: Cell) -> tuple[str, str]:
    base = cell.dtype if cell.quantization != NF4 else f"{NF4}, computed in {cell.dtype}"
    return cell.name, base


def _beside(measured: float, predicted: float) -> tuple[str, str]:
    return number(measured), f"{number(predicted)} ({measured / predicted:.4f})"


def _only(values: Sequence[float]) -> float:
    """Return what every seed gave alike."""
    (value,) = set(values)
    return value
