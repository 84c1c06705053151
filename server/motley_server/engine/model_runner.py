"""One forward pass: from scheduled sequences to rows of logits.

Owns the key-value cache; knows neither why a sequence was chosen, nor how its adapters came to be bound, nor what
becomes of its logits. Runs on the engine thread, alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike

from motley_bases.base import Base
from motley_bases.kv_cache import KVCache, bytes_per_block
from motley_kernels.adapter_delta import warm_up
from torch import Tensor

from motley_server.engine.input_batch import DeltaBatchCache, InputBatchBuilder
from motley_server.engine.scheduler import Scheduled
from motley_server.engine.sequence import Sequence
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, SamplingParams


class ModelRunner:
    """Run the base under each sequence's own adapters."""

    def __init__(self, base: Base, settings: EngineSettings) -> None:
        self.bytes_per_block = bytes_per_block(base.spec, settings.block_size, base.dtype)
        self.num_blocks = settings.kv_cache_bytes // self.bytes_per_block
        if self.num_blocks < 1:
            raise ValueError(f"{settings.kv_cache_bytes} bytes of KV cache hold no block of {self.bytes_per_block}")
        self.num_forward_passes = 0
        self._base = base
        self._kv = KVCache.allocate(
            base.spec, self.num_blocks, settings.block_size, dtype=base.dtype, device=base.device
        )
        self._builder = InputBatchBuilder(settings.block_size, base.device)
        self._delta_batches = DeltaBatchCache(base.device)

    def run(self, scheduled: ListLike[Scheduled]) -> list[Tensor]:
        """Compute the scheduled tokens and return each sequence's wanted rows of logits.

        Shapes: [S, V] float32 a sequence, views of one tensor; S is 0 for a prompt that does not catch up in this pass.
        """
        batch = self._builder.build(scheduled)
        sets = [entry.sequence.pins.members if entry.sequence.pins is not None else () for entry in scheduled]
        self._base.sites.set_batch(*self._delta_batches.views(sets, batch))
        self.num_forward_passes += 1
        logits = self._base.forward(batch.input_ids, batch.positions, batch.paged, self._kv, batch.logit_rows)
        return list(logits[: sum(batch.logit_counts)].split(batch.logit_counts))

    def warm_up(self) -> None:
        """Run a prompt, a decoding step and a delta on scratch, so that the first request pays for no first call."""
        warm_up(self._base.device, self._base.dtype)
        num_tokens = min(8, self.num_blocks * self._kv.block_size)
        request = GenerateRequest("warm-up", "", (0,) * num_tokens, SamplingParams(max_new_tokens=1))
        sequence = Sequence(request, 0, b"")
        sequence.block_table = array("q", range(-(-num_tokens // self._kv.block_size)))
        self.run([Scheduled(sequence, num_tokens)])
        sequence.num_computed_tokens = num_tokens - 1
        self.run([Scheduled(sequence, 1)])
        self.num_forward_passes = 0
