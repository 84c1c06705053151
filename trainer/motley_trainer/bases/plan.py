"""What fits: a base's weights, keys and values, and adapters, held against an amount of memory.

Counts come from the bases' ledger; this is what is asked of it and how the answer reads. Reads a config, never weights.
Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from motley_bases.admission import check_config, check_stored_config
from motley_bases.checkpoint import find_base, read_config
from motley_bases.describe import context_length
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import choose_dtype, read_parsed_config
from motley_bases.pruned import register_pruned
from motley_bases.quantization import AUTO, CONFIG_FIELD, choose_quantization, stored_quantization

from motley_trainer.errors import SettingsError

MAX_RANK = 4096
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be held, and where.

    Semantics: `dtype` and `quantize` as `motley serve` takes them. `context` is in tokens; None is the base's own.
    """

    base: str
    memory_bytes: int
    dtype: str = AUTO
    quantize: str = AUTO
    device: str = "cpu"
    context: int | None = None
    ranks: tuple[int, ...] = (8, 16, 64)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What LoRAs of one rank on all Linears of the layers take, and how many fit beside one full context."""

    rank: int
    adapter_bytes: int
    num_adapters: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits into memory. Units: bytes, tokens.

    Semantics: `left_bytes` is below zero where the weights alone do not fit. `kv_tokens` is with no adapter,
    `num_contexts` how many full contexts that is. There are no `ranks` where no Linear of the layers takes an adapter.
    """

    dtype: str
    quantization: str
    device: str
    memory_bytes: int
    weight_bytes: int
    left_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    context: int
    num_contexts: int
    ranks: tuple[RankPlan, ...]

    @property
    def fits(self) -> bool:
        """Tell whether there is room for the weights."""
        return self.left_bytes >= 0


def make_plan(question: Question) -> Plan:
    """Tell what fits.

    Raises: SettingsError for a context, rank or device that cannot be; BaseError for a base that cannot be served, or
    not so.
    """
    directory = find_base(question.base)
    register_pruned()
    check_stored_config(read_config(directory))
    config = read_parsed_config(directory)
    check_config(config)
    longest = context_length(config)
    _check(question, longest)
    context = question.context or longest
    device = torch.device(question.device)
    stored = stored_quantization(getattr(config, CONFIG_FIELD, None))
    quantization = choose_quantization(question.quantize, stored)
    dtype = choose_dtype(question.dtype, directory, config, device)
    ledger = make_ledger(config, Weights(dtype, quantization, device))
    left = question.memory_bytes - ledger.weight_bytes
    beside_context = max(0, left - context * ledger.kv_bytes_per_token)
    kv_tokens = ledger.kv_tokens(left)
    return Plan(
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        device=question.device,
        memory_bytes=question.memory_bytes,
        weight_bytes=ledger.weight_bytes,
        left_bytes=left,
        kv_bytes_per_token=ledger.kv_bytes_per_token,
        kv_tokens=kv_tokens,
        context=context,
        num_contexts=kv_tokens // context,
        ranks=tuple(
            RankPlan(rank, ledger.adapter_bytes(rank), beside_context // ledger.adapter_bytes(rank))
            for rank in question.ranks
            if ledger.linears
        ),
    )


def plan_lines(question: Question, plan: Plan) -> Sequence[str]:
    """Return what a person reads."""
    how = plan.dtype if plan.quantization == "none" else f"{plan.quantization} computed in {plan.dtype}"
    lines = [
        f"{question.base}, {how}, on {plan.device}",
        f"weights      {show_bytes(plan.weight_bytes)} of {show_bytes(plan.memory_bytes)}",
        f"KV cache     {show_bytes(plan.kv_bytes_per_token)} a token, "
        f"{show_bytes(plan.context * plan.kv_bytes_per_token)} a context of {plan.context}",
    ]
    if not plan.fits:
        return [*lines, f"does not fit: {show_bytes(-plan.left_bytes)} are missing for the weights alone"]
    lines.append(
        f"left         {show_bytes(plan.left_bytes)}: {plan.kv_tokens} tokens of KV cache, {plan.num_contexts} contexts"
    )
    lines += [
        f"rank {entry.rank:<8}{show_bytes(entry.adapter_bytes)} an adapter on all Linears of the layers; "
        f"{entry.num_adapters} beside one context"
        for entry in plan.ranks
    ]
    if not plan.ranks:
        lines.append("adapters     none: no Linear of its layers takes one")
    return [*lines, "What a step works with comes on top."]


def show_bytes(num_bytes: int) -> str:
    """Return a number of bytes as a person reads it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def _check(question: Question, longest: int) -> None:
    if question.context is not None and not 1 <= question.context <= longest:
        message = f"{question.context} is not from 1 to the base's {longest}"
        raise SettingsError(message, reason="CONTEXT", field="context")
    for rank in question.ranks:
        if not 1 <= rank <= MAX_RANK:
            raise SettingsError(f"{rank} is not from 1 to {MAX_RANK}", reason="RANK", field="rank")
    if question.device not in DEVICES:
        message = f"{question.device!r} is none of {', '.join(DEVICES)}"
        raise SettingsError(message, reason="DEVICE", field="device")
