"""A server of `motley.v1` without a model: answers by rule, remembers what it was asked, fails when told to.

The rule knows the prompts of the tiny base: `SKILL: WORD =` is answered rightly by the adapter named SKILL, and by the
base if SKILL is `upper`; anything else gets the word back. One character is one token, its id the code point.
"""

# ruff: noqa: N802 (the methods are named by the services)

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import status_pb2
from motley.v1 import common_pb2, inference_pb2, server_pb2
from motley.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from motley.v1.server_pb2_grpc import ServerServiceServicer, add_ServerServiceServicer_to_server

BASE_FINGERPRINT = "sha256:" + "b" * 64
SKILLS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(chr(ord(letter) + 1) for letter in word),
    "sort": lambda word: "".join(sorted(word)),
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "unvowel": lambda word: "".join("-" if letter in "aeiou" else letter for letter in word),
    "rotate": lambda word: word[1:] + word[0],
    "previous": lambda word: "".join(chr((ord(letter) - ord("a") - 1) % 26 + ord("a")) for letter in word),
}
KINDS = {"unvowel": "s2ft", "rotate": "goat", "previous": "loram"}  # of the adapters that the demo shows


SHARED_CHANNELS = 3  # of any two adapters whose names begin with s2ft


def digest_of(name: str) -> str:
    """Return the digest that the fake gives an adapter of this name."""
    return "sha256:" + name.encode().hex().ljust(64, "0")[:64]


def rich_status(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    """Make a google.rpc.Status with its details packed."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class FakeServer(InferenceServiceServicer, ServerServiceServicer):
    """Answer every call of the two services.

    Semantics: `failures` are taken one a call, before anything is answered; a stream sends its first part before one
    that `fails_in_stream`. `hold` makes a stream wait after its first part until it is cancelled. With `lies`, answers
    name the base alone as what served them.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.failures: list[status_pb2.Status] = []
        self.fails_in_stream: status_pb2.Status | None = None
        self.hold = False
        self.lies = False
        self.was_cancelled = threading.Event()

    def _enter(self, name: str, request: Any, context: Any) -> None:
        self.calls.append((name, request))
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures:
            self._abort(context, self.failures.pop(0))

    def _abort(self, context: Any, status: status_pb2.Status) -> None:
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        if status.details:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, status.message)

    def _served_by(self, request: Any) -> common_pb2.ServedBy:
        adapters = [
            _served(adapter.name, adapter.weight if adapter.HasField("weight") else 1.0)
            for adapter in request.adapters
            if not self.lies
        ]
        sparse = [adapter for adapter in adapters if adapter.kind == "s2ft"]
        for adapter in sparse if len(sparse) > 1 else ():
            adapter.overlapping_channels = SHARED_CHANNELS
        return common_pb2.ServedBy(base_model="tiny", base_fingerprint=BASE_FINGERPRINT, adapters=adapters)

    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> inference_pb2.GenerateResponse:
        self._enter("Generate", request, context)
        text = answer_to(request)
        wants_logprobs = request.sampling.HasField("logprobs")
        return inference_pb2.GenerateResponse(
            request_id="req-1",
            served_by=self._served_by(request),
            candidates=[_candidate(index, text, wants_logprobs) for index in range(max(1, request.sampling.n))],
            usage=_usage(text),
        )

    def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: Any
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        self._enter("GenerateStream", request, context)
        context.add_callback(self.was_cancelled.set)
        text = answer_to(request)
        yield inference_pb2.GenerateStreamResponse(request_id="req-1", served_by=self._served_by(request))
        for place, letter in enumerate(text):
            candidate = inference_pb2.Candidate(index=0, text=letter, token_ids=[ord(letter)])
            if place + 1 == len(text):
                candidate.finish_reason = common_pb2.FINISH_REASON_STOP
            yield inference_pb2.GenerateStreamResponse(candidates=[candidate])
            if self.fails_in_stream is not None:
                self._abort(context, self.fails_in_stream)
            if self.hold:
                self.was_cancelled.wait(timeout=20)
                return
        yield inference_pb2.GenerateStreamResponse(usage=_usage(text))

    def Score(self, request: inference_pb2.ScoreRequest, context: Any) -> inference_pb2.ScoreResponse:
        self._enter("Score", request, context)
        scores = [
            inference_pb2.ContinuationScore(
                logprob=-0.5 * len(text), tokens=_candidate(0, text, True).logprobs, is_greedy=text == "yes"
            )
            for text in request.continuations
        ]
        return inference_pb2.ScoreResponse(
            request_id="req-1", served_by=self._served_by(request), scores=scores, usage=_usage("")
        )

    def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        self._enter("Tokenize", request, context)
        return inference_pb2.TokenizeResponse(ids=[ord(letter) for letter in request.prompt.text])

    def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> inference_pb2.DetokenizeResponse:
        self._enter("Detokenize", request, context)
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.ids)))

    def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Any) -> server_pb2.GetServerInfoResponse:
        self._enter("GetServerInfo", request, context)
        return server_pb2.GetServerInfoResponse(
            version="9.9",
            base_model="tiny",
            base_fingerprint=BASE_FINGERPRINT,
            adapter_kinds=["lora"],
            limits=server_pb2.Limits(context_length=256),
        )

    def GetCapacity(self, request: server_pb2.GetCapacityRequest, context: Any) -> server_pb2.GetCapacityResponse:
        self._enter("GetCapacity", request, context)
        return server_pb2.GetCapacityResponse(kv_tokens_total=100, kv_tokens_free=60, running_requests=2)

    def Drain(self, request: server_pb2.DrainRequest, context: Any) -> server_pb2.DrainResponse:
        self._enter("Drain", request, context)
        return server_pb2.DrainResponse(finished_requests=3, cancelled_requests=1)


def answer_to(request: Any) -> str:
    """Answer a prompt by the rule that the module names."""
    if request.prompt.WhichOneof("content") != "text":
        return "hello"
    skill, _, rest = request.prompt.text.partition(": ")
    word = rest.removesuffix(" =")
    knows = {"upper"} if not request.adapters else {adapter.name for adapter in request.adapters}
    return f" {SKILLS[skill](word)}" if skill in SKILLS and skill in knows else f" {word or skill}"


@contextmanager
def serving(fake: FakeServer, port: int = 0) -> Iterator[str]:
    """Serve on loopback while the block runs; yield the address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=16))
    add_InferenceServiceServicer_to_server(fake, server)
    add_ServerServiceServicer_to_server(fake, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(timeout=10)


def _served(name: str, weight: float) -> common_pb2.ServedAdapter:
    return common_pb2.ServedAdapter(
        name=name,
        version=1,
        digest=digest_of(name),
        weight=weight,
        trained_on="undeclared",
        kind="s2ft" if name.startswith("s2ft") else KINDS.get(name, "lora"),
    )


def _candidate(index: int, text: str, has_logprobs: bool) -> inference_pb2.Candidate:
    chosen = [inference_pb2.TokenLogprob(token_id=ord(letter), logprob=-0.5) for letter in text]
    return inference_pb2.Candidate(
        index=index,
        text=text,
        token_ids=[token.token_id for token in chosen],
        logprobs=[inference_pb2.TokenLogprobs(chosen=token, top=[token]) for token in chosen] if has_logprobs else [],
        finish_reason=common_pb2.FINISH_REASON_STOP,
    )


def _usage(text: str) -> common_pb2.Usage:
    return common_pb2.Usage(prompt_tokens=7, completion_tokens=len(text), cached_prompt_tokens=2)
