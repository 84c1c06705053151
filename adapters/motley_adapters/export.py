"""Adapters of other kinds written as PEFT LoRA, for those whose delta one pair of factors holds exactly.

S2FT's does: the channels become a one-hot factor. Every other program that loads a LoRA can then load it, at the cost
of a second factor and of a rank that is the number of channels. Reading and writing block; any thread but the event
loop's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from motley_bases.spec import BaseSpec

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import show
from motley_adapters.kinds import s2ft
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import read_adapter
from motley_adapters.spec import Adapter


def export_s2ft_as_lora(adapter: Path | Adapter, directory: Path, base: BaseSpec) -> None:
    """Write an S2FT adapter, given as its directory or as read, as a PEFT LoRA of the same function.

    Semantics: scale exactly 1, rank the number of channels of each Linear. Products with the one-hot factor are exact,
    so no weight is rounded.
    Raises: as `read_adapter` does for a directory; AdapterFormatError with reason UNSUPPORTED_KIND for another kind.
    """
    if isinstance(adapter, Path):
        adapter = read_adapter(adapter, base)
    if adapter.spec.kind != s2ft.KIND:
        message = f"an adapter of kind {show(adapter.spec.kind)} is not exported; {s2ft.KIND} is"
        raise AdapterFormatError(message, reason="UNSUPPORTED_KIND", field="motley_manifest.kind")
    write_peft_lora(directory, {path: _pair(path, adapter, base) for path in adapter.units})


def _pair(path: str, adapter: Adapter, base: BaseSpec) -> LoraPair:
    unit = adapter.units[path]
    inputs, outputs = base.linears[path]
    if unit.a is None:
        assert unit.b is not None
        assert unit.inputs is not None
        return LoraPair(torch.nn.functional.one_hot(unit.inputs.long(), inputs).to(unit.b.dtype), unit.b.T)
    assert unit.outputs is not None
    return LoraPair(unit.a, torch.nn.functional.one_hot(unit.outputs.long(), outputs).to(unit.a.dtype).T)
