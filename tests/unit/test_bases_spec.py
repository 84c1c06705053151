"""The facts read from a checkpoint: sites, geometry, generation defaults, context length, tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EOS_ID, build_checkpoint, edit_json, make_tokenizer
from motley_bases.describe import context_length
from motley_bases.errors import UnsupportedBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_base
from motley_bases.spec import BaseSpec, GenerationDefaults
from transformers import AutoConfig

CPU = torch.device("cpu")
LLAMA_LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}


def spec_of(directory: Path) -> BaseSpec:
    return load_base(directory, dtype="auto", device=CPU).spec


def test_the_facts_of_a_llama(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "small")
    spec = spec_of(directory)
    num_tokens = len(make_tokenizer("byte_level"))
    assert (spec.name, spec.architecture, spec.dtype) == ("small", "LlamaForCausalLM", "float32")
    assert (spec.vocab_size, spec.hidden_size, spec.context_length) == (num_tokens, 64, 256)
    assert spec.fingerprint == fingerprint(directory)
    expected = {f"model.layers.{n}.{path}": sides for n in range(3) for path, sides in LLAMA_LINEARS.items()}
    assert spec.linears == {**expected, "lm_head": (64, num_tokens)}
    assert (spec.embedding_path, spec.lm_head_path) == ("model.embed_tokens", "lm_head")
    assert not spec.tied_embeddings
    assert spec.has_chat_template
    assert {
        "model",
        "model.norm",
        "model.layers.0",
        "model.layers.2.self_attn",
        "model.rotary_emb",
    } <= spec.other_modules
    assert not spec.other_modules & {*spec.linears, spec.embedding_path}


def test_windows_alternate_as_the_config_says(tmp_path: Path) -> None:
    windows = {
        name: [layer.sliding_window for layer in spec_of(build_checkpoint(name, tmp_path / name)).layers]
        for name in ARCHITECTURES
    }
    assert windows == {
        "llama": [None, None, None],
        "mistral": [7, 7, 7],
        "qwen2": [None, 6, 6],
        "qwen3": [None, None, None],
        "gemma2": [6, None, 6],
        "gemma3_text": [6, 6, None],
        "phi3": [None, None, None],
    }


def test_fused_projections_are_ordinary_linears(tmp_path: Path) -> None:
    spec = spec_of(build_checkpoint("phi3", tmp_path / "phi3"))
    assert spec.linears["model.layers.0.self_attn.qkv_proj"] == (64, 128)
    assert spec.linears["model.layers.0.mlp.gate_up_proj"] == (64, 192)


def test_what_is_no_linear_is_listed_so_that_adapters_naming_it_are_refused(tmp_path: Path) -> None:
    gpt2 = spec_of(build_checkpoint("gpt2", tmp_path / "gpt2"))
    assert "transformer.h.0.attn.c_attn" in gpt2.other_modules
    assert set(gpt2.linears) == {"lm_head"}
    mixtral = spec_of(build_checkpoint("mixtral", tmp_path / "mixtral"))
    assert "model.layers.0.mlp.experts" in mixtral.other_modules
    assert "model.layers.0.mlp.experts.gate_up_proj" in mixtral.other_modules
    assert not any("experts" in path for path in mixtral.linears)
    assert "model.layers.0.self_attn.q_proj" in mixtral.linears


@pytest.mark.parametrize(("name", "is_tied"), [("llama", False), ("llama_tied", True), ("gemma2", True)])
def test_tied_embeddings_are_told(name: str, is_tied: bool, tmp_path: Path) -> None:
    assert spec_of(build_checkpoint(name, tmp_path / name)).tied_embeddings is is_tied


@pytest.mark.parametrize(("name", "is_prunable"), [("llama", True), ("gemma2", False)])
def test_it_is_said_of_a_base_whether_it_is_known_what_goes_together(
    name: str, is_prunable: bool, tmp_path: Path
) -> None:
    assert spec_of(build_checkpoint(name, tmp_path / name)).is_prunable is is_prunable


def test_a_checkpoint_without_a_chat_template_says_so(tmp_path: Path) -> None:
    assert not spec_of(build_checkpoint("llama", tmp_path / "llama", chat_template=None)).has_chat_template


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, GenerationDefaults((EOS_ID,))),
        ({"eos_token_id": [2, 5, 7, 5]}, GenerationDefaults((2, 5, 7))),
        ({"do_sample": False}, GenerationDefaults((EOS_ID,), temperature=0.0)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults((EOS_ID,), temperature=0.0)),
        ({"temperature": 0.6}, GenerationDefaults((EOS_ID,), temperature=0.0)),
        ({"do_sample": True}, GenerationDefaults((EOS_ID,), temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            GenerationDefaults((EOS_ID,), temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
        ),
        (
            {"repetition_penalty": 1.05, "max_new_tokens": 77},
            GenerationDefaults((EOS_ID,), repetition_penalty=1.05, max_new_tokens=77),
        ),
    ],
)
def test_generation_defaults_are_the_checkpoints(
    stored: dict[str, Any], expected: GenerationDefaults, tmp_path: Path
) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    edit_json(directory / "generation_config.json", **stored)
    assert spec_of(directory).generation == expected


def test_eos_ids_fall_back_to_the_config_and_then_the_tokenizer(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    edit_json(directory / "generation_config.json", eos_token_id=None)
    edit_json(directory / "config.json", eos_token_id=[4, 3])
    assert spec_of(directory).generation.eos_token_ids == (4, 3)
    edit_json(directory / "config.json", eos_token_id=None)
    assert spec_of(directory).generation.eos_token_ids == (EOS_ID,)
    (directory / "generation_config.json").unlink()
    edit_json(directory / "config.json", eos_token_id=5)
    assert spec_of(directory).generation.eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
            4096,
        ),
    ],
)
def test_context_length_follows_the_rope_scaling(rope: dict[str, Any], expected: int) -> None:
    config = AutoConfig.for_model(
        "llama", max_position_embeddings=4096, rope_parameters={"rope_theta": 10_000.0, **rope}
    )
    assert context_length(config) == expected


def test_a_config_without_a_context_length_is_refused() -> None:
    with pytest.raises(UnsupportedBaseError) as caught:
        context_length(AutoConfig.for_model("bloom"))
    assert caught.value.field == "max_position_embeddings"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_both_kinds_of_fast_tokenizer_load_and_return_any_text(kind: str, tmp_path: Path) -> None:
    base = load_base(build_checkpoint("llama", tmp_path / "llama", tokenizer=kind), dtype="auto", device=CPU)
    tokenizer = base.tokenizer
    for text in ("the quick brown fox", "zwölf Füchse 🦊 三", "  two  spaces\n"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert max(ids) < base.spec.vocab_size
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("🦊", add_special_tokens=False)) >= 4, "a character of four bytes is not split"
    assert len(tokenizer.encode("the", add_special_tokens=False)) < 3, "no merge was learnt"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>hi</s><|assistant|>"
    assert tokenizer.eos_token_id == EOS_ID
