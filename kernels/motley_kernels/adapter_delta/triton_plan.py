"""What the kernels of the adapter delta are told: the units of a table by address, and a batch cut into tiles.

It makes small tables of integers and keeps them where their subject lives: units with their table, tiles with their
batch, shared by all Linears at which the batch's units have the same shape. It launches nothing of its own and never
waits for the device. The engine thread runs it when a batch or a table has changed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motley_kernels.adapter_delta import triton_records as records
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit, Segment, UnitTable
from motley_kernels.errors import KernelError

TILE_TOKENS = int(records.TILE_TOKENS.value)
TILE_COLUMNS = int(records.TILE_COLUMNS.value)
BLOCK_O = int(records.BLOCK_O.value)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the tiles depend on of a unit: its row, and its columns in the scratch in whole blocks."""

    row: int
    num_products: int
    num_logits: int

    @property
    def width(self) -> int:
        """Return the columns that one token has."""
        return self.num_products + 2 * self.num_logits


@dataclass(eq=False, slots=True)
class UnitRows:
    """The units of one table that batches have used, as rows of `triton_records`.

    Semantics: a shape of None is a unit that adds nothing. `held` keeps alive what was made for the kernels: tables of
    starts, and copies of tensors that are not contiguous. Slots are never reused, so a row is never another unit's; the
    table drops all rows when a slot is unbound.
    """

    dtype: torch.dtype = torch.float32  # of all factors, as the first has it
    shapes: dict[int, Shape | None] = field(default_factory=dict)
    table: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    held: list[Tensor] = field(default_factory=list)
    is_aligned: bool = True
    max_experts: int = 1


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """A batch cut into tiles.

    Semantics: rows of the tiles and members are those of `triton_records`; `tokens` holds rows of the batch, segment
    after segment and then unit after unit.
    """

    tokens: Tensor
    shrink_tiles: Tensor
    gate_tiles: Tensor
    expand_tiles: Tensor
    members: Tensor
    weights: Tensor
    hidden_size: int


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """One batch at one table, ready to run; without a layout where none of the batch's members has a unit."""

    generation: int
    rows: UnitRows
    layout: Layout | None


Places = tuple[tuple[tuple[Shape, float], ...], ...]


def plan_for(units: UnitTable, batch: DeltaBatch, device: torch.device) -> Plan:
    """Return the plan of this batch here, made anew if a unit came or went since."""
    key = ("triton", units)
    plan = batch.layouts.get(key)
    if isinstance(plan, Plan) and plan.generation == units.generation:
        return plan
    rows = _rows_for(units, sorted(slot for slot in batch.slots if slot in units.units), device)
    places: Places = tuple(
        tuple((shape, weight) for slot, weight in segment.members if (shape := rows.shapes.get(slot)) is not None)
        for segment in batch.segments
    )
    layout = None
    if any(places):
        found = batch.layouts.get(("triton", device, places))
        layout = found if isinstance(found, Layout) else _make_layout(batch.segments, places, device)
        batch.layouts[("triton", device, places)] = layout
    plan = Plan(units.generation, rows, layout)
    batch.layouts[key] = plan
    return plan


def _rows_for(units: UnitTable, slots: list[int], device: torch.device) -> UnitRows:
    """Return the table's rows, with those of these slots among them."""
    rows = units.plan if isinstance(units.plan, UnitRows) else UnitRows()
    added: list[list[int]] = []
    for slot in slots:
        if slot in rows.shapes:
            continue
        units.await_arrival(slot)
        unit = units.units[slot]
        if min(tensor.numel() for tensor in unit.tensors) == 0:
            rows.shapes[slot] = None
            continue
        added.append(_describe(rows, unit, units))
        rows.shapes[slot] = _shape_of(unit, len(rows.table) + len(added) - 1)
    if added:
        new = torch.tensor(added, dtype=torch.int64).to(device, non_blocking=True)
        rows.table = torch.cat([rows.table, new]) if len(rows.table) else new
    units.plan = rows
    return rows


def _shape_of(unit: DeltaUnit, row: int) -> Shape:
    num_experts = 0 if unit.gate is None else unit.gate.num_experts
    return Shape(row, 0 if unit.a is None else _in_blocks(unit.rank), _in_blocks(num_experts))


def _in_blocks(count: int) -> int:
    return -(-count // TILE_COLUMNS) * TILE_COLUMNS


def _describe(rows: UnitRows, unit: DeltaUnit, units: UnitTable) -> list[int]:
    """Return a unit's row; the order is that of `triton_records`."""
    dtypes = {factor.dtype for factor in (unit.a, unit.b) if factor is not None}
    if not rows.held:
        rows.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    if dtypes != {rows.dtype} or rows.dtype not in DTYPES:
        raise KernelError(f"factors of {dtypes} beside {rows.dtype}: one dtype of at most 32 bits per Linear")
    starts = None
    if unit.outputs is not None:
        edges = torch.arange(0, units.out_features + BLOCK_O, BLOCK_O, dtype=torch.int32, device=unit.device)
        starts = torch.searchsorted(unit.outputs, edges, out_int32=True)
    num_inputs = units.in_features if unit.a is None else unit.a.shape[1]
    num_outputs = unit.rank if unit.b is None else unit.b.shape[1]
    router = None if unit.gate is None else unit.gate.router
    num_experts, top_k = (0, 0) if unit.gate is None else (unit.gate.num_experts, unit.gate.top_k)
    rows.max_experts = max(rows.max_experts, num_experts)
    addresses = [_address(rows, t) for t in (unit.a, unit.b, unit.inputs, unit.outputs, starts, router)]
    rows.is_aligned &= all(n % 8 == 0 for n in (units.in_features, num_inputs, num_outputs)) and not any(
        address % 16 for address in addresses
    )
    scaling = int.from_bytes(struct.pack("<f", unit.scaling), "little", signed=True)
    shape = _shape_of(unit, 0)
    return [
        *addresses, unit.rank, num_inputs, num_outputs, num_experts, top_k, scaling,
        shape.num_products, shape.num_products + shape.num_logits, shape.width,
    ]  # fmt: skip


def _address(rows: UnitRows, tensor: Tensor | None) -> int:
    """Return where a tensor lies, 0 for none, and keep alive what the unit itself does not."""
    if tensor is None:
        return 0
    contiguous = tensor.contiguous()
    rows.held.append(contiguous)
    return contiguous.data_ptr()


def _make_layout(segments: tuple[Segment, ...], places: Places, device: torch.device) -> Layout:
    """Cut a batch into tiles, given each segment's units here and their weights."""
    expand_tiles: list[tuple[int, ...]] = []
    members: list[tuple[Shape, int]] = []  # with the segment's first token among the unit's
    weights: list[float] = []
    readers: dict[Shape, list[Tensor]] = {}
    num_read: dict[Shape, int] = {}
    pieces: list[Tensor] = []
    num_listed = 0
    for segment, here in zip(segments, places, strict=True):
        if not here:
            continue
        count = len(segment.token_indices)
        span = (len(members), len(members) + len(here))
        expand_tiles += [
            (num_listed + at, min(TILE_TOKENS, count - at), at, *span) for at in range(0, count, TILE_TOKENS)
        ]
        pieces.append(segment.token_indices)
        num_listed += count
        for shape, weight in here:
            members.append((shape, num_read.get(shape, 0)))
            weights.append(weight)
            readers.setdefault(shape, []).append(segment.token_indices)
            num_read[shape] = num_read.get(shape, 0) + count
    shrink_tiles: list[tuple[int, ...]] = []
    gate_tiles: list[tuple[int, ...]] = []
    first_cell: dict[Shape, int] = {}
    num_cells = 0
    for shape, lists in readers.items():
        first_cell[shape] = num_cells
        if shape.width:
            tiles = _shrink_tiles(shape, num_listed, num_read[shape], num_cells)
            shrink_tiles += tiles
            gate_tiles += [tile for tile in tiles if shape.num_logits and tile[1] == shape.num_products]
            pieces += lists
            num_listed += num_read[shape]
            num_cells += num_read[shape] * shape.width
    return Layout(
        torch.cat(pieces).to(device, torch.int64, non_blocking=True),
        _table(shrink_tiles, device),
        _table(gate_tiles, device),
        _table(expand_tiles, device),
        _table([(shape.row, first_cell[shape] + place * shape.width) for shape, place in members], device),
        torch.tensor(weights, dtype=torch.float32).to(device, non_blocking=True),
        num_cells,
    )


def _shrink_tiles(shape: Shape, first_token: int, count: int, first_cell: int) -> list[tuple[int, ...]]:
    return [
        (shape.row, column, first_token + at, min(TILE_TOKENS, count - at), first_cell + at * shape.width)
        for column in range(0, shape.num_products + shape.num_logits, TILE_COLUMNS)
        for at in range(0, count, TILE_TOKENS)
    ]


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
