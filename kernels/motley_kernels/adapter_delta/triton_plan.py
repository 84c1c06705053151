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
UNIT_FIELDS = int(records.UNIT_FIELDS.value)
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


@dataclass(frozen=True, eq=False, slots=True)
class UnitRow:
    """One unit as the kernels are told of it, in one row; `held` is what its addresses are of."""

    unit: DeltaUnit
    shape: Shape
    numbers: list[int]
    held: tuple[Tensor, ...]
    is_aligned: bool


@dataclass(eq=False, slots=True)
class UnitRows:
    """The units of one table that batches have used, as rows of `triton_records`.

    Semantics: `free` are the rows of units that are gone, to be another's: tiles that name them are of an older
    generation, and are cut anew before they are used.
    """

    table: Tensor
    generation: int = -1
    dtype: torch.dtype = torch.float32  # of all factors
    by_slot: dict[int, UnitRow] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
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
        tuple((rows.by_slot[slot].shape, weight) for slot, weight in segment.members if slot in rows.by_slot)
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
    """Return the table's rows, with those of these slots among them and of none that is gone."""
    known = units.plan
    rows = known if isinstance(known, UnitRows) else UnitRows(torch.empty(0, UNIT_FIELDS, dtype=torch.int64).to(device))
    units.plan = None  # an error on the way leaves nothing half done
    gone: list[int] = []
    if rows.generation != units.generation:
        gone = [slot for slot, row in rows.by_slot.items() if units.units.get(slot) is not row.unit]
        rows.free += [rows.by_slot.pop(slot).shape.row for slot in gone]
        rows.generation = units.generation
    new = [slot for slot in slots if slot not in rows.by_slot and all(t.numel() for t in units.units[slot].tensors)]
    if new:
        _add_rows(rows, units, new)
    if new or gone:
        rows.is_aligned = all(row.is_aligned for row in rows.by_slot.values())
        rows.max_experts = max((row.unit.gate.num_experts for row in rows.by_slot.values() if row.unit.gate), default=1)
    units.plan = rows
    return rows


def _add_rows(rows: UnitRows, units: UnitTable, slots: list[int]) -> None:
    """Describe the units of these slots, each once it has arrived, in rows that are free or new."""
    missing, size = len(slots) - len(rows.free), len(rows.table)
    if missing > 0:
        rows.table = torch.cat([rows.table, rows.table.new_empty(missing, UNIT_FIELDS)])
        rows.free += range(size, size + missing)
    added = []
    for slot in slots:
        units.await_arrival(slot)
        rows.by_slot[slot] = row = _describe(units.units[slot], units, rows.free.pop(0))
        added.append(row)
    rows.dtype = _common_dtype([row.unit for row in rows.by_slot.values()])
    places, numbers = torch.tensor([row.shape.row for row in added]), torch.tensor([row.numbers for row in added])
    device = rows.table.device
    # A new table: a launch under way reads its own, and no inference mode forbids the write.
    rows.table = rows.table.index_copy(0, places.to(device, non_blocking=True), numbers.to(device, non_blocking=True))


def _common_dtype(units: list[DeltaUnit]) -> torch.dtype:
    dtypes = {factor.dtype for unit in units for factor in (unit.a, unit.b) if factor is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise KernelError(f"factors of {dtypes}: one dtype of at most 32 bits per Linear")
    return dtypes.pop()


def _shape_of(unit: DeltaUnit, row: int) -> Shape:
    num_experts = 0 if unit.gate is None else unit.gate.num_experts
    return Shape(row, 0 if unit.a is None else _in_blocks(unit.rank), _in_blocks(num_experts))


def _in_blocks(count: int) -> int:
    return -(-count // TILE_COLUMNS) * TILE_COLUMNS


def _describe(unit: DeltaUnit, units: UnitTable, row: int) -> UnitRow:
    """Describe a unit in a row; the order of its numbers is that of `triton_records`."""
    starts = None
    if unit.outputs is not None:
        edges = torch.arange(0, units.out_features + BLOCK_O, BLOCK_O, dtype=torch.int32, device=unit.device)
        starts = torch.searchsorted(unit.outputs, edges, out_int32=True)
    num_inputs = units.in_features if unit.a is None else unit.a.shape[1]
    num_outputs = unit.rank if unit.b is None else unit.b.shape[1]
    router = None if unit.gate is None else unit.gate.router
    num_experts, top_k = (0, 0) if unit.gate is None else (unit.gate.num_experts, unit.gate.top_k)
    given = [
        None if one is None else one.contiguous() for one in (unit.a, unit.b, unit.inputs, unit.outputs, starts, router)
    ]
    addresses = [0 if one is None else one.data_ptr() for one in given]
    is_aligned = all(n % 8 == 0 for n in (units.in_features, num_inputs, num_outputs))
    scaling = int.from_bytes(struct.pack("<f", unit.scaling), "little", signed=True)
    shape = _shape_of(unit, row)
    numbers = [
        *addresses, unit.rank, num_inputs, num_outputs, num_experts, top_k, scaling,
        shape.num_products, shape.num_products + shape.num_logits, shape.width,
    ]  # fmt: skip
    held = tuple(one for one in given if one is not None)
    return UnitRow(unit, shape, numbers, held, is_aligned and not any(address % 16 for address in addresses))


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
