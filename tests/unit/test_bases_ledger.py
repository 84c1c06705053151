"""The ledger's counts, from configs alone, against published ones and against what is allocated."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build_checkpoint, build_model
from held_bytes import held_bytes
from motley_bases.kv_cache import KVCache
from motley_bases.ledger import Ledger, Weights, attention_layers, make_ledger
from motley_bases.loader import load_base, read_parsed_config
from motley_bases.packing import PackedLinear, can_pack, packing_blocks
from motley_bases.pruned_geometry import DecoderShape, PruneRule, num_parameters
from motley_bases.pruned_models import PrunedLlamaConfig
from motley_kernels.adapter_delta.pool import UnitPool
from motley_kernels.adapter_delta.types import DeltaUnit
from pruned_bases import GROUPED_KEEPS, prune_checkpoint, random_keeps
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedConfig

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BF16 = Weights(torch.bfloat16, device=CUDA)

LLAMA_2_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)
LLAMA_31_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 128256)
ROTARY_BYTES = 64 * 4 * 2  # a frequency for each pair of a head's channels, kept twice


def config_of(shape: DecoderShape, make: type[PreTrainedConfig] = LlamaConfig, **fields: Any) -> PreTrainedConfig:
    return make(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=False,
        **fields,
    )


@pytest.mark.parametrize("shape", [LLAMA_2_13B, LLAMA_31_70B])
def test_a_whole_base_takes_its_published_parameters(shape: DecoderShape) -> None:
    ledger = make_ledger(config_of(shape), BF16)
    assert ledger.weight_bytes == 2 * num_parameters(shape) + ROTARY_BYTES
    assert ledger.kv_bytes_per_token == shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * 2


def test_a_pruned_copy_takes_the_parameters_that_its_rule_leaves() -> None:
    rule, shape = PruneRule(Fraction(17, 20)), LLAMA_31_70B
    pruned = rule.pruned_layers(shape.num_layers)
    kv_heads, channels = rule.kept_kv_heads(64, 8), rule.kept_ffn_size(shape.ffn_size)
    sizes = [(kv_heads, channels) if layer in pruned else (8, shape.ffn_size) for layer in range(shape.num_layers)]
    shapes = {"layers": [{"num_heads": 8 * k, "num_kv_heads": k, "ffn_size": f} for k, f in sizes]}
    ledger = make_ledger(config_of(shape, PrunedLlamaConfig, pruned_shapes=shapes), BF16)
    assert ledger.weight_bytes == 2 * 17_849_982_976 + ROTARY_BYTES
    assert ledger.kv_bytes_per_token == (6 * 8 + 74 * 2) * 2 * 128 * 2


def test_nf4_takes_half_a_byte_a_weight_and_its_scales() -> None:
    shape = LLAMA_31_70B
    ledger = make_ledger(config_of(shape), Weights(torch.bfloat16, "nf4", CUDA))
    linears = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    around = 2 * (2 * 128256 * 8192 + 161 * 8192) + ROTARY_BYTES
    per_linear = 4 * (16 + 256 + 1) * 7 * 80
    assert ledger.weight_bytes == linears // 2 + linears // 64 + 4 * linears // (64 * 256) + per_linear + around


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied", "llama_biased", "mixtral", "gpt2"])
def test_every_architecture_takes_what_is_allocated_for_it(architecture: str, tmp_path: Path) -> None:
    base = load_base(build_checkpoint(architecture, tmp_path), dtype="float32", device=CPU)
    config = read_parsed_config(tmp_path)
    assert make_ledger(config, Weights(torch.float32)).weight_bytes == held_bytes(base.model)
    assert attention_layers(config) == base.spec.layers


def test_keys_and_values_take_what_the_cache_allocates(tmp_path: Path) -> None:
    whole = build_checkpoint("llama", tmp_path / "whole")
    for directory in (whole, prune_checkpoint(whole, tmp_path / "pruned", GROUPED_KEEPS)):
        spec = load_base(directory, dtype="float32", device=CPU).spec
        ledger = make_ledger(read_parsed_config(directory), Weights(torch.float32))
        kv = KVCache.allocate(spec, 5, 4, torch.float32, CPU)
        assert sum(layer.key.nbytes + layer.value.nbytes for layer in kv.layers) == 5 * 4 * ledger.kv_bytes_per_token


def test_tokens_come_in_whole_blocks_and_none_from_nothing() -> None:
    ledger = Ledger(0, 10, (), 4)
    assert (ledger.kv_tokens(339), ledger.kv_tokens(339, 16), ledger.kv_tokens(-5)) == (33, 32, 0)


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float32), (CUDA, torch.bfloat16)])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_an_adapter_takes_what_the_pool_lays_out_for_it(device: torch.device, dtype: torch.dtype, rank: int) -> None:
    model = build_model("llama", vocab_size=300)
    ledger = make_ledger(model.config, Weights(torch.bfloat16, device=device))
    pool = UnitPool(256, device=CPU, dtype=dtype)
    units = [DeltaUnit(torch.zeros(rank, i), torch.zeros(rank, o), 1.0) for i, o in ledger.linears]
    assert len(units) == 3 * 7
    assert ledger.adapter_bytes(rank) == pool.extent_bytes(units)


# --- a base of middling size, loaded ---------------------------------------------------------------------------------

MIDDLE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def middles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("middle")
    whole = build_checkpoint("llama", root / "whole", **MIDDLE, dtype=torch.bfloat16)
    tied = build_checkpoint("llama_tied", root / "tied", **MIDDLE, dtype=torch.bfloat16)
    return {"whole": whole, "tied": tied, "pruned": prune_checkpoint(whole, root / "pruned", random_keeps(6, 4, 704))}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["whole", "tied", "pruned"])
def test_a_loaded_base_takes_what_the_ledger_says(middles: dict[str, Path], name: str, quantize: str) -> None:
    base = load_base(middles[name], dtype="auto", device=CPU, quantize=quantize)
    config = read_parsed_config(middles[name])
    ledger = make_ledger(config, Weights(torch.bfloat16, quantize, CPU))
    held = held_bytes(base.model)
    assert ledger.weight_bytes == pytest.approx(held, rel=0.02)
    whole = make_ledger(config, Weights(torch.bfloat16, "none", CPU)).weight_bytes
    assert quantize == "none" or held < 0.7 * whole, "nothing was saved"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("skipped", ["model.layers.0", r"model.layers.[12].mlp", "down_proj", "mlp"])
def test_modules_that_a_checkpoint_keeps_whole_are_counted_whole(
    middles: dict[str, Path], tmp_path: Path, quantize: str, skipped: str
) -> None:
    make: Any = BitsAndBytesConfig
    chosen = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantize == "nf4" else {"load_in_8bit": True}
    config = make(**chosen, llm_int8_skip_modules=["lm_head", skipped])
    model = AutoModelForCausalLM.from_pretrained(
        middles["whole"], dtype=torch.bfloat16, quantization_config=config, device_map={"": CPU}
    )
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((middles["whole"] / file).read_bytes())
    base = load_base(tmp_path, dtype="auto", device=CPU)
    ledger = make_ledger(read_parsed_config(tmp_path), Weights(torch.bfloat16, quantize, CPU))
    assert ledger.weight_bytes == pytest.approx(held_bytes(base.model), rel=0.02)


def test_pruning_a_quarter_takes_a_quarter_of_the_linears(middles: dict[str, Path]) -> None:
    whole, pruned = (make_ledger(read_parsed_config(middles[name]), BF16) for name in ("whole", "pruned"))
    of_whole, of_pruned = (sum(i * o for i, o in ledger.linears) for ledger in (whole, pruned))
    assert of_pruned == of_whole - of_whole // 6 * 5 // 4
    assert whole.weight_bytes - pruned.weight_bytes == 2 * (of_whole - of_pruned)
    assert pruned.kv_bytes_per_token * 4 * 6 == whole.kv_bytes_per_token * (4 + 5 * 3)


def test_a_tied_head_is_held_twice_only_where_it_is_packed(middles: dict[str, Path]) -> None:
    config = read_parsed_config(middles["tied"])
    on_cpu, on_gpu = (make_ledger(config, Weights(torch.bfloat16, device=device)) for device in (CPU, CUDA))
    head = config.vocab_size * config.hidden_size * 2
    more = on_cpu.weight_bytes - on_gpu.weight_bytes
    assert head <= more < 1.2 * head if can_pack(CPU, torch.bfloat16) else more == 0


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this machine does not pack")
@pytest.mark.parametrize("sides", [(1, 1), (96, 64), (33, 65), (704, 31), (200, 257)])
def test_packing_fills_up_to_the_blocks_that_it_was_asked_for(sides: tuple[int, int]) -> None:
    packed = PackedLinear(nn.Linear(*sides, dtype=torch.bfloat16)).packed
    assert packing_blocks().packed_bytes(*sides) == torch.ops.mkldnn._nbytes(packed)


def test_scales_that_are_not_quantized_themselves_are_counted_whole(middles: dict[str, Path], tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_threshold=0.0)
    model = AutoModelForCausalLM.from_pretrained(
        middles["whole"], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    shutil.copytree(middles["whole"], tmp_path / "stored")
    model.save_pretrained(tmp_path / "stored")
    shutil.copy(middles["whole"] / "generation_config.json", tmp_path / "stored")
    base = load_base(tmp_path / "stored", dtype="auto", device=CPU)
    ledger = make_ledger(read_parsed_config(tmp_path / "stored"), Weights(torch.bfloat16, "nf4", CPU))
    assert ledger.weight_bytes == pytest.approx(held_bytes(base.model), rel=0.002)
    assert (
        ledger.weight_bytes
        > make_ledger(read_parsed_config(middles["whole"]), Weights(torch.bfloat16, "nf4")).weight_bytes
    )
