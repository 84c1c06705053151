"""Build tiny random checkpoints of many architectures, with tokenizers trained on the spot.

They are written by transformers' own save_pretrained and have weights large enough that greedy choices are clear,
norms, biases and embeddings all away from their initial values, and nothing shared between two seeds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
NUM_MERGES = 64

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL},
    "mistral": {"model_type": "mistral", **_SMALL, "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        **_SMALL,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 24},
    "gemma2": {
        "model_type": "gemma2",
        **_SMALL,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_SMALL,
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", **_SMALL, "sliding_window": None},
}
"""The architectures that serving promises, by name."""

VARIANTS: dict[str, dict[str, Any]] = {
    "llama_tied": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "llama_biased": {"model_type": "llama", **_SMALL, "attention_bias": True, "mlp_bias": True},
    "llama_wide_heads": {"model_type": "llama", **_SMALL, "head_dim": 24},
    "llama3_rope": {"model_type": "llama", **_SMALL, "rope_parameters": _LLAMA3_ROPE},
    "llama_dynamic_rope": {
        "model_type": "llama",
        **_SMALL,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    },
    "phi3_longrope": {
        "model_type": "phi3",
        **_SMALL,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
        },
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gptj": {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "lfm2": {
        "model_type": "lfm2",
        **_SMALL,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        **_SMALL,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "head_dim": 16,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_SMALL,
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
"""Other shapes and other families: some served, some there to be refused."""

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "a request names an adapter and the adapter answers",
    "one base, many coats: zwölf Füchse, cinq renards, 三只狐狸",
    "keys and values live in blocks; blocks live in tables",
) * 4


def build_checkpoint(
    name: str,
    directory: Path,
    *,
    tokenizer: str = "byte_level",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    generation: Mapping[str, Any] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint of a named architecture or variant, and return its directory.

    Semantics: `tokenizer` is byte_level or metaspace (SentencePiece's way: byte fall-back, spaces as ▁); `generation`
    replaces fields of generation_config.json; `shard_bytes` splits the weights over files of about that size. The
    vocabulary is exactly the tokenizer's.
    """
    fast = make_tokenizer(tokenizer, chat_template)
    model = build_model(name, vocab_size=len(fast), seed=seed, **config_overrides).to(dtype)
    # generate writes its defaults where nothing was said; stored fields are what the test asked for, and the eos.
    model.generation_config = type(model.generation_config)(**{"eos_token_id": EOS_ID, **(generation or {})})
    directory.mkdir(parents=True, exist_ok=True)
    sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(directory, **sharding)
    fast.save_pretrained(directory)
    return directory


def build_model(name: str, *, vocab_size: int, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """Build a random model of a named architecture or variant, in float32 and eval mode."""
    fields = {**{**ARCHITECTURES, **VARIANTS}[name], **config_overrides}
    config = AutoConfig.for_model(
        **fields, vocab_size=vocab_size, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    return model.eval()


@functools.cache
def make_tokenizer(kind: str, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Train a byte-level or a SentencePiece-style fast tokenizer on a few sentences."""
    trained = {"byte_level": _train_byte_level, "metaspace": _train_metaspace}[kind]()
    trained.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None deletes."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def _train_byte_level() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + len(alphabet) + NUM_MERGES,
        initial_alphabet=sorted(alphabet),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS, trainer)
    return trained


def _train_metaspace() -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    ascii_corpus = [line.encode("ascii", "ignore").decode() for line in _CORPUS]
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + len(byte_tokens) + NUM_MERGES,
        special_tokens=[*SPECIAL_TOKENS, *byte_tokens],
        show_progress=False,
    )
    trained.train_from_iterator(ascii_corpus, trainer)
    # The trainer enters byte tokens as special ones; the model's own vocabulary is where byte fall-back looks them up.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(state))


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw every weight anew, so that nothing sits at a neutral value and greedy choices are clear."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            is_lookup = "embed" in name or "wte" in name or "wpe" in name
            gain = 4.0 if "lm_head" in name else 1.4
            spread = 0.7 if is_lookup else gain * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, spread)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    last_norm = getattr(model.base_model, "norm", None)
    if isinstance(last_norm, nn.Module) and model.config.tie_word_embeddings:
        _quieten_tied_embedding(model.get_input_embeddings(), last_norm)


def _quieten_tied_embedding(embedding: nn.Module, last_norm: nn.Module) -> None:
    """Make a tied embedding small and the last norm large: a loud one makes each token its own likeliest successor."""
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(last_norm.weight, Tensor)
    spread = 0.3 / float(getattr(embedding, "embed_scale", 1.0))
    embedding.weight.normal_(0.0, spread)
    last_norm.weight.add_(4.0 / (embedding.embedding_dim**0.5 * spread))
