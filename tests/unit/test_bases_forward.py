"""A base's packed, chunked, paged forward pass against transformers' eager attention, alone and under adapters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, build_checkpoint
from motley_bases import linear
from motley_bases.base import Base
from motley_bases.errors import UnboundSlotError
from motley_bases.kv_cache import KVCache
from motley_bases.loader import load_base
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit
from motley_kernels.errors import ShapeError
from motley_kernels.paged_attention.types import PagedBatch
from packed_passes import UnitSet, run_packed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

CPU = torch.device("cpu")
# Three sequences: two chunks and steps, one chunk and steps, one that joins late.
CUTS = ((9, 4, 0), (15, 5, 8), (16, 6, 12), (17, 7, 13))
SERVED_VARIANTS = ("llama_tied", "llama_biased", "llama_wide_heads", "llama3_rope", "mixtral", "gpt2")


def draw_sequences(vocab_size: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(length)] for length in CUTS[-1]]


def eager_model(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, sequence: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    return logits


def load(directory: Path) -> Base:
    return load_base(directory, dtype="float32", device=CPU)


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def random_units(base: Base, paths: Mapping[str, int], seed: int) -> dict[str, DeltaUnit]:
    """Make a unit of the given rank for each path, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(base.spec.linears)
    shapes[base.spec.embedding_path] = (base.spec.vocab_size, base.spec.hidden_size)
    units = {}
    for path, rank in paths.items():
        num_inputs, num_outputs = shapes[path]
        fan_in = 1 if path == base.spec.embedding_path else num_inputs
        a = torch.randn(rank, num_inputs, generator=generator) * fan_in**-0.5
        b = torch.randn(rank, num_outputs, generator=generator) * rank**-0.5
        units[path] = DeltaUnit(a, b, scaling=0.25 + 0.25 * seed)
    return units


def merged_model(directory: Path, base: Base, members: list[tuple[Mapping[str, DeltaUnit], float]]) -> PreTrainedModel:
    """Return the eager model with every delta added to its weights; embedding and lm_head are untied by it."""
    model = eager_model(directory)
    for units, weight in members:
        for path, unit in units.items():
            assert unit.a is not None
            assert unit.b is not None
            delta = weight * unit.scaling * (unit.b.T @ unit.a)
            module = model.get_submodule(path)
            assert isinstance(module, nn.Linear | nn.Embedding)
            update = delta.T if path == base.spec.embedding_path else delta
            module.weight = nn.Parameter(module.weight.detach() + update)
    return model


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SERVED_VARIANTS])
def test_packed_chunked_decoded_logits_equal_each_sequence_alone_under_eager(name: str, tmp_path: Path) -> None:
    directory = build_checkpoint(name, tmp_path / name)
    base = load(directory)
    sequences = draw_sequences(base.spec.vocab_size)
    model = eager_model(directory)
    for packed, sequence in zip(run_packed(base, sequences, CUTS), sequences, strict=True):
        assert packed.dtype == torch.float32
        assert_same_logits(packed, eager_logits(model, sequence))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_checkpoints_have_clear_and_varied_choices(name: str, tmp_path: Path) -> None:
    model = eager_model(build_checkpoint(name, tmp_path / name))
    sequences = draw_sequences(model.config.vocab_size)
    logits = torch.cat([eager_logits(model, sequence) for sequence in sequences])
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).median()) > 0.1
    assert logits.argmax(-1).unique().numel() > 10
    inputs = torch.cat([torch.tensor(sequence) for sequence in sequences])
    assert float((logits.argmax(-1) == inputs).float().mean()) < 0.5, "it echoes"


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "gemma3_text", "phi3", "qwen2"])
def test_adapters_side_by_side_equal_weights_with_their_deltas_added(name: str, tmp_path: Path) -> None:
    directory = build_checkpoint(name, tmp_path / name)
    base = load(directory)
    everywhere = random_units(base, {path: 1 + n % 3 for n, path in enumerate(base.sites.tables)}, seed=1)
    few = random_units(base, dict.fromkeys(list(base.spec.linears)[1:4], 5), seed=2)
    base.sites.bind(10, everywhere)
    base.sites.bind(11, few)
    sets: list[UnitSet] = [((10, 1.0),), (), ((10, -0.5), (11, 2.0))]
    sequences = draw_sequences(base.spec.vocab_size)
    merged: list[list[tuple[Mapping[str, DeltaUnit], float]]] = [
        [(everywhere, 1.0)],
        [],
        [(everywhere, -0.5), (few, 2.0)],
    ]
    for packed, sequence, members in zip(run_packed(base, sequences, CUTS, sets), sequences, merged, strict=True):
        assert_same_logits(packed, eager_logits(merged_model(directory, base, members), sequence))


@pytest.mark.parametrize("site", ["embedding_path", "lm_head_path"])
@pytest.mark.parametrize("name", ["llama_tied", "gemma3_text"])
def test_a_unit_of_one_tied_site_does_not_touch_the_other(name: str, site: str, tmp_path: Path) -> None:
    directory = build_checkpoint(name, tmp_path / name)
    base = load(directory)
    assert base.spec.tied_embeddings
    units = random_units(base, {getattr(base.spec, site): 3}, seed=1)
    base.sites.bind(0, units)
    sequences = draw_sequences(base.spec.vocab_size)
    packed = run_packed(base, sequences, CUTS, [((0, 1.0),)] * 3)
    reference = merged_model(directory, base, [(units, 1.0)])
    plain = eager_model(directory)
    for logits, sequence in zip(packed, sequences, strict=True):
        assert_same_logits(logits, eager_logits(reference, sequence))
        assert (logits.argmax(-1) != eager_logits(plain, sequence).argmax(-1)).any(), "the unit moves nothing"


def test_base_only_rows_are_bit_equal_with_and_without_neighbours_adapters(tmp_path: Path) -> None:
    base = load(build_checkpoint("llama", tmp_path / "llama"))
    sequences = draw_sequences(base.spec.vocab_size)
    plain = run_packed(base, sequences, CUTS)
    base.sites.bind(0, random_units(base, dict.fromkeys(base.sites.tables, 4), seed=1))
    mixed = run_packed(base, sequences, CUTS, [((0, 1.0),), (), ((0, 2.0),)])
    assert torch.equal(plain[1], mixed[1])
    assert not torch.equal(plain[0], mixed[0])
    assert not torch.equal(plain[2], mixed[2])


def test_base_only_passes_never_reach_the_delta_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(build_checkpoint("llama", tmp_path / "llama"))
    base.sites.bind(0, random_units(base, dict.fromkeys(base.sites.tables, 4), seed=1))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a base-only pass computed a delta")

    monkeypatch.setattr(linear, "add_delta", fail)
    monkeypatch.setattr(linear, "add_embedding_delta", fail)
    sequences = draw_sequences(base.spec.vocab_size)
    run_packed(base, sequences, CUTS)
    with pytest.raises(AssertionError, match="base-only"):
        run_packed(base, sequences, CUTS, [((0, 1.0),), (), ()])


def test_after_a_slot_is_unbound_it_is_refused_and_the_base_answers_as_ever(tmp_path: Path) -> None:
    base = load(build_checkpoint("llama", tmp_path / "llama"))
    sequences = draw_sequences(base.spec.vocab_size)
    plain = run_packed(base, sequences, CUTS)
    base.sites.bind(0, random_units(base, dict.fromkeys(base.sites.tables, 4), seed=1))
    base.sites.unbind(0)
    with pytest.raises(UnboundSlotError):
        run_packed(base, sequences, CUTS, [((0, 1.0),)] * 3)
    after = run_packed(base, sequences, CUTS)
    assert all(torch.equal(left, right) for left, right in zip(plain, after, strict=True))


@pytest.mark.parametrize(("num_tokens", "num_sampled"), [(7, 2), (8, 3)])
def test_a_batch_left_over_from_another_composition_is_an_error(
    num_tokens: int, num_sampled: int, tmp_path: Path
) -> None:
    base = load(build_checkpoint("llama", tmp_path / "llama"))
    kv = KVCache.allocate(base.spec, 2, 8, base.dtype, base.device)
    paged = PagedBatch(8, torch.tensor([[1]]), torch.arange(8, 16), (8,), (8,))
    used = ((0, 1.0),)
    base.sites.bind(0, {})
    base.sites.set_batch(DeltaBatch.from_sets([used] * num_tokens), DeltaBatch.from_sets([used] * num_sampled))
    with pytest.raises(ShapeError, match="rows"):
        base.forward(torch.arange(8), torch.arange(8), paged, kv, torch.tensor([0, 7]))


def test_chosen_rows_come_in_the_order_asked_and_none_is_fine(tmp_path: Path) -> None:
    base = load(build_checkpoint("gemma2", tmp_path / "gemma2"))
    paged = PagedBatch(8, torch.tensor([[1]]), torch.arange(8, 16), (8,), (8,))

    def run(rows: list[int]) -> Tensor:
        kv = KVCache.allocate(base.spec, 2, 8, base.dtype, base.device)
        return base.forward(torch.arange(8), torch.arange(8), paged, kv, torch.tensor(rows, dtype=torch.int64))

    everything = run(list(range(8)))
    torch.testing.assert_close(run([5, 2, 5]), everything[[5, 2, 5]], rtol=1e-5, atol=1e-5)
    assert run([]).shape == (0, base.spec.vocab_size)


def test_bfloat16_and_float16_stay_near_float32(tmp_path: Path) -> None:
    directory = build_checkpoint("qwen2", tmp_path / "qwen2")
    sequences = draw_sequences(load(directory).spec.vocab_size)
    exact = torch.cat(run_packed(load(directory), sequences, CUTS))
    for dtype in ("bfloat16", "float16"):
        base = load_base(directory, dtype=dtype, device=CPU)
        assert base.spec.dtype == dtype
        rough = torch.cat(run_packed(base, sequences, CUTS))
        assert rough.dtype == torch.float32
        assert float((rough - exact).norm() / exact.norm()) < 0.1
