"""What is known of a base model, as frozen facts: no tensors, no model.

Adapters are validated against these facts, the KV cache is sized by them, and `served_by` quotes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer's attention: what its keys and values take, and how far it looks back."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None  # a token sees itself and the window - 1 before it; None sees everything


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's generation_config says; None where it is silent."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None  # 0 when the checkpoint says do_sample=false
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The facts of one base.

    Semantics: `linears` maps a module path as the checkpoint names it (`model.layers.0.self_attn.q_proj`) to
    (in_features, out_features) of every nn.Linear of the decoder, `lm_head` included; `embedding_path` names the token
    embedding, [vocab_size, hidden_size]; `other_modules` are the paths of every other module, so that an adapter naming
    one is refused with a reason. `fingerprint` is "sha256:..." over what is stored, before any quantizer; `pruned_from`
    is that of the original of which a pruned base keeps a part. `is_prunable` says whether it is known which of its
    heads and channels go together, which is so for some families alone.
    """

    name: str
    architecture: str
    fingerprint: str
    dtype: str
    vocab_size: int
    hidden_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    linears: Mapping[str, tuple[int, int]]
    embedding_path: str
    lm_head_path: str
    other_modules: frozenset[str]
    generation: GenerationDefaults
    tied_embeddings: bool
    has_chat_template: bool
    pruned_from: str | None = None
    quantization: str = "none"  # what is held in memory: none, nf4 or int8
    is_prunable: bool = True

    @property
    def identity(self) -> str:
        """Return what keys and values of this base depend on, for caches of them."""
        return f"{self.fingerprint}/{self.quantization}/{self.dtype}"
