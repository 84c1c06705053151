"""S2FT by hand and against a patched weight: gathered inputs, scattered outputs, heads under grouped queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from adapter_files import spec_of, tiny_spec
from applied_adapters import applied, delta_rows, logits
from architectures import build_model
from kind_adapters import make_s2ft
from motley_adapters.kinds.head_channels import head_channels
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.reader import read_adapter
from motley_adapters.spec import Adapter
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from torch import Tensor, nn
from transformers import PreTrainedModel

TOKENS = (5, 17, 33, 8, 64, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels(*indices: int) -> Tensor:
    return torch.tensor(indices, dtype=torch.int32)


ROW = ChannelBlock("input", channels(1, 3), torch.tensor([[1.0, 0], [0, 2], [-1, 1]]))
COLUMN = ChannelBlock("output", channels(0, 2), torch.tensor([[1.0, 1], [0, 3]]))


def test_inputs_are_gathered_by_hand() -> None:
    assert delta_rows(ROW.unit, torch.tensor([[1.0, 2, 3, 4]]), 3).tolist() == [[2.0, 8.0, 2.0]]


def test_outputs_are_scattered_by_hand() -> None:
    assert delta_rows(COLUMN.unit, torch.tensor([[2.0, 5]]), 4).tolist() == [[7.0, 0.0, 15.0, 0.0]]


def test_subtracting_does_not_undo_an_addition_in_bfloat16() -> None:
    weight = torch.tensor(1.0, dtype=torch.bfloat16)
    delta = torch.tensor(0.0039, dtype=torch.bfloat16)
    assert float(weight + delta) == 1.0
    assert float((weight + delta) - delta) == 0.99609375


def patch(model: PreTrainedModel, adapter: Adapter) -> None:
    """Write an adapter into a model's weights."""
    with torch.no_grad():
        for path, unit in adapter.units.items():
            weight = model.get_parameter(f"{path}.weight")
            if unit.inputs is not None:
                assert unit.b is not None
                weight[:, unit.inputs.long()] += unit.b.T.to(weight.dtype)
            else:
                assert unit.a is not None
                assert unit.outputs is not None
                weight[unit.outputs.long()] += unit.a.to(weight.dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_a_model_under_an_adapter_is_the_model_with_its_weights_patched(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture, vocab_size=80)
    base = spec_of(model)
    adapter = read_adapter(make_s2ft(tmp_path, base, seed=1), base)
    alone = logits(model, TOKENS)
    with applied(model, (adapter, 1.0)):
        served = logits(model, TOKENS)
    patch(model, adapter)
    torch.testing.assert_close(served, logits(model, TOKENS), rtol=1e-5, atol=1e-4)
    assert (served - alone).abs().max() > 0.1


def test_a_linear_in_bfloat16_is_near_its_patched_weight() -> None:
    weight, x = random(48, 64, seed=2).bfloat16(), random(5, 64, seed=3).bfloat16()
    indices = torch.arange(0, 64, 7, dtype=torch.int32)
    block = ChannelBlock("input", indices, random(48, len(indices), seed=4) * 0.1)
    served = (x @ weight.T).float() + delta_rows(block.unit, x.float(), 48)
    patched = weight.clone()
    patched[:, indices.long()] += block.weight.bfloat16()
    wanted = (x @ patched.T).float()
    assert (served - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_one_hot_pair_is_the_gather_and_the_scatter_exactly(side: str) -> None:
    indices = channels(0, 3, 4, 9)
    if side == "input":
        unit = DeltaUnit(None, random(4, 7).double(), 1.0, inputs=indices)
        pair = DeltaUnit(nn.functional.one_hot(indices.long(), 10).double(), unit.b, 1.0)
    else:
        unit = DeltaUnit(random(4, 10).double(), None, 1.0, outputs=indices)
        pair = DeltaUnit(unit.a, nn.functional.one_hot(indices.long(), 12).double(), 1.0)
    x = random(6, 10, seed=5).double()
    assert torch.equal(
        delta_rows(unit, x, 7 if side == "input" else 12), delta_rows(pair, x, 7 if side == "input" else 12)
    )


# --- what may be permuted, and so what a head is ---------------------------------------------------------------------


def permute_heads(model: PreTrainedModel, queries: Sequence[int], kv_heads: Sequence[int]) -> None:
    """Move whole heads of every layer to other places, on both sides of attention."""
    config = model.config
    sizes = (config.num_attention_heads, config.num_key_value_heads)
    dim = config.head_dim
    rows = [torch.tensor(order)[:, None] * dim + torch.arange(dim) for order in (queries, kv_heads)]
    assert [len(order) for order in rows] == list(sizes)
    query_rows, kv_rows = (order.flatten() for order in rows)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.copy_(attention.q_proj.weight[query_rows])
            attention.k_proj.weight.copy_(attention.k_proj.weight[kv_rows])
            attention.v_proj.weight.copy_(attention.v_proj.weight[kv_rows])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, query_rows])


PERMUTATIONS = {
    "groups exchanged": ([2, 3, 0, 1], [1, 0], 2, True),
    "query heads within their group": ([1, 0, 3, 2], [0, 1], 2, True),
    "a free permutation under grouped queries": ([1, 2, 3, 0], [0, 1], 2, False),
    "a free permutation without groups": ([1, 2, 3, 0], [1, 2, 3, 0], 4, True),
}


@pytest.mark.parametrize("case", PERMUTATIONS)
def test_heads_move_freely_only_with_their_group(case: str) -> None:
    queries, kv_heads, num_kv_heads, is_legal = PERMUTATIONS[case]
    model = build_model("llama", vocab_size=80, num_key_value_heads=num_kv_heads)
    before = logits(model, TOKENS)
    permute_heads(model, queries, kv_heads)
    assert torch.allclose(logits(model, TOKENS), before, rtol=1e-5, atol=1e-4) is is_legal


def test_ffn_channels_move_freely() -> None:
    model = build_model("llama", vocab_size=80)
    before = logits(model, TOKENS)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    torch.testing.assert_close(logits(model, TOKENS), before, rtol=1e-5, atol=1e-4)


def test_heads_are_channels_by_hand() -> None:
    found = head_channels(8, 4, 2, [2, 3, 6, 7])
    assert found.queries == (4, 5, 6, 7, 12, 13, 14, 15)
    assert found.keys_values == (2, 3, 6, 7)


def test_a_key_value_head_counts_only_with_its_whole_group() -> None:
    assert head_channels(4, 2, 3, [0, 2, 3]).keys_values == (3, 4, 5)
    assert head_channels(4, 2, 3, [1]).keys_values == ()
    assert head_channels(4, 4, 3, [1]).keys_values == (3, 4, 5)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "heads"), [(4, 2, [4]), (4, 2, [-1]), (4, 2, [1, 1]), (4, 3, [0])]
)
def test_heads_that_cannot_be_are_refused(num_heads: int, num_kv_heads: int, heads: list[int]) -> None:
    with pytest.raises(ValueError, match=r"heads|groups"):
        head_channels(num_heads, num_kv_heads, 8, heads)


def test_heads_under_grouped_queries_and_ffn_channels_in_one_adapter(tmp_path: Path) -> None:
    model = build_model("llama_wide_heads", vocab_size=80)  # head_dim is not hidden / heads
    base = spec_of(model)
    heads = head_channels(4, 2, 24, [1, 2, 3])
    blocks = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        blocks[f"{prefix}.self_attn.o_proj"] = ChannelBlock("input", channels(*heads.queries), random(64, 72) * 0.1)
        blocks[f"{prefix}.self_attn.v_proj"] = ChannelBlock(
            "output", channels(*heads.keys_values), random(24, 64) * 0.1
        )
        blocks[f"{prefix}.mlp.down_proj"] = ChannelBlock("input", channels(0, 50, 95), random(64, 3) * 0.1)
    digest = write_s2ft(tmp_path, base, blocks)
    adapter = read_adapter(tmp_path, base)
    assert adapter.spec.digest == digest
    with applied(model, (adapter, 1.0)):
        served = logits(model, TOKENS)
    patch(model, adapter)
    torch.testing.assert_close(served, logits(model, TOKENS), rtol=1e-5, atol=1e-4)


# --- fusion, files, batches ------------------------------------------------------------------------------------------


def test_disjoint_adapters_add_up_and_keep_their_channels() -> None:
    one = ChannelBlock("input", channels(0, 4), random(5, 2, seed=7))
    other = ChannelBlock("input", channels(1, 3), random(5, 2, seed=8))
    x = random(4, 6, seed=9)
    merged = torch.zeros(5, 6)
    merged[:, [0, 4]] += 0.5 * one.weight
    merged[:, [1, 3]] += 2.0 * other.weight
    served = 0.5 * delta_rows(one.unit, x, 5) + 2.0 * delta_rows(other.unit, x, 5)
    torch.testing.assert_close(served, x @ merged.T)
    only_ours = torch.zeros(1, 6).index_fill(1, torch.tensor([0, 4]), 1.0)
    assert not delta_rows(other.unit, only_ours, 5).any()


def test_what_is_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    path = "model.layers.1.mlp.down_proj"
    block = ChannelBlock("input", channels(3, 40, 95), random(64, 3, seed=10))
    write_s2ft(tmp_path, base, {path: block})
    adapters = [read_adapter(tmp_path, base) for _ in range(2)]
    answers = []
    for adapter in adapters:
        with applied(model, (adapter, 1.0)):
            answers.append(logits(model, TOKENS))
    assert torch.equal(*answers)
    assert torch.equal(adapters[0].units[path].b, block.weight.T)


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    base = tiny_spec()
    path = "model.layers.0.mlp.up_proj"
    weight = random(2, 4, seed=11).bfloat16()
    digest = write_s2ft(tmp_path, base, {path: ChannelBlock("output", channels(1, 6), weight)}, dtype=torch.bfloat16)
    adapter = read_adapter(tmp_path, base)
    assert adapter.spec.digest == digest
    assert torch.equal(adapter.units[path].a, weight.float())
    assert adapter.spec.nbytes == 2 * 4 * 4 + 2 * 4


def test_a_mixed_batch_answers_as_each_alone() -> None:
    units = {
        1: DeltaUnit(random(4, 16, seed=12), random(4, 12, seed=13), 0.5),
        2: DeltaUnit(None, random(3, 12, seed=14), 1.0, inputs=channels(0, 7, 15)),
        3: DeltaUnit(random(5, 16, seed=15), None, 1.0, outputs=channels(1, 2, 5, 8, 11)),
    }
    table = UnitTable(16, 12)
    for slot, unit in units.items():
        table.bind(slot, unit)
    x, base = random(8, 16, seed=16), random(8, 12, seed=17)
    sets = [((slot, 1.0),) if slot else () for slot in (0, 1, 2, 3, 3, 2, 1, 0)]
    together = base.clone()
    add_delta(together, x, table, DeltaBatch.from_sets(sets))
    for i, members in enumerate(sets):
        wanted = base[i : i + 1].clone()
        if members:
            wanted += delta_rows(units[members[0][0]], x[i : i + 1], 12)
        torch.testing.assert_close(together[i : i + 1], wanted, rtol=1e-4, atol=1e-4)
