"""The loops over single tokens, compiled for the machine's own CPU.

One parallel loop takes every token through all of its members: a row of weights is read once where it lies, at its true
length, and nothing but sums of one token is ever written to memory. It knows numbers alone: flat memory, offsets and
counts, as `singles` lays them out. Dimension letters: N single tokens, M members, K (token, member) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from motley_kernels.adapter_delta.places import ABSENT

A, B, ROUTER, INPUTS, OUTPUTS, RANK, NUM_INPUTS, NUM_OUTPUTS, NUM_EXPERTS, TOP_K = range(10)
"""Columns of a unit: where each of its tensors begins, in elements, ABSENT without it; then its sizes."""

QUIET_NAN = np.uint32(0x7FC0)

_inner = numba.njit(nogil=True, error_model="numpy")
# Sums in any order, so that they fill vector registers; which order is the same for every row of one length.
_inner_product = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@intrinsic
def _pointer(typing_context, address):
    """Take an integer as an address: an array made on every call would cost more than what else a call costs."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uintp), generate


def compile_all(is_cached: bool) -> dict[torch.dtype, Callable[..., None]]:
    """Return the loop, compiled at its first call, by the dtype of inputs and outputs.

    Semantics: adds the deltas of single tokens to y, in place. Token n of the loop is row tokens[n] of x and y, whose
    addresses are given; its members are those of the pairs [starts[n], starts[n + 1]). They are summed in this order in
    float32, and y is rounded once. Nothing is checked: what points outside is read, or written, outside.
    Shapes: x [T, I], y [T, O] contiguous; tokens [N], starts [N + 1], members [K], units [M, 10] int64; scales [M],
    weights [W] float32; channels [C] int32.
    """
    return {torch.bfloat16: _compile(np.uint16, is_cached), torch.float32: _compile(np.uint32, is_cached)}


def _compile(bits, is_cached):
    @numba.njit(parallel=True, nogil=True, error_model="numpy")
    def add_tokens(
        y_address, x_address, num_rows, num_inputs, num_outputs,
        tokens, starts, members, units, scales, weights, channels,
    ):  # fmt: skip
        x = numba.carray(_pointer(x_address), (num_rows, num_inputs), bits)
        y = numba.carray(_pointer(y_address), (num_rows, num_outputs), bits)
        for n in numba.prange(len(tokens)):
            row = np.empty(num_inputs, np.float32)
            _read(x[tokens[n]], row)
            total = np.zeros(num_outputs, np.float32)
            for k in range(starts[n], starts[n + 1]):
                _add_member(total, row, units[members[k]], scales[members[k]], weights, channels)
            _add_rounded(y[tokens[n]], total)

    if is_cached:
        with suppress(RuntimeError):  # where nothing can be written, every process compiles anew
            add_tokens.enable_caching()
    return add_tokens


@_inner
def _add_member(total, x, unit, scale, weights, channels):
    num_inputs, num_outputs, num_experts = unit[NUM_INPUTS], unit[NUM_OUTPUTS], unit[NUM_EXPERTS]
    read = x
    if unit[INPUTS] != ABSENT:
        read = np.empty(num_inputs, np.float32)
        for i in range(num_inputs):
            read[i] = x[channels[unit[INPUTS] + i]]
    written = total if unit[OUTPUTS] == ABSENT else np.zeros(num_outputs, np.float32)
    if num_experts:
        shares = _route(x, unit, weights)
        expert_rank = unit[RANK] // num_experts
        for e in range(num_experts):
            if shares[e] != 0:  # the rows of an expert that the token did not choose are not even read
                _add_ranks(written, read, unit, e * expert_rank, (e + 1) * expert_rank, scale * shares[e], weights)
    else:
        _add_ranks(written, read, unit, 0, unit[RANK], scale, weights)
    if unit[OUTPUTS] != ABSENT:
        for o in range(num_outputs):
            total[channels[unit[OUTPUTS] + o]] += written[o]


@_inner
def _add_ranks(written, read, unit, first, stop, scale, weights):
    """Add scale * (A[r] read) b[r] for the ranks r of [first, stop), four at a time: fewer passes over `written`."""
    num_inputs, num_outputs = unit[NUM_INPUTS], unit[NUM_OUTPUTS]
    r = first
    while r + 4 <= stop:
        if unit[A] == ABSENT:
            w0, w1, w2, w3 = read[r], read[r + 1], read[r + 2], read[r + 3]
        else:
            start = unit[A] + r * num_inputs
            w0, w1, w2, w3 = _four_products(weights[start : start + 4 * num_inputs], read)
        w0, w1, w2, w3 = scale * w0, scale * w1, scale * w2, scale * w3
        if unit[B] == ABSENT:
            written[r] += w0
            written[r + 1] += w1
            written[r + 2] += w2
            written[r + 3] += w3
        else:
            start = unit[B] + r * num_outputs
            _add_four_rows(written, w0, w1, w2, w3, weights[start : start + 4 * num_outputs])
        r += 4
    while r < stop:
        if unit[A] == ABSENT:
            weight = scale * read[r]
        else:
            start = unit[A] + r * num_inputs
            weight = scale * _product(weights[start : start + num_inputs], read)
        if unit[B] == ABSENT:
            written[r] += weight
        else:
            start = unit[B] + r * num_outputs
            _add_row(written, weight, weights[start : start + num_outputs])
        r += 1


@_inner
def _route(x, unit, weights):
    """Return each expert's share: the softmax of the largest logits, 0 for all others, the lower index first."""
    num_experts, top_k = unit[NUM_EXPERTS], unit[TOP_K]
    logits = np.empty(num_experts, np.float32)
    for e in range(num_experts):
        start = unit[ROUTER] + e * len(x)
        logits[e] = _product(weights[start : start + len(x)], x)
    is_chosen = np.zeros(num_experts, np.bool_)
    largest = np.float32(-np.inf)
    for _ in range(top_k):
        best = -1
        for e in range(num_experts):
            # A logit that is not a number is not below any: it is chosen, and its token says so.
            if not is_chosen[e] and (best < 0 or not logits[e] <= logits[best]):
                best = e
        is_chosen[best] = True
        largest = max(largest, logits[best])
    shares = np.zeros(num_experts, np.float32)
    total = np.float32(0)
    for e in range(num_experts):
        if is_chosen[e]:
            shares[e] = np.exp(logits[e] - largest)
            total += shares[e]
    return shares / total


@_inner_product
def _product(row, x):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * x[i]
    return total


@_inner_product
def _four_products(rows, x):
    count = len(x)
    row0, row1, row2, row3 = rows[:count], rows[count : 2 * count], rows[2 * count : 3 * count], rows[3 * count :]
    total0 = total1 = total2 = total3 = np.float32(0)
    for i in range(count):
        total0 += row0[i] * x[i]
        total1 += row1[i] * x[i]
        total2 += row2[i] * x[i]
        total3 += row3[i] * x[i]
    return total0, total1, total2, total3


@_inner_product
def _add_row(total, weight, row):
    for o in range(len(row)):
        total[o] += weight * row[o]


@_inner_product
def _add_four_rows(total, w0, w1, w2, w3, rows):
    count = len(total)
    row0, row1, row2, row3 = rows[:count], rows[count : 2 * count], rows[2 * count : 3 * count], rows[3 * count :]
    for o in range(count):
        total[o] += w0 * row0[o] + w1 * row1[o] + w2 * row2[o] + w3 * row3[o]


@_inner
def _read(bits, row):
    """Fill a float32 row."""
    for i in range(len(row)):
        row[i] = _widen(bits[i], bits.itemsize)


@_inner
def _widen(bits, itemsize):
    if itemsize == 2:
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)  # numba shifts to 64 bits
    return np.uint32(bits).view(np.float32)


@_inner
def _narrow(number, itemsize):
    """Return the bits of a float32 rounded to nearest and to even, as the hardware rounds."""
    bits = np.float32(number).view(np.uint32)
    if itemsize == 4:
        return bits
    if number != number:
        return QUIET_NAN
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_inner
def _add_rounded(y, total):
    for o in range(len(total)):
        y[o] = _narrow(_widen(y[o], y.itemsize) + total[o], y.itemsize)
