"""Identities depend on content alone: every change of content moves them, no change of spelling does."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PLAIN_CONFIG, PREFIX, plain_tensors, tiny_spec, write
from hypothesis import given
from hypothesis import strategies as st
from motley_adapters.errors import AdapterSetError
from motley_adapters.identity import adapter_digest, cache_seed, part_digest, set_identity
from motley_adapters.reader import read_adapter
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.types import Gate
from torch import Tensor

Units = dict[str, DeltaUnit]


def units() -> Units:
    generator = torch.Generator().manual_seed(1)
    return {
        path: DeltaUnit(torch.randn(2, 3, generator=generator), torch.randn(2, 4, generator=generator), 0.5)
        for path in ("x.a", "x.b")
    }


def with_unit(changed: DeltaUnit) -> Units:
    return units() | {"x.a": changed}


def nudged(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(torch.inf))
    return changed


CHANGES: dict[str, Callable[[DeltaUnit], Units]] = {
    "one bit of a": lambda unit: with_unit(DeltaUnit(nudged(unit.a), unit.b, unit.scaling)),
    "one bit of b": lambda unit: with_unit(DeltaUnit(unit.a, nudged(unit.b), unit.scaling)),
    "the scaling's last bit": lambda unit: with_unit(DeltaUnit(unit.a, unit.b, unit.scaling + 2**-53)),
    "the shapes over the same bytes": lambda unit: with_unit(DeltaUnit(unit.a.view(1, 6), unit.b.view(1, 8), 0.5)),
    "one module less": lambda unit: {"x.a": unit},
    "another module": lambda unit: {"x.a": unit, "x.c": units()["x.b"]},
    "modules exchanged": lambda unit: {"x.b": unit, "x.a": units()["x.b"]},
    "none": lambda unit: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_content_changes_the_digest(change: str) -> None:
    assert adapter_digest("lora", CHANGES[change](units()["x.a"])) != adapter_digest("lora", units())


def gated(**fields: Any) -> Units:
    """Return a unit that has everything a unit can have, or has something else instead."""
    generator = torch.Generator().manual_seed(2)
    whole: dict[str, Any] = {
        "a": torch.randn(2, 3, generator=generator),
        "b": torch.randn(2, 3, generator=generator),
        "scaling": 0.5,
        "inputs": torch.tensor([0, 2, 5], dtype=torch.int32),
        "outputs": torch.tensor([1, 2, 7], dtype=torch.int32),
        "gate": Gate(torch.randn(2, 6, generator=generator), 1),
    }
    return {"x": DeltaUnit(**(whole | fields))}


ROUTER = gated()["x"].gate.router
PIECES: dict[str, dict[str, Any]] = {
    "another input": {"inputs": torch.tensor([0, 2, 6], dtype=torch.int32)},
    "all inputs": {"inputs": None},
    "another output": {"outputs": torch.tensor([1, 2, 8], dtype=torch.int32)},
    "all outputs": {"outputs": None},
    "no gate": {"gate": None},
    "one bit of the router": {"gate": Gate(nudged(ROUTER), 1)},
    "another top_k": {"gate": Gate(ROUTER, 2)},
    "inputs for outputs": {"inputs": gated()["x"].outputs, "outputs": gated()["x"].inputs},
    "a for b": {"a": gated()["x"].b, "b": gated()["x"].a},
}


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_of_a_unit_is_content(piece: str) -> None:
    assert adapter_digest("goat", gated(**PIECES[piece])) != adapter_digest("goat", gated())
    assert part_digest(gated(**PIECES[piece])) != part_digest(gated())


def test_a_block_on_inputs_is_not_the_same_block_on_outputs() -> None:
    block, channels = torch.ones(2, 2), torch.tensor([0, 1], dtype=torch.int32)
    digests = {
        adapter_digest("s2ft", {"x": DeltaUnit(None, block, 1.0, inputs=channels)}),
        adapter_digest("s2ft", {"x": DeltaUnit(block, None, 1.0, outputs=channels)}),
        adapter_digest("s2ft", {"x": DeltaUnit(block, block, 1.0, inputs=channels, outputs=channels)}),
    }
    assert len(digests) == 3


def test_the_shared_parts_are_content_in_any_order() -> None:
    assert adapter_digest("goat", units(), ["p", "q"]) == adapter_digest("goat", units(), ["q", "p"])
    digests = {adapter_digest("goat", units(), shared) for shared in ([], ["p"], ["q"], ["p", "q"], ["pq"])}
    assert len(digests) == 5


def test_a_part_is_no_adapter() -> None:
    assert part_digest(units()) not in {adapter_digest(kind, units()) for kind in ("", "lora", "goat")}


def test_the_kind_is_content() -> None:
    assert adapter_digest("lora", units()) != adapter_digest("loram", units())


def test_the_digest_is_the_same_in_every_process_and_version() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(2, 4)
    expected = "sha256:02156dac88b1e101e0604108c588d13bd773b58fc397a845fb15578301839f00"
    assert adapter_digest("lora", {"x": DeltaUnit(a, b, 2.0)}) == expected


def test_neither_order_nor_memory_layout_is_content() -> None:
    plain = units()
    strided = {path: DeltaUnit(unit.a.T.contiguous().T, unit.b, unit.scaling) for path, unit in reversed(plain.items())}
    assert adapter_digest("lora", strided) == adapter_digest("lora", plain)


SPELLINGS: dict[str, dict[str, Any]] = {
    "an expression": {"target_modules": r".*\.(q_proj|up_proj)"},
    "full paths": {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]},
    "labels": {"base_model_name_or_path": "elsewhere", "peft_version": "9", "lora_dropout": 0.5},
    "the same scale by patterns": {"r": 9, "lora_alpha": 3, "rank_pattern": {".*": 2}, "alpha_pattern": {".*": 4}},
    "the same scale by rsLoRA": {"use_rslora": True, "lora_alpha": 2 * 2**0.5},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_function_spelled_differently_has_the_same_digest(spelling: str, tmp_path: Path) -> None:
    plain = read_adapter(write(tmp_path / "plain"), tiny_spec())
    tensors = dict(reversed(plain_tensors().items()))
    other = read_adapter(write(tmp_path / "other", PLAIN_CONFIG | SPELLINGS[spelling], tensors), tiny_spec())
    assert other.spec.digest == plain.spec.digest


def test_the_stored_precision_is_not_content_where_it_is_exact(tmp_path: Path) -> None:
    coarse = {name: tensor.bfloat16() for name, tensor in plain_tensors().items()}
    fine = {name: tensor.float() for name, tensor in coarse.items()}
    digests = {
        read_adapter(write(tmp_path / str(i), tensors=t), tiny_spec()).spec.digest for i, t in enumerate((coarse, fine))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("fields", [{"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}])
def test_another_scale_is_another_digest(fields: dict[str, Any], tmp_path: Path) -> None:
    plain = read_adapter(write(tmp_path / "plain"), tiny_spec())
    assert read_adapter(write(tmp_path / "x", PLAIN_CONFIG | fields), tiny_spec()).spec.digest != plain.spec.digest


def test_another_value_is_another_digest(tmp_path: Path) -> None:
    plain = read_adapter(write(tmp_path / "plain"), tiny_spec())
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
    tensors = plain_tensors() | {name: nudged(plain_tensors()[name])}
    assert read_adapter(write(tmp_path / "x", tensors=tensors), tiny_spec()).spec.digest != plain.spec.digest


WEIGHTS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.dictionaries(st.text(max_size=4), WEIGHTS, max_size=5), st.randoms())
def test_a_set_is_sorted_and_without_zeros_whatever_the_order(weights: dict[str, float], random: Any) -> None:
    pairs = list(weights.items())
    random.shuffle(pairs)
    identity = set_identity(pairs)
    assert dict(identity) == {digest: weight for digest, weight in weights.items() if weight != 0}
    assert list(identity) == sorted(identity)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_digest_named_twice_is_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(AdapterSetError) as caught:
        set_identity([("a", weights[0]), ("b", 1.0), ("a", weights[1])])
    assert (caught.value.reason, caught.value.field) == ("DUPLICATE_ADAPTER", "adapters")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(AdapterSetError) as caught:
        set_identity([("a", weight)])
    assert caught.value.reason == "INVALID_WEIGHT"


def test_zero_weights_are_the_base_alone() -> None:
    assert set_identity([("a", 0.0), ("b", -0.0)]) == set_identity([]) == ()


def test_cache_seeds_differ_by_everything_that_must_keep_caches_apart() -> None:
    seeds = [
        cache_seed(set_identity(pairs), base, salt)
        for pairs in ([], [("a", 1.0)], [("a", 0.5)], [("b", 1.0)], [("a", 1.0), ("b", 1.0)], [("ab", 1.0)])
        for base, salt in itertools.product(("base", "bas", ""), (b"", b"e", b"tenant"))
    ]
    assert len(set(seeds)) == len(seeds)


def test_cache_seeds_cannot_be_forged_by_moving_bytes_between_fields() -> None:
    packed = struct.pack("<d", 1.0)
    salts = [b"t", b"t" + b"a" + packed, struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 8) + packed]
    seeds = {cache_seed((("a", 1.0),), "base", salts[0]), *(cache_seed((), "base", salt) for salt in salts)}
    assert len(seeds) == 4


def test_a_cache_seed_does_not_depend_on_the_order_of_naming() -> None:
    one, other = ([("a", 1.0), ("b", 2.0)], [("b", 2.0), ("c", 0.0), ("a", 1.0)])
    assert cache_seed(set_identity(one), "base", b"t") == cache_seed(set_identity(other), "base", b"t")
