"""One loaded base: its facts, its model with adapter sites in place, its tokenizer, and the one way to run it.

Knows nothing of requests, adapters' names or scheduling. `forward` runs on the engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from motley_kernels.errors import ShapeError
from motley_kernels.paged_attention.types import PagedBatch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motley_bases.attention import CONTEXT_KEYWORD, PagedContext
from motley_bases.kv_cache import KVCache
from motley_bases.linear import DeltaSites
from motley_bases.spec import BaseSpec


@dataclass(frozen=True, eq=False, slots=True)
class Base:
    """A base ready to serve."""

    spec: BaseSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: DeltaSites

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, and so of keys and values."""
        return cast(torch.dtype, getattr(torch, self.spec.dtype))

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.tensor(f"{self.spec.embedding_path}.weight").device

    def tensor(self, name: str) -> Tensor:
        """Return a site's weight or bias by the name the checkpoint gives it (`lm_head.weight`)."""
        path, _, attribute = name.rpartition(".")
        return cast(Tensor, getattr(self.model.get_submodule(path), attribute))

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, paged: PagedBatch, kv: KVCache, logit_rows: Tensor
    ) -> Tensor:
        """Run one packed forward pass and return the logits of some of its rows.

        Semantics: adapters act as `sites.set_batch` last said; the logits are the model's own, final soft cap included.
        Shapes: input_ids [T], positions [T], logit_rows [S] int64; returns [S, V] float32.
        Effects: writes the new tokens' keys and values into `kv`.
        Raises: ShapeError if the sites' batch is not for T tokens and S sampled rows.
        """
        self._check_rows(len(input_ids), len(logit_rows))
        forward = cast(Any, self.model)
        output = forward(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            **{CONTEXT_KEYWORD: PagedContext(paged, kv)},
        )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _check_rows(self, num_tokens: int, num_sampled: int) -> None:
        """Refuse a delta batch left over from another composition: it would give rows the wrong adapters."""
        binding = self.sites.binding
        for batch, num_rows, what in (
            (binding.tokens, num_tokens, "tokens"),
            (binding.sampled, num_sampled, "sampled"),
        ):
            if batch is not None and batch.num_tokens != num_rows:
                raise ShapeError(f"the {what} batch is for {batch.num_tokens} rows, the pass has {num_rows}")
