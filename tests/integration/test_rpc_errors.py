"""The whole error table over a real wire: code, reason, field and details of each class and bad input, and no trace."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from motley.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2, tenant_pb2, training_pb2
from motley_adapters.errors import AdapterFormatError, AdapterMismatchError, CapacityError
from motley_server import errors
from motley_server.rpc.status import CODES, code_of, to_status
from paper_library import digest_of
from rpc_harness import CONTEXT, VOCABULARY, Refusal, Shell, read_refusal, serving, text_request

Code = grpc.StatusCode
DETAIL_OF_CODE = {
    Code.INVALID_ARGUMENT: "BadRequest",
    Code.NOT_FOUND: "ResourceInfo",
    Code.FAILED_PRECONDITION: "PreconditionFailure",
    Code.RESOURCE_EXHAUSTED: "QuotaFailure",
    Code.UNAVAILABLE: "RetryInfo",
}


def check_clean(refusal: Refusal, request_id: str | None = None) -> None:
    """Check what holds for every refusal."""
    info = refusal.details["RequestInfo"]
    assert isinstance(info, error_details_pb2.RequestInfo)
    assert info.request_id == refusal.request_id == (request_id or refusal.request_id)
    if refusal.code in DETAIL_OF_CODE:
        assert DETAIL_OF_CODE[refusal.code] in refusal.details
    bad = refusal.details.get("BadRequest")
    if isinstance(bad, error_details_pb2.BadRequest):
        assert [violation.field for violation in bad.field_violations] == [refusal.field]
    for word in ("Traceback", ".py", "secret of the house", 'File "'):
        assert word not in refusal.message
        assert word not in str(refusal.details)


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def generate(shell: Shell, request: inference_pb2.GenerateRequest) -> Awaitable[object]:
    return shell.inference.Generate(request, metadata=(("x-request-id", "mine-1"),))


def under(*adapters: str | tuple[str, float]) -> inference_pb2.GenerateRequest:
    refs = [
        common_pb2.AdapterRef(name=one) if isinstance(one, str) else common_pb2.AdapterRef(name=one[0], weight=one[1])
        for one in adapters
    ]
    request = text_request()
    request.adapters.extend(refs)
    return request


def prompting(**content: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(**content))  # type: ignore[arg-type]


def tokens(*ids: int) -> inference_pb2.GenerateRequest:
    return prompting(tokens=inference_pb2.TokenPrompt(ids=ids))


def constrained() -> inference_pb2.GenerateRequest:
    request = text_request()
    request.structured_output.regex = "a*"
    return request


BAD_REQUESTS: dict[str, tuple[inference_pb2.GenerateRequest, Code, str, str]] = {
    "no prompt": (inference_pb2.GenerateRequest(), Code.INVALID_ARGUMENT, "PROMPT_REQUIRED", "prompt"),
    "empty text": (text_request(""), Code.INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt"),
    "no tokens": (tokens(), Code.INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt"),
    "no turns": (prompting(chat=inference_pb2.ChatPrompt()), Code.INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt"),
    "negative id": (tokens(3, -1), Code.INVALID_ARGUMENT, "TOKEN_OUT_OF_VOCABULARY", "prompt.tokens.ids[1]"),
    "unknown id": (tokens(VOCABULARY), Code.INVALID_ARGUMENT, "TOKEN_OUT_OF_VOCABULARY", "prompt.tokens.ids[0]"),
    "long prompt": (tokens(*[5] * CONTEXT), Code.INVALID_ARGUMENT, "CONTEXT_EXCEEDED", "prompt"),
    "10 MB prompt": (text_request("x" * 10_000_000), Code.INVALID_ARGUMENT, "PROMPT_TOO_LARGE", "prompt"),
    "no new tokens": (text_request(max_new_tokens=0), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.max_new_tokens"),
    "too many new tokens": (
        text_request(max_new_tokens=CONTEXT - 5), Code.INVALID_ARGUMENT, "CONTEXT_EXCEEDED", "sampling.max_new_tokens",
    ),
    "negative temperature": (
        text_request(temperature=-0.1), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.temperature",
    ),
    "NaN temperature": (
        text_request(temperature=math.nan), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.temperature",
    ),
    "infinite temperature": (
        text_request(temperature=math.inf), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.temperature",
    ),
    "top_p 0": (text_request(top_p=0.0), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.top_p"),
    "top_p above 1": (text_request(top_p=1.01), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.top_p"),
    "NaN top_p": (text_request(top_p=math.nan), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.top_p"),
    "17 candidates": (text_request(n=17), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.n"),
    "bias of no token": (
        text_request(logit_bias={500: 1.0}), Code.INVALID_ARGUMENT, "TOKEN_OUT_OF_VOCABULARY",
        "sampling.logit_bias[500]",
    ),
    "structured output": (constrained(), Code.UNIMPLEMENTED, "STRUCTURED_OUTPUT_NOT_BUILT", "structured_output"),
    "unknown adapter": (under("alpha", "nobody"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapters[1].name"),
    "unknown alias": (under("alpha@prod"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapters[0].name"),
    "unknown version": (under("zeta@3"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapters[0].name"),
    "unknown digest": (under(f"zeta@{digest_of('7')}"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapters[0].name"),
    "another's adapter": (under("other/secret"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapters[0].name"),
    "malformed name": (under("../etc"), Code.INVALID_ARGUMENT, "INVALID_ADAPTER_NAME", "adapters[0].name"),
    "empty name": (under(""), Code.INVALID_ARGUMENT, "INVALID_ADAPTER_NAME", "adapters[0].name"),
    "NaN weight": (under(("alpha", math.nan)), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight"),
    "infinite weight": (under(("alpha", math.inf)), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight"),
    "weight 1e308": (under(("alpha", 1e308)), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight"),
    "weight -100.5": (under(("alpha", -100.5)), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight"),
    "repetition_penalty 1e-38": (
        text_request(repetition_penalty=1e-38), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "sampling.repetition_penalty",
    ),
    "one adapter twice": (under("alpha", "twin"), Code.INVALID_ARGUMENT, "DUPLICATE_ADAPTER", "adapters[1].name"),
    "one adapter by name and by digest": (
        under("rows", f"rows@{digest_of('b')}"), Code.INVALID_ARGUMENT, "DUPLICATE_ADAPTER", "adapters[1].name",
    ),
    "weight just over the bound": (
        under(("rows", math.nextafter(100.0, math.inf))), Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight",
    ),
    "nine adapters, one of them absent": (
        under(*[(f"many{index}", float(index)) for index in range(9)]), Code.INVALID_ARGUMENT, "TOO_MANY_ADAPTERS",
        "adapters",
    ),
    "nine adapters": (
        under(*[f"many{index}" for index in range(9)]), Code.INVALID_ARGUMENT, "TOO_MANY_ADAPTERS", "adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_its_code_reason_and_field(name: str) -> None:
    request, code, reason, field = BAD_REQUESTS[name]

    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(generate(shell, request))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            check_clean(refusal, "mine-1")
            assert shell.engine.submitted == []
            assert shell.leases.held == []
            assert shell.count("motley_requests_total", outcome="rejected") == 1
            assert shell.count("motley_grpc_server_handled_total", method=METHOD, code=code.name) == 1

    asyncio.run(scenario())


METHOD = "/motley.v1.InferenceService/Generate"
TYPED_ERRORS: list[tuple[errors.MotleyError, Code]] = [
    (errors.InvalidArgumentError("m", reason="R", field="f"), Code.INVALID_ARGUMENT),
    (errors.NotFoundError("m", reason="R", field="f"), Code.NOT_FOUND),
    (errors.UnauthenticatedError("m", reason="R"), Code.UNAUTHENTICATED),
    (errors.PermissionDeniedError("m", reason="R"), Code.PERMISSION_DENIED),
    (errors.AlreadyExistsError("m", reason="R", field="f"), Code.ALREADY_EXISTS),
    (errors.AbortedError("m", reason="R", field="f"), Code.ABORTED),
    (errors.FailedPreconditionError("m", reason="R", field="f"), Code.FAILED_PRECONDITION),
    (errors.ResourceExhaustedError("m", reason="QUEUE_FULL", retry_after_seconds=1.5), Code.RESOURCE_EXHAUSTED),
    (errors.OutOfRangeError("m", reason="R", field="f"), Code.OUT_OF_RANGE),
    (errors.DataLossError("m", reason="R", field="f"), Code.DATA_LOSS),
    (errors.DeadlineExceededError("m", reason="R"), Code.DEADLINE_EXCEEDED),
    (errors.CancelledRequestError("m", reason="R"), Code.CANCELLED),
    (errors.UnavailableError("m", reason="R", retry_after_seconds=2.0), Code.UNAVAILABLE),
    (errors.UnimplementedError("m", reason="R"), Code.UNIMPLEMENTED),
    (errors.InternalError("secret of the house", reason="R"), Code.INTERNAL),
]


@pytest.mark.parametrize("at_submit", [True, False], ids=["refused", "failed midway"])
@pytest.mark.parametrize(("error", "code"), TYPED_ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_class_crosses_the_wire(error: errors.MotleyError, code: Code, at_submit: bool) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            if at_submit:
                shell.engine.refusal = error
            else:
                shell.engine.failure = error
            refusal = await refused(generate(shell, under("alpha")))
            assert (refusal.code, refusal.reason, refusal.field) == (code, error.reason, error.field or "")
            check_clean(refusal, "mine-1")
            retry = refusal.details.get("RetryInfo")
            if isinstance(retry, error_details_pb2.RetryInfo):
                assert retry.retry_delay.ToMilliseconds() == (error.retry_after_seconds or 0) * 1000
            assert (retry is None) == (error.retry_after_seconds is None)
            assert shell.leases.held == []

    asyncio.run(scenario())


def test_the_table_has_every_class_there_is() -> None:
    assert {kind for kind in CODES if issubclass(kind, errors.MotleyError)} == set(errors.MotleyError.__subclasses__())
    assert {type(error) for error, _ in TYPED_ERRORS} == set(errors.MotleyError.__subclasses__())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterFormatError("m", reason="R", field="f"), Code.INVALID_ARGUMENT),
        (AdapterMismatchError("m", reason="R", field="f"), Code.FAILED_PRECONDITION),
        (CapacityError("m", reason="R", field="f"), Code.RESOURCE_EXHAUSTED),
        (KeyError("secret of the house"), Code.INTERNAL),
    ],
)
def test_errors_of_other_roots_have_a_code_too(error: Exception, code: Code) -> None:
    status = to_status(error, "id-1")[1]
    assert code_of(error) is code
    assert status.code == code.value[0]
    assert "secret" not in str(status)


@pytest.mark.parametrize("where", ["submit", "tokenizer"])
def test_a_fault_of_ours_is_told_by_its_request_id_and_logged_with_its_trace(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            if where == "submit":
                shell.engine.fault = ZeroDivisionError("secret of the house")
            shell.tokenizer.broken = where == "tokenizer"
            refusal = await refused(generate(shell, under("alpha")))
            assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
            assert "mine-1" in refusal.message
            check_clean(refusal, "mine-1")
            assert shell.leases.held == []

    asyncio.run(scenario())
    assert "secret of the house" in caplog.text
    assert "Traceback" in caplog.text
    assert "mine-1" in caplog.text


def share(visibility: int) -> adapter_pb2.ShareAdapterRequest:
    request = adapter_pb2.ShareAdapterRequest()
    request.MergeFromString(bytes([adapter_pb2.ShareAdapterRequest.VISIBILITY_FIELD_NUMBER << 3, visibility]))
    return request


def score_under(*adapters: str | tuple[str, float]) -> inference_pb2.ScoreRequest:
    return inference_pb2.ScoreRequest(
        prompt=inference_pb2.Prompt(text="a"), continuations=["b"], adapters=under(*adapters).adapters
    )


def stream_under(*adapters: str | tuple[str, float]) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(
        prompt=inference_pb2.Prompt(text="a"), adapters=under(*adapters).adapters
    )


Call = Callable[[Shell], Awaitable[object]]
OTHER_METHODS: dict[str, tuple[Call, Code, str, str]] = {
    "score under nine adapters": (
        lambda shell: shell.inference.Score(score_under(*[f"many{index}" for index in range(9)])),
        Code.INVALID_ARGUMENT, "TOO_MANY_ADAPTERS", "adapters",
    ),
    "score under one adapter twice": (
        lambda shell: shell.inference.Score(score_under("rows", "alpha", "rows@1")),
        Code.INVALID_ARGUMENT, "DUPLICATE_ADAPTER", "adapters[2].name",
    ),
    "score under a NaN weight": (
        lambda shell: shell.inference.Score(score_under("rows", ("columns", math.nan))),
        Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[1].weight",
    ),
    "stream under nine adapters": (
        lambda shell: shell.inference.GenerateStream(stream_under(*[f"many{index}" for index in range(9)])).read(),
        Code.INVALID_ARGUMENT, "TOO_MANY_ADAPTERS", "adapters",
    ),
    "stream under one adapter twice": (
        lambda shell: shell.inference.GenerateStream(stream_under("alpha", "twin")).read(),
        Code.INVALID_ARGUMENT, "DUPLICATE_ADAPTER", "adapters[1].name",
    ),
    "stream under an infinite weight": (
        lambda shell: shell.inference.GenerateStream(stream_under(("rows", -math.inf))).read(),
        Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "adapters[0].weight",
    ),
    "no continuation": (
        lambda shell: shell.inference.Score(inference_pb2.ScoreRequest(prompt=inference_pb2.Prompt(text="a"))),
        Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "continuations",
    ),
    "empty continuation": (
        lambda shell: shell.inference.Score(
            inference_pb2.ScoreRequest(prompt=inference_pb2.Prompt(text="a"), continuations=["b", ""])
        ),
        Code.INVALID_ARGUMENT, "EMPTY_CONTINUATION", "continuations[1]",
    ),
    "long continuation": (
        lambda shell: shell.inference.Score(
            inference_pb2.ScoreRequest(prompt=inference_pb2.Prompt(text="a"), continuations=["b" * CONTEXT])
        ),
        Code.INVALID_ARGUMENT, "CONTEXT_EXCEEDED", "continuations[0]",
    ),
    "detokenize an unknown id": (
        lambda shell: shell.inference.Detokenize(inference_pb2.DetokenizeRequest(ids=[1, VOCABULARY])),
        Code.INVALID_ARGUMENT, "TOKEN_OUT_OF_VOCABULARY", "ids[1]",
    ),
    "tokenize nothing": (
        lambda shell: shell.inference.Tokenize(inference_pb2.TokenizeRequest()),
        Code.INVALID_ARGUMENT, "PROMPT_REQUIRED", "prompt",
    ),
    "drain before now": (
        lambda shell: shell.server.Drain(server_pb2.DrainRequest(timeout=Duration(seconds=-1))),
        Code.INVALID_ARGUMENT, "OUT_OF_RANGE", "timeout",
    ),
    "unknown enum value": (
        lambda shell: shell.adapters.ShareAdapter(share(99)),
        Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "visibility",
    ),
    "an upload without a header": (
        lambda shell: shell.adapters.UploadAdapter(iter([adapter_pb2.UploadAdapterRequest()])),
        Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header",
    ),
    "a download of nothing": (
        lambda shell: shell.adapters.DownloadAdapter(adapter_pb2.DownloadAdapterRequest()).read(),
        Code.INVALID_ARGUMENT, "INVALID_ADAPTER_NAME", "name",
    ),
    "a tenant that is not there": (
        lambda shell: shell.tenants.GetTenant(tenant_pb2.GetTenantRequest(id="nobody")),
        Code.NOT_FOUND, "TENANT_NOT_FOUND", "id",
    ),
    "a dataset without a header": (
        lambda shell: shell.jobs.UploadDataset(iter([training_pb2.UploadDatasetRequest()])),
        Code.INVALID_ARGUMENT, "HEADER_EXPECTED", "header",
    ),
    "a job of no method": (
        lambda shell: shell.jobs.CreateTrainingJob(training_pb2.CreateTrainingJobRequest()),
        Code.INVALID_ARGUMENT, "METHOD_REQUIRED", "spec.method",
    ),
    "a watch of nothing": (
        lambda shell: shell.jobs.WatchTrainingJob(training_pb2.WatchTrainingJobRequest()).read(),
        Code.NOT_FOUND, "JOB_NOT_FOUND", "id",
    ),
    "a report without a lease": (
        lambda shell: shell.workers.ReportJob(training_pb2.ReportJobRequest()),
        Code.PERMISSION_DENIED, "LEASE_REQUIRED", "",
    ),
    "bytes that are no message": (
        lambda shell: shell.channel.unary_unary("/motley.v1.InferenceService/Tokenize")(b"\xff\xff\xff"),
        Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_refuse_in_the_same_way(name: str) -> None:
    call, code, reason, field = OTHER_METHODS[name]

    async def scenario() -> None:
        async with serving() as shell:
            refusal = await refused(call(shell))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            check_clean(refusal)

    asyncio.run(scenario())


def test_what_is_missing_and_what_is_anothers_read_alike() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            missing = await refused(generate(shell, under("other/nothing")))
            hidden = await refused(generate(shell, under("other/secret")))
            assert missing.message.replace("nothing", "secret") == hidden.message
            assert missing.reason == hidden.reason

    asyncio.run(scenario())
