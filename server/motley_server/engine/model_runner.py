"""One forward pass: from scheduled sequences to rows of logits.

Owns the key-value cache and which adapters are bound to the model; knows neither why a sequence was chosen nor what
becomes of its logits. Runs on the engine thread, alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike
from itertools import count

from motley_adapters.cache import AdapterCache
from motley_bases.base import Base
from motley_bases.kv_cache import KVCache, bytes_per_block
from torch import Tensor

from motley_server.engine.input_batch import DeltaBatchCache, InputBatchBuilder, UnitSet
from motley_server.engine.scheduler import Scheduled
from motley_server.engine.sequence import Sequence
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, SamplingParams


class ModelRunner:
    """Run the base under each sequence's own adapters."""

    def __init__(self, base: Base, adapters: AdapterCache, settings: EngineSettings) -> None:
        self.bytes_per_block = bytes_per_block(base.spec, settings.block_size, base.dtype)
        self.num_blocks = settings.kv_cache_bytes // self.bytes_per_block
        if self.num_blocks < 1:
            raise ValueError(f"{settings.kv_cache_bytes} bytes of KV cache hold no block of {self.bytes_per_block}")
        self.num_forward_passes = 0
        self._base = base
        self._adapters = adapters
        self._kv = KVCache.allocate(
            base.spec, self.num_blocks, settings.block_size, dtype=base.dtype, device=base.device
        )
        self._builder = InputBatchBuilder(settings.block_size, base.device)
        self._delta_batches = DeltaBatchCache(base.device)
        self._slots: dict[str, int] = {}
        self._fresh_slots = count()

    def run(self, scheduled: ListLike[Scheduled]) -> list[Tensor]:
        """Compute the scheduled tokens and return each sequence's wanted rows of logits.

        Shapes: [S, V] float32 a sequence, views of one tensor; S is 0 for a prompt that does not catch up in this pass.
        """
        batch = self._builder.build(scheduled)
        sets = [self._unit_set(entry.sequence) for entry in scheduled]
        self._base.sites.set_batch(*self._delta_batches.views(sets, batch))
        self.num_forward_passes += 1
        logits = self._base.forward(batch.input_ids, batch.positions, batch.paged, self._kv, batch.logit_rows)
        return list(logits[: sum(batch.logit_counts)].split(batch.logit_counts))

    def warm_up(self) -> None:
        """Run a prompt and a decoding step through scratch blocks, so that the first request pays for no first call."""
        num_tokens = min(8, self.num_blocks * self._kv.block_size)
        request = GenerateRequest("warm-up", "", (0,) * num_tokens, SamplingParams(max_new_tokens=1))
        sequence = Sequence(request, 0, b"")
        sequence.block_table = array("q", range(-(-num_tokens // self._kv.block_size)))
        self.run([Scheduled(sequence, num_tokens)])
        sequence.num_computed_tokens = num_tokens - 1
        self.run([Scheduled(sequence, 1)])
        self.num_forward_passes = 0

    def bind(self, request: GenerateRequest) -> None:
        """Attach the request's adapters to the base, those that are not attached yet, before a step needs them."""
        for adapter in request.adapters:
            if adapter.digest not in self._slots:
                slot = next(self._fresh_slots)
                with self._adapters.acquire(adapter.digest) as lease:
                    units = {path: unit.to(self._base.device) for path, unit in lease.adapter.units.items()}
                self._base.sites.bind(slot, units)
                self._slots[adapter.digest] = slot

    def _unit_set(self, sequence: Sequence) -> UnitSet:
        return tuple((self._slots[adapter.digest], adapter.weight) for adapter in sequence.request.adapters)
