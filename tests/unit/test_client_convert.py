"""What Python values become on the wire, and what comes back; and which values never get there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
from motley.v1 import common_pb2, inference_pb2, server_pb2
from motley_client import ChatMessage, FinishReason, InternalError, InvalidArgumentError, Sampling, convert

PROMPT = inference_pb2.Prompt(text="x")


def test_each_form_of_prompt_fills_its_own_field() -> None:
    chat = convert.prompt_message(None, [ChatMessage("user", "hi")], None)

    assert convert.prompt_message("", None, None).WhichOneof("content") == "text"
    assert convert.prompt_message(None, None, [3, 4]).tokens.ids == [3, 4]
    assert (chat.chat.messages[0].role, chat.chat.messages[0].content) == ("user", "hi")


@pytest.mark.parametrize("forms", [(None, None, None), ("x", None, [1]), ("x", [ChatMessage("user", "y")], None)])
def test_a_prompt_has_exactly_one_form(forms: tuple[Any, Any, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert.prompt_message(*forms)

    assert (caught.value.reason, caught.value.field) == ("PROMPT_FORM", "prompt")


def test_only_what_is_set_is_sent() -> None:
    params = convert.sampling_params({"temperature": 0.0, "top_p": None, "stop": ["a", "b"], "logit_bias": {5: -1.0}})

    assert params.HasField("temperature")
    assert not params.HasField("top_p")
    assert not params.HasField("seed")
    assert (list(params.stop), dict(params.logit_bias)) == (["a", "b"], {5: -1.0})


def test_sampling_names_every_field_of_the_message() -> None:
    assert set(Sampling.__annotations__) == {field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"max_new_tokens": 2**40}, "sampling.max_new_tokens"),
        ({"seed": -1}, "sampling.seed"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"top_q": 1}, "sampling.top_q"),
        ({"stop": "abc"}, "sampling.stop"),
        ({"stop": ["\ud800"]}, "sampling.stop"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(sampling: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert.generate_request(PROMPT, (), cast(Sampling, sampling))

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: convert.prompt_message("\ud800", None, None), "prompt.text"),
        (lambda: convert.prompt_message(None, None, [2**31]), "prompt.tokens.ids"),
        (lambda: convert.adapter_refs("reverse"), "adapters"),
        (lambda: convert.adapter_refs([("reverse", cast(float, "much"))]), "adapters"),
        (lambda: convert.score_request(PROMPT, "yes", ()), "continuations"),
        (lambda: convert.detokenize_request([-(2**40)]), "ids"),
        (lambda: convert.drain_request(float("nan")), "timeout"),
        (lambda: convert.drain_request(float("inf")), "timeout"),
    ],
)
def test_other_values_that_cannot_be_sent_are_named(call: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call()

    assert caught.value.field == field


def test_a_bare_name_leaves_the_weight_unset_and_a_zero_is_sent() -> None:
    bare, weighted = convert.adapter_refs(["reverse", ("next", 0.0)])

    assert not bare.HasField("weight")
    assert weighted.HasField("weight")


def test_a_drain_without_grace_leaves_it_to_the_server() -> None:
    assert not convert.drain_request(None).HasField("timeout")
    assert convert.drain_request(1.5).timeout.ToTimedelta().total_seconds() == 1.5


def test_an_answer_without_candidates_is_the_servers_fault() -> None:
    with pytest.raises(InternalError) as caught:
        convert.generation(inference_pb2.GenerateResponse(request_id="abc"))

    assert (caught.value.reason, caught.value.request_id) == ("EMPTY_RESPONSE", "abc")


def test_an_unset_finish_reason_is_none() -> None:
    going_on = inference_pb2.Candidate(text="a")
    ended = inference_pb2.Candidate(text="b", finish_reason=common_pb2.FINISH_REASON_LENGTH)

    part = convert.stream_part(inference_pb2.GenerateStreamResponse(candidates=[going_on, ended]))

    assert [candidate.finish_reason for candidate in part.candidates] == [None, FinishReason.LENGTH]
    assert (part.served_by, part.usage, part.request_id) == (None, None, None)


def test_server_info_and_capacity_show_every_field_of_their_messages() -> None:
    info = convert.server_info(server_pb2.GetServerInfoResponse(limits=server_pb2.Limits(max_candidates=16)))
    capacity = convert.capacity(server_pb2.GetCapacityResponse(kv_tokens_free=3))

    for value, message in (
        (info, server_pb2.GetServerInfoResponse),
        (info.limits, server_pb2.Limits),
        (capacity, server_pb2.GetCapacityResponse),
    ):
        assert {field.name for field in dataclasses.fields(value)} == {
            field.name for field in message.DESCRIPTOR.fields
        }
    assert (info.limits.max_candidates, capacity.kv_tokens_free) == (16, 3)
