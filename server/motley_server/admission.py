"""Admission: from what a caller asked for to a request in the engine's mailbox, or a typed error that names the field.

Turns prompts into token ids, names into held versions, fills in every default, and counts what a caller's quota
limits. A hold and a place taken here are given back exactly once: by the engine's `on_end`, or at once if the request
never reached it. Knows no protobuf. Runs on the event loop's thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from motley_bases.spec import BaseSpec

from motley_server.asked import (
    AskedGeneration,
    AskedScoring,
    Caller,
    ChatPrompt,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from motley_server.engine.api import EngineFront, EventStream
from motley_server.engine.types import GenerateRequest, SamplingParams
from motley_server.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    MotleyError,
    UnimplementedError,
)
from motley_server.library.sets import AdapterSets, HeldSet
from motley_server.lifecycle import draining
from motley_server.quotas import Place, Quotas
from motley_server.sampling import SamplingFacts, check_token_id, fill_sampling
from motley_server.tokenizer import Tokenizer, TokenizerThread

MAX_CONTINUATIONS = 64
MAX_CHAT_TURNS = 4096
TURN_CHARACTERS = 64  # what rendering a turn costs beside its text, in characters of it


class RefusalObserver(Protocol):
    """Who counts the requests that never reached the engine."""

    def request_refused(self) -> None:
        """Take note of one."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What a caller may ask for."""

    context_length: int  # tokens of prompt and answer together
    max_prompt_bytes: int
    default_max_new_tokens: int

    @property
    def max_detokenized(self) -> int:
        """Return how many ids become text at once: those of the longest text, where every byte may be a token."""
        return max(self.context_length, self.max_prompt_bytes)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has taken, and its events."""

    request: GenerateRequest
    events: EventStream


class Admission:
    """Check requests and hand them to the engine."""

    def __init__(
        self,
        engine: EngineFront,
        base: BaseSpec,
        tokenizer: Tokenizer,
        adapter_sets: AdapterSets,
        limits: AdmissionLimits,
        observer: RefusalObserver,
        quotas: Quotas,
    ) -> None:
        self.limits = limits
        self._engine = engine
        self._base = base
        self._tokenizer = tokenizer
        self._tokenizer_thread = TokenizerThread()
        self._adapter_sets = adapter_sets
        self._observer = observer
        self._quotas = quotas
        self._sampling_facts = SamplingFacts(base.generation, base.vocab_size, limits.default_max_new_tokens)
        self._serial = itertools.count(1)

    async def generate(self, asked: AskedGeneration, caller: Caller) -> Admitted:
        """Admit a request to generate.

        Raises: InvalidArgumentError, NotFoundError, FailedPreconditionError, ResourceExhaustedError,
        DeadlineExceededError, UnavailableError.
        """
        with self.counting_refusals():
            self._check_open(caller)
            if asked.is_constrained:
                message = "structured output is not built in this version"
                raise UnimplementedError(message, reason="STRUCTURED_OUTPUT_NOT_BUILT", field="structured_output")
            with self._quotas.enter(caller.tenant_id, caller.quota) as place:
                ids = await self.tokenize(asked.prompt)
                self._check_length(len(ids), "prompt", room=1)
                sampling = fill_sampling(
                    asked.sampling, self._sampling_facts, num_free_tokens=self.limits.context_length - len(ids)
                )
                place.charge(len(ids) + sampling.n * sampling.max_new_tokens)
                with await self._adapter_sets.take(asked.adapters, caller) as held:
                    return self._submit(self._request(caller, ids, sampling, held), place, held)

    async def score(self, asked: AskedScoring, caller: Caller) -> list[Admitted]:
        """Admit the scoring of each continuation, as a request of its own: all of them or none.

        Semantics: a continuation is encoded by itself, without special tokens, and appended to the prompt's ids, so its
        score does not depend on how a tokenizer would have merged across the border.
        Raises: as `generate`.
        """
        with self.counting_refusals():
            self._check_open(caller)
            if not 1 <= len(asked.continuations) <= MAX_CONTINUATIONS:
                message = f"{len(asked.continuations)} continuations; 1 to {MAX_CONTINUATIONS} are allowed"
                raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="continuations")
            with self._quotas.enter(caller.tenant_id, caller.quota) as place:
                prompt = await self.tokenize(asked.prompt)
                endings = [await self._tokenize_continuation(i, text) for i, text in enumerate(asked.continuations)]
                for index, ending in enumerate(endings):
                    self._check_length(len(prompt) + len(ending), f"continuations[{index}]", room=0)
                place.charge(sum(len(prompt) + len(ending) for ending in endings))
                sampling = SamplingParams(max_new_tokens=0, logprobs=1)
                with await self._adapter_sets.take(asked.adapters, caller) as held:
                    requests = [self._request(caller, prompt + ending, sampling, held) for ending in endings]
                    return await self._submit_scorings(requests, len(prompt), place, held)

    @contextmanager
    def counting(self, caller: Caller) -> Iterator[None]:
        """Count what happens in a block as a request that needs no engine.

        Raises: UnavailableError, ResourceExhaustedError.
        """
        self.check_open()
        with self._quotas.admit(caller.tenant_id, caller.quota, num_tokens=0) as place:
            yield
            place.use(0)

    def count(self, caller: Caller) -> None:
        """Count a call that does not go to the engine as a request in this minute, but as none in flight.

        Semantics: what a worker does for a tenant's job is no request of the tenant's.
        Raises: UnavailableError, ResourceExhaustedError (reason=QUOTA_REQUESTS_PER_MINUTE).
        """
        self.check_open()
        if caller.lease is not None:
            return
        quota = replace(caller.quota, requests_in_flight=None)
        with self._quotas.admit(caller.tenant_id, quota, num_tokens=0) as place:
            place.use(0)

    async def tokenize(self, prompt: Prompt | None) -> tuple[int, ...]:
        """Return the ids of a prompt, special tokens included.

        Raises: InvalidArgumentError; FailedPreconditionError for a conversation where the base has no template.
        """
        if isinstance(prompt, TokenPrompt):
            self._check_not_empty(prompt.token_ids)
            self.check_token_ids(prompt.token_ids, "prompt.tokens.ids")
            return prompt.token_ids
        if isinstance(prompt, TextPrompt):
            text = prompt.text
            self._check_not_empty(text)
            self._check_bytes([text], "prompt")
            return await self._encode(text, add_special_tokens=True)
        if isinstance(prompt, ChatPrompt):
            self._check_not_empty(prompt.turns)
            if len(prompt.turns) > MAX_CHAT_TURNS:
                message = f"{len(prompt.turns)} turns; {MAX_CHAT_TURNS} are allowed"
                raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="prompt.chat.messages")
            parts = [part for turn in prompt.turns for part in (turn.role, turn.content)]
            self._check_bytes(parts, "prompt")
            size = sum(map(len, parts)) + TURN_CHARACTERS * len(prompt.turns)
            rendered = await self._tokenizer_thread.run(size, lambda: self._tokenizer.render_chat(prompt.turns))
            self._check_not_empty(rendered)
            return await self._encode(rendered, add_special_tokens=False)
        raise InvalidArgumentError("one of text, chat and tokens must be set", reason="PROMPT_REQUIRED", field="prompt")

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        """Return the text of ids.

        Raises: InvalidArgumentError for an id outside the vocabulary.
        """

        def check_and_decode() -> str:
            self.check_token_ids(ids, "ids")
            return self._tokenizer.decode(ids)

        return await self._tokenizer_thread.run(len(ids), check_and_decode)

    def check_token_ids(self, ids: Sequence[int], field: str) -> None:
        """Refuse ids that the base does not have."""
        vocab_size = self._base.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            index = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
            check_token_id(ids[index], f"{field}[{index}]", vocab_size)

    def check_open(self) -> None:
        """Refuse everybody while the server is being emptied.

        Raises: UnavailableError (reason=DRAINING).
        """
        if self._engine.is_draining:
            raise draining()

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count a typed error as a request that never reached the engine."""
        try:
            yield
        except MotleyError:
            self._observer.request_refused()
            raise

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._tokenizer_thread.close()

    def _check_open(self, caller: Caller) -> None:
        self.check_open()
        if caller.deadline is not None and time.monotonic() >= caller.deadline:
            raise DeadlineExceededError("the deadline had passed when the request arrived", reason="DEADLINE_PASSED")

    async def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        ids = await self._tokenizer_thread.run(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )
        return tuple(ids)

    async def _tokenize_continuation(self, index: int, text: str) -> tuple[int, ...]:
        field = f"continuations[{index}]"
        self._check_bytes([text], field)
        ids = await self._encode(text, add_special_tokens=False)
        if not ids:
            raise InvalidArgumentError("a continuation without a token", reason="EMPTY_CONTINUATION", field=field)
        return ids

    def _check_not_empty(self, content: Sequence[object]) -> None:
        if not content:
            raise InvalidArgumentError("the prompt is empty", reason="EMPTY_PROMPT", field="prompt")

    def _check_bytes(self, texts: Sequence[str], field: str) -> None:
        num_bytes = sum(len(text.encode()) for text in texts)
        if num_bytes > self.limits.max_prompt_bytes:
            message = f"{num_bytes} bytes; {self.limits.max_prompt_bytes} are allowed"
            raise InvalidArgumentError(message, reason="PROMPT_TOO_LARGE", field=field)

    def _check_length(self, num_tokens: int, field: str, *, room: int) -> None:
        if num_tokens + room > self.limits.context_length:
            message = f"{num_tokens} tokens do not fit a context of {self.limits.context_length}" + (
                " with room for an answer" if room else ""
            )
            raise InvalidArgumentError(message, reason="CONTEXT_EXCEEDED", field=field)

    def _request(
        self, caller: Caller, ids: tuple[int, ...], sampling: SamplingParams, held: HeldSet
    ) -> GenerateRequest:
        return GenerateRequest(
            # Callers choose request ids, and one call may be many requests: the engine's are ours, and unique.
            request_id=f"{caller.request_id}/{next(self._serial)}",
            tenant_id=caller.tenant_id,
            prompt_token_ids=ids,
            sampling=sampling,
            adapters=held.adapters,
            deadline=caller.deadline,
            weight=caller.quota.weight,
        )

    async def _submit_scorings(
        self, requests: Sequence[GenerateRequest], num_context_tokens: int, place: Place, held: HeldSet
    ) -> list[Admitted]:
        admitted: list[Admitted] = []
        try:
            for request in requests:
                scoring = replace(request, prompt_logprobs=True, num_context_tokens=num_context_tokens)
                admitted.append(self._submit(scoring, place, held))
        except BaseException:
            for one in admitted:
                await one.events.aclose()
            raise
        return admitted

    def _submit(self, request: GenerateRequest, place: Place, held: HeldSet) -> Admitted:
        def give_back() -> None:
            place.leave()
            held.leave()

        def end(num_generated_tokens: int) -> None:
            place.use(len(request.prompt_token_ids) + num_generated_tokens)
            give_back()

        place.join()
        held.join(partial(self._engine.cancel, request.request_id))
        try:
            return Admitted(request, self._engine.submit(request, end))
        except BaseException:
            give_back()
            raise
