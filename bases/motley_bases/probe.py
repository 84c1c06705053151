"""The start-up probe: whether a model, packed and paged, says what it says alone under its own attention.

It runs a handful of tokens through both, before any module is replaced, and learns on the way what no config says
reliably: each layer's heads and window as the attention really receives them, and which Linears see every token exactly
once. Runs on the thread that loads the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from motley_kernels.errors import KernelError
from motley_kernels.paged_attention import paged_attention
from motley_kernels.paged_attention.types import LayerKV, PagedBatch
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_bases.admission import declared_windows
from motley_bases.attention import ATTENTION_NAME, CONTEXT_KEYWORD
from motley_bases.errors import UnsupportedBaseError
from motley_bases.kv_cache import allocate_layer
from motley_bases.spec import LayerSpec

BLOCK_SIZE = 4
SMALL_WINDOW = (
    32  # a window up to this is crossed by the probe's own tokens; a larger one is checked as a declared fact
)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the logits' own spread


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe learned: each layer's attention, and the Linears an adapter can attach to."""

    layers: tuple[LayerSpec, ...]
    linears: frozenset[str]


@dataclass(eq=False)
class RecordingContext:
    """Attend like serving does, over blocks made as layers first call, and note how each layer calls."""

    num_blocks: int
    batch: PagedBatch
    layers: dict[int, LayerSpec] = field(default_factory=dict)
    blocks: dict[int, LayerKV] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Note the call, then attend over this probe's own blocks."""
        seen = LayerSpec(q.shape[1], k.shape[1], k.shape[2], sliding_window)
        if v.shape != k.shape:
            raise _unsupported(
                "HEAD_DIM", "v_head_dim", f"layer {layer} has keys of size {k.shape[2]}, values of size {v.shape[2]}"
            )
        if self.layers.setdefault(layer, seen) != seen:
            raise _unsupported(
                "LAYER_CHANGES", None, f"layer {layer} called attention as {self.layers[layer]}, then as {seen}"
            )
        if layer not in self.blocks:
            self.blocks[layer] = allocate_layer(seen, self.num_blocks, BLOCK_SIZE, k.dtype, k.device)
        self.calls[layer] += 1
        kv = self.blocks[layer]
        return paged_attention(q, k, v, kv, self.batch, scale=scale, sliding_window=sliding_window, softcap=softcap)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One packed pass: of each sequence, the tokens from `starts` up to `ends`."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]


def probe(model: PreTrainedModel) -> ProbeReport:
    """Compare two packed sequences, chunked and decoded, with each alone under eager attention.

    Effects: leaves the model set to our attention. Linears must not have been replaced yet.
    Raises: UnsupportedBaseError saying what differs, with the config field where one is at fault.
    """
    windows = declared_windows(model.config)
    small = [window for window in windows if window is not None and window <= SMALL_WINDOW]
    lengths = (min(small) + 3, max(min(small) + 1, 3)) if small else (9, 6)
    sequences = _sequences(model, lengths)
    with torch.inference_mode():
        _set_attention(model, "eager")
        expected = [_run_alone(model, ids) for ids in sequences]
        _set_attention(model, ATTENTION_NAME)
        context, rows_seen, packed = _run_packed(model, sequences)
    _check_layers(model, context, windows)
    for alone, together in zip(expected, packed, strict=True):
        _check_logits(model, alone, together)
    return ProbeReport(
        layers=tuple(context.layers[layer] for layer in sorted(context.layers)),
        linears=frozenset(path for path, is_faithful in rows_seen.items() if is_faithful),
    )


def _sequences(model: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    """Make token ids that differ within and between sequences, the same ones for the same vocabulary."""
    vocab_size = int(model.config.vocab_size)
    ids = (torch.arange(1, 1 + sum(lengths)) * 7919 % vocab_size).to(model.device)
    return list(torch.split(ids, list(lengths)))


def _set_attention(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    if getattr(model.config, "_attn_implementation", None) != name:
        raise _unsupported(
            "OWN_ATTENTION",
            "architectures",
            f"{type(model).__name__} keeps its own attention, which would let packed sequences see each other",
        )


def _run_alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids), device=ids.device)
    return _logits(model, ids, positions, torch.arange(len(ids), device=ids.device), {})


def _run_packed(
    model: PreTrainedModel, sequences: Sequence[Tensor]
) -> tuple[RecordingContext, dict[str, bool], list[Tensor]]:
    """Run two chunks and a decode step over interleaved blocks; return what was seen, and each sequence's logits."""
    lengths = tuple(len(ids) for ids in sequences)
    halves = tuple(length // 2 for length in lengths)
    steps = tuple(length - 1 for length in lengths)
    num_blocks = len(lengths) * -(-max(lengths) // BLOCK_SIZE)
    tables = [list(range(first, num_blocks, len(lengths))) for first in range(len(lengths))]
    passes = (_Pass((0,) * len(lengths), halves), _Pass(halves, steps), _Pass(steps, lengths))
    device = sequences[0].device
    context = RecordingContext(num_blocks, _paged_batch(passes[0], tables, device))
    is_faithful: dict[str, bool] = {}
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    for current in passes:
        context.batch = _paged_batch(current, tables, device)
        context.calls.clear()
        spans = [slice(start, end) for start, end in zip(current.starts, current.ends, strict=True)]
        ids = torch.cat([sequence[span] for sequence, span in zip(sequences, spans, strict=True)])
        positions = torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])
        # One row more than there are tokens, so that lm_head's view of the batch cannot be mistaken for the others'.
        logit_rows = torch.arange(len(ids) + 1, device=device) % len(ids)
        with _watched_linears(model, len(ids), len(logit_rows), is_faithful):
            logits = _logits(model, ids, positions, logit_rows, {CONTEXT_KEYWORD: context})[: len(ids)]
        _check_calls(model, context)
        for rows, piece in zip(torch.split(logits, [span.stop - span.start for span in spans]), pieces, strict=True):
            piece.append(rows)
    return context, is_faithful, [torch.cat(piece) for piece in pieces]


def _paged_batch(current: _Pass, tables: list[list[int]], device: torch.device) -> PagedBatch:
    slots = [
        row[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row, start, end in zip(tables, current.starts, current.ends, strict=True)
        for position in range(start, end)
    ]
    return PagedBatch(
        block_size=BLOCK_SIZE,
        block_tables=torch.tensor(tables, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_lens=tuple(end - start for start, end in zip(current.starts, current.ends, strict=True)),
        seq_lens=current.ends,
    )


def _logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, rows: Tensor, keywords: dict[str, object]
) -> Tensor:
    """Run one pass and return the float32 logits of the rows asked for."""
    forward = cast(Any, model)
    try:
        output = forward(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows, **keywords
        )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, KernelError) as error:
        raise _unsupported(
            "FORWARD_FAILS", "architectures", f"{type(model).__name__} does not take a packed batch: {error}"
        ) from error
    logits: Tensor = output.logits[0].float()
    if logits.shape[0] != len(rows):
        raise _unsupported(
            "LOGIT_ROWS", "architectures", f"{type(model).__name__} does not return the logits of chosen rows only"
        )
    return logits


@contextmanager
def _watched_linears(
    model: PreTrainedModel, num_tokens: int, num_logits: int, is_faithful: dict[str, bool]
) -> Iterator[None]:
    """Note for each Linear whether a pass calls it exactly once, on every row.

    Semantics: an adapter on any other would be skipped or would meet the wrong tokens; `is_faithful` keeps False once
    it was False.
    """
    lm_head = cast(Any, model).get_output_embeddings()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows: dict[nn.Module, list[int]] = {linear: [] for linear in linears.values()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[module].append(inputs[0].shape[:-1].numel())

    hooks = [linear.register_forward_pre_hook(note) for linear in linears.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for path, linear in linears.items():
        expected = [num_logits if linear is lm_head else num_tokens]
        is_faithful[path] = is_faithful.get(path, True) and rows[linear] == expected


def _check_calls(model: PreTrainedModel, context: RecordingContext) -> None:
    num_layers = int(model.config.num_hidden_layers)
    if context.calls != Counter(range(num_layers)):
        once = sum(context.calls[layer] == 1 for layer in range(num_layers))
        raise _unsupported(
            "NOT_EVERY_LAYER",
            "num_hidden_layers",
            f"{type(model).__name__} calls the attention once in {once} of {num_layers} layers: it keeps other state",
        )


def _check_layers(model: PreTrainedModel, context: RecordingContext, windows: Sequence[int | None]) -> None:
    for layer, declared in enumerate(windows[: len(context.layers)]):
        seen = context.layers[layer].sliding_window
        if seen != declared:
            raise _unsupported(
                "WINDOW",
                "sliding_window",
                f"{type(model).__name__} declares the window {declared} for layer {layer} and attends with {seen}",
            )


def _check_logits(model: PreTrainedModel, alone: Tensor, together: Tensor) -> None:
    """Compare distributions: a constant added to a row of logits means nothing."""
    alone = alone - alone.mean(dim=-1, keepdim=True)
    together = together - together.mean(dim=-1, keepdim=True)
    difference = float((alone - together).norm() / alone.norm().clamp_min(1e-12))
    tolerance = TOLERANCES.get(model.dtype, 1e-1)
    if not difference <= tolerance:
        raise _unsupported(
            "PROBE_DIFFERS",
            "architectures",
            f"{type(model).__name__} answers differently packed than alone: by {difference:.1e} of its logits, "
            f"where rounding explains {tolerance:.0e}",
        )


def _unsupported(reason: str, config_field: str | None, message: str) -> UnsupportedBaseError:
    return UnsupportedBaseError(message, reason=reason, field=config_field)
