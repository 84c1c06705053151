"""One candidate on its way through the engine, and the request that it belongs to.

Owns token ids, the block table and the counts that follow from them; knows neither tensors nor the scheduler's policy.
Runs on the engine thread.
"""

from __future__ import annotations

import hashlib
from array import array

from motley_server.engine.logit_edits import edits_of
from motley_server.engine.pins import Pins
from motley_server.engine.types import GenerateRequest, SamplingParams, TokenLogprobs


class Sequence:
    """The tokens of one candidate: the prompt's, then those generated.

    Semantics: keys and values of the first `num_computed_tokens` are in the blocks of `block_table`; decoding,
    prefilling in chunks and recomputing after a preemption are all the same thing, catching up with `num_tokens`.
    """

    def __init__(self, request: GenerateRequest, index: int, cache_seed: bytes) -> None:
        self.request = request
        self.index = index
        self.token_ids = array("q", request.prompt_token_ids)
        self.logit_edits = edits_of(request.sampling, request.prompt_token_ids)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when first scheduled
        self.has_started = False
        self.block_table = array("q")
        self.pins: Pins | None = None  # while it runs
        self.num_overtaken = 0  # admissions of later ones under adapters while there was no room for its own
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._cache_seed = cache_seed
        self._block_hashes: list[bytes] = []

    @property
    def params(self) -> SamplingParams:
        """Return the request's sampling parameters."""
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """Return the tokens of prompt and answer."""
        return len(self.token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Return the most tokens that prompt and answer may come to."""
        return self.num_prompt_tokens + (0 if self.request.prompt_logprobs else self.params.max_new_tokens)

    @property
    def num_output_tokens(self) -> int:
        """Return the tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Return the tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_cacheable_tokens(self) -> int:
        """Return how long a cached prefix may be without skipping a row whose logits are wanted."""
        return (self.request.num_context_tokens if self.request.prompt_logprobs else self.num_tokens) - 1

    @property
    def is_decoding(self) -> bool:
        """Tell whether one token is all that is missing before the next is sampled."""
        return self.num_computed_tokens > 0 and self.num_uncomputed_tokens == 1

    def append(self, token_id: int) -> None:
        """Take in a sampled token."""
        self.token_ids.append(token_id)
        if self.logit_edits is not None:
            self.logit_edits.add(token_id)

    def block_hash(self, index: int, block_size: int) -> bytes:
        """Return the hash of a full block: of its tokens, of all before them, and of whose answer they belong to."""
        while len(self._block_hashes) <= index:
            start = len(self._block_hashes) * block_size
            parent = self._block_hashes[-1] if self._block_hashes else self._cache_seed
            tokens = self.token_ids[start : start + block_size].tobytes()
            self._block_hashes.append(hashlib.sha256(parent + tokens).digest())
        return self._block_hashes[index]

    def forget_computed(self) -> None:
        """Start over from the tokens alone, after the blocks were given back."""
        self.block_table = array("q")
        self.num_computed_tokens = 0
        self.prompt_logprobs.clear()
