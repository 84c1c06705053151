"""What PEFT saves, we read as the function that PEFT computes, module by module."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import spec_of
from motley_adapters.errors import AdapterMismatchError
from motley_adapters.reader import read_adapter
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def build_model(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def train(model: PreTrainedModel, directory: Path, *, seed: int = 0, **fields: Any) -> Any:
    """Let PEFT attach and save an adapter whose factors are far from zero; return PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of saved embeddings and tied weights
        model_with_adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model_with_adapter.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model_with_adapter.save_pretrained(str(directory))
    return model_with_adapter.eval()


def check_parity(model: PreTrainedModel, directory: Path, **fields: Any) -> set[str]:
    """Hold every module's delta against PEFT's own; return the modules that have one."""
    base = spec_of(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = train(model, directory, **fields)
    adapter = read_adapter(directory, base, base_tensor=weights.__getitem__)
    found = set()
    for name, module in trained.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        found.add(name)
        unit = adapter.units[name]
        assert unit.a.dtype == unit.b.dtype == torch.float32
        assert unit.a.is_contiguous()
        assert unit.b.is_contiguous()
        assert (unit.rank, unit.scaling) == (module.r["default"], module.scaling["default"])
        is_embedding = isinstance(module.get_base_layer(), nn.Embedding)
        ours = delta_of(adapter.units[name].a, unit.b, unit.scaling, is_embedding)
        assert ours.abs().max() > 0.1  # nothing is proven by zeros
        theirs = module.get_delta_weight("default").detach()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        check_forward(module, ours, is_embedding)
    assert adapter.units.keys() == found
    assert adapter.spec.ranks == {name: unit.rank for name, unit in adapter.units.items()}
    assert adapter.spec.scalings == {name: unit.scaling for name, unit in adapter.units.items()}
    assert adapter.spec.nbytes == sum(unit.a.nbytes + unit.b.nbytes for unit in adapter.units.values())
    return found


def delta_of(a: Tensor, b: Tensor, scaling: float, is_embedding: bool) -> Tensor:
    delta = scaling * (b.T @ a)
    return delta.T if is_embedding else delta


def check_forward(module: Any, delta: Tensor, is_embedding: bool) -> None:
    weight = module.get_base_layer().weight.detach() + delta
    with torch.no_grad():
        if is_embedding:
            ids = torch.tensor([[0, 5, 36]])
            torch.testing.assert_close(module(ids), nn.functional.embedding(ids, weight), rtol=1e-5, atol=1e-5)
        else:
            x = torch.randn(3, weight.shape[1])
            torch.testing.assert_close(module(x), nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)


ATTENTION_0_AND_2 = r"model\.layers\.[02]\.self_attn\.(q|v)_proj"
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, 6),
    "alpha below rank": ({"r": 6, "lora_alpha": 1, "target_modules": ["down_proj"]}, 3),
    "rsLoRA": ({"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"]}, 3),
    "an expression": ({"r": 2, "target_modules": ATTENTION_0_AND_2}, 4),
    "full paths": ({"r": 2, "target_modules": ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"]}, 2),
    "all-linear": ({"r": 2, "target_modules": "all-linear"}, 21),
    "excluded": ({"r": 2, "target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}, 2),
    "excluded by expression": ({"r": 2, "target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"}, 2),
    "layers": ({"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}, 2),
    "one layer": ({"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
    "gaussian": ({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, 3),
    "orthogonal": ({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, 3),
    "rank and alpha patterns": (
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7, "model.layers.0.self_attn.k_proj": 1},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "k_proj|up_proj": 11},
        },
        9,
    ),
    "patterns under rsLoRA": (
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"self_attn.q_proj": 9},
            "alpha_pattern": {"up_proj": 1},
        },
        6,
    ),
    "keys of a pattern that overlap": (  # in sorted order, the order in which PEFT writes them: the first one counts
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 3},
            "alpha_pattern": {"layers.1.*": 2, "q_proj": 7},
        },
        3,
    ),
    "embedding": ({"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, 4),
    "lm_head": ({"r": 2, "target_modules": ["lm_head", "q_proj"]}, 4),
    "embedding and lm_head by path": (
        {"r": 2, "target_modules": ["model.embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 5}},
        2,
    ),
    "embedding by expression": ({"r": 2, "target_modules": r"(.*\.)?(embed_tokens|lm_head)"}, 2),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_every_delta_is_that_of_peft(case: str, tied: bool, tmp_path: Path) -> None:
    fields, num_modules = CONFIGS[case]
    assert len(check_parity(build_model(tied=tied), tmp_path, **fields)) == num_modules


def test_all_linear_as_a_word_means_what_peft_means_by_it(tmp_path: Path) -> None:
    model = build_model()
    base = spec_of(model)
    train(model, tmp_path, r=2, target_modules="all-linear")
    spelled_out = read_adapter(tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "All-Linear"}))
    assert read_adapter(tmp_path, base).spec.digest == spelled_out.spec.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model().to(dtype)
    base = spec_of(model)
    trained = train(model, tmp_path, r=2, target_modules=["q_proj"]).to(dtype)
    trained.save_pretrained(str(tmp_path))
    unit = read_adapter(tmp_path, base).units["model.layers.0.self_attn.q_proj"]
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(unit.a, layer.lora_A["default"].weight.float())
    assert torch.equal(unit.b, layer.lora_B["default"].weight.float().T)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]])
def test_a_copy_of_the_base_inside_is_ignored_only_if_it_is_the_base(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    model = build_model(tied=tied)
    base = spec_of(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = train(model, tmp_path, r=2, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert read_adapter(tmp_path, base, base_tensor=weights.__getitem__).units

    with pytest.raises(AdapterMismatchError) as unverified:
        read_adapter(tmp_path, base)
    assert unverified.value.reason == "BASE_WEIGHT_UNVERIFIED"

    changed = {name: weight + (weight == weight.max()) for name, weight in weights.items()}
    with pytest.raises(AdapterMismatchError) as differs:
        read_adapter(tmp_path, base, base_tensor=changed.__getitem__)
    assert differs.value.reason == "BASE_WEIGHT_DIFFERS"


def test_a_copy_of_the_base_at_another_precision_is_the_base(tmp_path: Path) -> None:
    model = build_model()
    base = spec_of(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path, r=2, target_modules=["embed_tokens"])
    coarse = {name: weight.bfloat16() for name, weight in weights.items()}
    assert read_adapter(tmp_path, base, base_tensor=coarse.__getitem__).units
