"""The attention that a served model calls: transformers' interface on one side, our paged kernel on the other.

The batch arrives as a keyword of the model's own forward and is passed down by its modelling code, so nothing here is
global but the entry in transformers' registry, which is a pure function. Runs on the engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from motley_kernels.paged_attention import paged_attention
from motley_kernels.paged_attention.types import PagedBatch
from torch import Tensor, nn
from transformers import AttentionInterface

from motley_bases.errors import UnsupportedBaseError
from motley_bases.kv_cache import KVCache

ATTENTION_NAME = "motley_paged"
CONTEXT_KEYWORD = "motley_attention"
# Requests for outputs that serving does not read: they change nothing of what attention computes.
OUTPUT_FLAGS = frozenset({"output_attentions", "output_hidden_states", "output_router_logits"})


class AttentionContext(Protocol):
    """What one forward pass attends with."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Keep the new keys and values of a layer, and return the attention's output.

        Shapes: q [T, H, D], k and v [T, K, D]; returns [T, H, D].
        """


@dataclass(frozen=True, eq=False, slots=True)
class PagedContext:
    """Attend over paged keys and values: what serving uses."""

    batch: PagedBatch
    kv: KVCache

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write the new keys and values into the layer's blocks, then attend over the sequences' blocks."""
        return paged_attention(
            q, k, v, self.kv.layers[layer], self.batch, scale=scale, sliding_window=sliding_window, softcap=softcap
        )


def register_attention() -> None:
    """Enter our function in transformers' attention registry; again is harmless.

    Semantics: in AttentionInterface alone. A name that the mask registry does not know makes transformers build no mask
    at all, which is what packed sequences need: causality and windows are the kernel's.
    """
    AttentionInterface.register(ATTENTION_NAME, attend_packed)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    use_cache: bool | None = None,
    position_ids: Tensor | None = None,
    motley_attention: AttentionContext | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """Attend over packed sequences, as transformers calls an attention function.

    Semantics: `position_ids` were applied before (RoPE) and are not needed again. Whatever else a model passes would
    change what attention means (sinks, biases, other masks), so anything unknown that is not None is refused.
    Shapes: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D].
    Raises: UnsupportedBaseError naming the keyword.
    """
    if motley_attention is None:
        raise _refuse(module, CONTEXT_KEYWORD, "is missing: the model does not pass its keywords down to attention")
    if attention_mask is not None:
        raise _refuse(module, "attention_mask", "was built by the model and would be ignored")
    if dropout:
        raise _refuse(module, "dropout", "is not zero: the model is not in eval mode")
    if use_cache:
        raise _refuse(module, "use_cache", "asks for a cache beside the paged one")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise _refuse(module, "is_causal", "is false: tokens would see later tokens")
    for keyword, given in unknown.items():
        if given is not None and keyword not in OUTPUT_FLAGS:
            raise _refuse(module, keyword, "is not understood by the paged attention")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise _refuse(module, "layer_idx", "is missing: the layer cannot be told")
    output = motley_attention.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


def _refuse(module: nn.Module, keyword: str, why: str) -> UnsupportedBaseError:
    message = f"{type(module).__name__} cannot be served: its attention argument {keyword} {why}"
    return UnsupportedBaseError(message, reason="ATTENTION_ARGUMENT", field=keyword)
