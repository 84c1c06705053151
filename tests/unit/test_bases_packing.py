"""Packed weights: the same bits as plain ones, from less work and no more memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from motley_bases import loader, packing
from motley_bases.base import Base
from motley_bases.linear import AdapterLinear
from packed_passes import run_packed
from torch import Tensor, nn

CPU = torch.device("cpu")
SEQUENCES = ([5, 9, 2, 7, 11, 3, 8], [4, 4, 6])
CUTS = ((4, 2), (6, 2), (7, 3))

needs_packing = pytest.mark.skipif(
    not packing.can_pack(CPU, torch.bfloat16), reason="this machine's torch does not pack bfloat16 weights"
)


def load(directory: Path, *, packed: bool, monkeypatch: pytest.MonkeyPatch) -> Base:
    if not packed:
        monkeypatch.setattr(loader, "can_pack", lambda *_: False)
    base = loader.load_base(directory, dtype="bfloat16", device=CPU)
    monkeypatch.undo()
    return base


@needs_packing
@pytest.mark.parametrize("name", ["llama", "llama_biased", "llama_tied"])
def test_packed_weights_change_no_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_checkpoint(name, tmp_path)
    plain = load(directory, packed=False, monkeypatch=monkeypatch)
    packed = load(directory, packed=True, monkeypatch=monkeypatch)
    for path in plain.spec.linears:
        assert isinstance(packed.model.get_submodule(path).base, packing.PackedLinear)
        assert torch.equal(packed.tensor(f"{path}.weight"), plain.tensor(f"{path}.weight"))
    for ours, theirs in zip(run_packed(packed, SEQUENCES, CUTS), run_packed(plain, SEQUENCES, CUTS), strict=True):
        assert torch.equal(ours, theirs)


@needs_packing
def test_rows_of_a_packed_linear_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(0)
    linear = packing.PackedLinear(nn.Linear(96, 80).to(torch.bfloat16))
    x = torch.randn(64, 96).to(torch.bfloat16)
    with torch.inference_mode():
        whole: Tensor = linear(x)
        for num_rows in (8, 16, 40):
            assert torch.equal(linear(x[:num_rows]), whole[:num_rows])


@needs_packing
def test_no_plain_copy_of_a_packed_weight_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(build_checkpoint("llama", tmp_path), packed=True, monkeypatch=monkeypatch)
    kept = {name for name, _ in base.model.named_parameters()}
    assert not [path for path in base.spec.linears if any(name.startswith(f"{path}.") for name in kept)]


def test_float32_and_other_devices_stay_plain(tmp_path: Path) -> None:
    assert not packing.can_pack(CPU, torch.float32)
    assert not packing.can_pack(torch.device("cuda"), torch.bfloat16)
    base = loader.load_base(build_checkpoint("llama", tmp_path), dtype="float32", device=CPU)
    sites = [site for site in base.model.modules() if isinstance(site, AdapterLinear)]
    assert sites
    assert all(isinstance(site.base, nn.Linear) for site in sites)
