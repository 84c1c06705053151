"""Admission: defaults, ranges, leases and deadlines, without a wire."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_bases.spec import GenerationDefaults
from motley_server.admission import Admission, AdmissionLimits
from motley_server.asked import (
    AskedAdapter,
    AskedGeneration,
    AskedSampling,
    AskedScoring,
    Caller,
    ChatPrompt,
    ChatTurn,
    TextPrompt,
    TokenPrompt,
)
from motley_server.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    ResourceExhaustedError,
)
from motley_server.sampling import SamplingFacts, fill_sampling
from rpc_harness import CONTEXT, EOS, LeaseBook, LetterTokenizer, digest_of, make_base, make_catalog
from scripted_engine import ScriptedEngine

FACTS = SamplingFacts(GenerationDefaults(eos_token_ids=(2, 7)), vocab_size=100, default_max_new_tokens=20)
SAMPLING_CHECKPOINT = SamplingFacts(
    GenerationDefaults((2,), temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1), 100, 20
)


class Refusals:
    """Count refusals."""

    def __init__(self) -> None:
        self.number = 0

    def request_refused(self) -> None:
        self.number += 1


@dataclasses.dataclass
class Door:
    """An admission with everything around it."""

    engine: ScriptedEngine
    tokenizer: LetterTokenizer
    leases: LeaseBook
    refusals: Refusals
    admission: Admission


def open_door(*, has_template: bool = True) -> Door:
    engine, leases, refusals = ScriptedEngine(), LeaseBook(), Refusals()
    limits = AdmissionLimits(CONTEXT, max_prompt_bytes=1000, default_max_new_tokens=8)
    tokenizer = LetterTokenizer(has_template=has_template)
    admission = Admission(engine, make_base(), tokenizer, make_catalog(), leases, limits, refusals)
    return Door(engine, tokenizer, leases, refusals, admission)


def caller(deadline: float | None = None) -> Caller:
    return Caller("call", "local", frozenset(), deadline)


def asking(
    *adapters: tuple[str, float | None], text: str = "hi", sampling: AskedSampling | None = None
) -> AskedGeneration:
    return AskedGeneration(TextPrompt(text), tuple(AskedAdapter(*one) for one in adapters), sampling or AskedSampling())


def test_unset_fields_take_the_protos_defaults() -> None:
    filled = fill_sampling(AskedSampling(seed=3), FACTS, num_free_tokens=50)
    assert filled.max_new_tokens == 20
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.0, 1.0, 0, 0.0)
    assert (filled.repetition_penalty, filled.n, filled.min_new_tokens, filled.logprobs) == (1.0, 1, 0, None)
    assert (filled.stop_token_ids, filled.eos_token_ids, filled.seed) == ((2, 7), (2, 7), 3)


def test_unset_fields_take_the_checkpoints_defaults_first() -> None:
    filled = fill_sampling(AskedSampling(), SAMPLING_CHECKPOINT, num_free_tokens=50)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.7, 0.9, 40, 0.05)
    assert filled.repetition_penalty == 1.1


def test_the_checkpoints_length_comes_before_the_servers() -> None:
    stored = dataclasses.replace(FACTS, defaults=dataclasses.replace(FACTS.defaults, max_new_tokens=9))
    assert fill_sampling(AskedSampling(), stored, num_free_tokens=50).max_new_tokens == 9
    assert fill_sampling(AskedSampling(), stored, num_free_tokens=4).max_new_tokens == 4
    assert fill_sampling(AskedSampling(max_new_tokens=11), stored, num_free_tokens=50).max_new_tokens == 11


def test_set_fields_win_even_when_they_are_zero() -> None:
    asked = AskedSampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=0)
    filled = fill_sampling(asked, SAMPLING_CHECKPOINT, num_free_tokens=50)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.0, 1.0, 0, 0.0)
    assert (filled.repetition_penalty, filled.seed) == (1.0, 0)


def test_stop_ids_are_the_callers_and_the_checkpoints_unless_eos_is_ignored() -> None:
    asked = AskedSampling(stop_token_ids=(9, 2))
    assert fill_sampling(asked, FACTS, num_free_tokens=50).stop_token_ids == (2, 7, 9)
    ignoring = fill_sampling(dataclasses.replace(asked, ignore_eos=True), FACTS, num_free_tokens=50)
    assert (ignoring.stop_token_ids, ignoring.eos_token_ids) == ((2, 9), (2, 7))


def test_the_default_length_is_cut_to_the_context_but_a_wish_is_refused() -> None:
    assert fill_sampling(AskedSampling(), FACTS, num_free_tokens=5).max_new_tokens == 5
    assert fill_sampling(AskedSampling(max_new_tokens=5), FACTS, num_free_tokens=5).max_new_tokens == 5
    with pytest.raises(InvalidArgumentError) as caught:
        fill_sampling(AskedSampling(max_new_tokens=6), FACTS, num_free_tokens=5)
    assert (caught.value.reason, caught.value.field) == ("CONTEXT_EXCEEDED", "sampling.max_new_tokens")


def test_unset_seeds_differ() -> None:
    seeds = {fill_sampling(AskedSampling(), FACTS, num_free_tokens=5).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)


BAD_SAMPLING: list[tuple[AskedSampling, str]] = [
    (AskedSampling(max_new_tokens=0), "max_new_tokens"),
    (AskedSampling(max_new_tokens=-1), "max_new_tokens"),
    *((AskedSampling(temperature=value), "temperature") for value in (-0.01, 100.1, math.nan, math.inf, -math.inf)),
    *((AskedSampling(top_p=value), "top_p") for value in (0.0, -0.1, 1.0001, math.nan)),
    (AskedSampling(top_k=-1), "top_k"),
    *((AskedSampling(min_p=value), "min_p") for value in (-0.1, 1.1, math.nan)),
    *((AskedSampling(presence_penalty=value), "presence_penalty") for value in (-2.1, 2.1, math.nan)),
    *((AskedSampling(frequency_penalty=value), "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
    *((AskedSampling(repetition_penalty=value), "repetition_penalty") for value in (1e-38, 0.0099, 100.1, math.nan)),
    (AskedSampling(n=0), "n"),
    (AskedSampling(n=17), "n"),
    (AskedSampling(stop=("x",) * 17), "stop"),
    (AskedSampling(stop=("x", "")), "stop[1]"),
    (AskedSampling(stop=("x" * 1025,)), "stop[0]"),
    (AskedSampling(stop_token_ids=(3, 100)), "stop_token_ids[1]"),
    (AskedSampling(stop_token_ids=(-1,)), "stop_token_ids[0]"),
    (AskedSampling(stop_token_ids=(3,) * 1025), "stop_token_ids"),
    (AskedSampling(logit_bias=((3, 0.0),) * 1025), "logit_bias"),
    (AskedSampling(min_new_tokens=-1), "min_new_tokens"),
    (AskedSampling(min_new_tokens=21), "min_new_tokens"),
    (AskedSampling(logprobs=-1), "logprobs"),
    (AskedSampling(logprobs=21), "logprobs"),
    (AskedSampling(logit_bias=((100, 0.0),)), "logit_bias[100]"),
    *((AskedSampling(logit_bias=((5, value),)), "logit_bias[5]") for value in (100.1, -100.1, math.nan, math.inf)),
]


@pytest.mark.parametrize(("asked", "field"), BAD_SAMPLING, ids=lambda value: str(value)[-60:])
def test_values_out_of_range_are_refused_by_field(asked: AskedSampling, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        fill_sampling(asked, FACTS, num_free_tokens=50)
    assert caught.value.field == f"sampling.{field}"


@given(
    temperature=st.none() | st.floats(),
    top_p=st.none() | st.floats(),
    min_p=st.none() | st.floats(),
    penalty=st.none() | st.floats(),
    top_k=st.none() | st.integers(-5, 5),
    length=st.none() | st.integers(-5, 60),
)
def test_whatever_passes_is_within_range(
    temperature: float | None, top_p: float | None, min_p: float | None, penalty: float | None, top_k: int | None,
    length: int | None,
) -> None:  # fmt: skip
    asked = AskedSampling(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        top_k=top_k,
        max_new_tokens=length,
    )
    try:
        filled = fill_sampling(asked, FACTS, num_free_tokens=50)
    except InvalidArgumentError:
        return
    assert 0 <= filled.temperature <= 100
    assert 0 < filled.top_p <= 1
    assert 0 <= filled.min_p <= 1
    assert 0.01 <= filled.repetition_penalty <= 100
    assert filled.top_k >= 0
    assert 1 <= filled.max_new_tokens <= 50


def test_adapters_are_sorted_by_digest_and_zero_weights_are_absent() -> None:
    async def scenario() -> None:
        door = open_door()
        asked = asking(("alpha", None), ("public/shared", 0.0), ("zeta@1", -2.5), ("twin", 0.0))
        admitted = await door.admission.generate(asked, caller())
        served = [(one.name, one.version, one.digest, one.weight) for one in admitted.request.adapters]
        assert served == [("zeta", 1, digest_of("1"), -2.5), ("alpha", 1, digest_of("9"), 1.0)]
        assert door.leases.held == [digest_of("1"), digest_of("9")]
        assert [event async for event in admitted.events][-1].usage is not None
        assert door.leases.held == []
        door.admission.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("weight", [100.0, -100.0])
def test_the_largest_weights_are_taken(weight: float) -> None:
    async def scenario() -> None:
        door = open_door()
        admitted = await door.admission.generate(asking(("alpha", weight)), caller())
        assert [one.weight for one in admitted.request.adapters] == [weight]
        await admitted.events.aclose()
        await door.engine.stop()
        door.admission.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("turns", "is_long"),
    [
        ([ChatTurn("user", "hi")], False),
        ([ChatTurn("u" * 900, "")], False),
        ([ChatTurn("", "")] * 64, True),
    ],
    ids=["short", "one turn", "many turns"],
)
def test_many_turns_are_rendered_off_the_loop_though_they_say_little(turns: list[ChatTurn], is_long: bool) -> None:
    async def scenario() -> None:
        door = open_door()
        render, threads = LetterTokenizer().render_chat, []

        def watch(turns: object) -> str:
            threads.append(threading.current_thread())
            return render(turns)  # type: ignore[arg-type]

        door.tokenizer.render_chat = watch  # type: ignore[method-assign, assignment]
        await door.admission.tokenize(ChatPrompt(tuple(turns)))
        assert [thread is not threading.main_thread() for thread in threads] == [is_long]
        door.admission.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [ResourceExhaustedError("full", reason="QUEUE_FULL"), None], ids=["typed", "untyped"])
def test_leases_return_when_the_engine_refuses(error: MotleyError | None) -> None:
    async def scenario() -> None:
        door = open_door()
        door.engine.refusal = error
        door.engine.fault = None if error else RuntimeError("boom")
        with pytest.raises(type(error) if error else RuntimeError):
            await door.admission.generate(asking(("alpha", None), ("zeta", None)), caller())
        assert door.leases.held == []
        assert door.refusals.number == (1 if error else 0)
        door.admission.close()

    asyncio.run(scenario())


def test_leases_return_when_a_later_one_cannot_be_had() -> None:
    async def scenario() -> None:
        door = open_door()
        acquire = door.leases.acquire

        def fail_on_alpha(digest: str) -> object:
            if digest == digest_of("9"):
                raise KeyError(digest)
            return acquire(digest)

        door.leases.acquire = fail_on_alpha  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyError):
            await door.admission.generate(asking(("zeta@1", None), ("alpha", None)), caller())
        assert door.leases.held == []
        assert door.engine.submitted == []
        door.admission.close()

    asyncio.run(scenario())


def test_a_deadline_that_has_passed_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        door = open_door()
        late = caller(time.monotonic() - 0.001)
        with pytest.raises(DeadlineExceededError) as caught:
            await door.admission.generate(asking(("alpha", None)), late)
        assert caught.value.reason == "DEADLINE_PASSED"
        with pytest.raises(DeadlineExceededError):
            await door.admission.score(AskedScoring(TextPrompt("a"), ("b",)), late)
        assert (door.engine.submitted, door.leases.held, door.refusals.number) == ([], [], 2)
        door.admission.close()

    asyncio.run(scenario())


def test_a_score_is_admitted_whole_or_not_at_all() -> None:
    async def scenario() -> None:
        door = open_door()
        submit, door.engine.step_seconds = door.engine.submit, 0.01

        def submit_two(*arguments: object) -> object:
            if len(door.engine.submitted) == 2:
                raise ResourceExhaustedError("full", reason="QUEUE_FULL")
            return submit(*arguments)  # type: ignore[arg-type]

        door.engine.submit = submit_two  # type: ignore[method-assign, assignment]
        asked = AskedScoring(TextPrompt("a"), ("b", "c", "d"), (AskedAdapter("alpha"),))
        with pytest.raises(ResourceExhaustedError):
            await door.admission.score(asked, caller())
        assert door.engine.cancelled == [request.request_id for request in door.engine.submitted]
        await door.engine.stop()
        assert (door.leases.held, door.refusals.number) == ([], 1)
        door.admission.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("num_tokens", "fits"), [(CONTEXT - 1, True), (CONTEXT, False)])
def test_a_prompt_leaves_room_for_one_token(num_tokens: int, fits: bool) -> None:
    async def scenario() -> None:
        door = open_door()
        asked = AskedGeneration(TokenPrompt((5,) * num_tokens))
        if fits:
            admitted = await door.admission.generate(asked, caller())
            assert admitted.request.sampling.max_new_tokens == 1
            await admitted.events.aclose()
        else:
            with pytest.raises(InvalidArgumentError, match="context"):
                await door.admission.generate(asked, caller())
        await door.engine.stop()
        door.admission.close()

    asyncio.run(scenario())


def test_a_scored_text_may_fill_the_context() -> None:
    async def scenario() -> None:
        door = open_door()
        prompt = TokenPrompt((5,) * (CONTEXT - 3))
        [admitted] = await door.admission.score(AskedScoring(prompt, ("abc",)), caller())
        assert len(admitted.request.prompt_token_ids) == CONTEXT
        assert (admitted.request.num_context_tokens, admitted.request.sampling.logprobs) == (CONTEXT - 3, 1)
        with pytest.raises(InvalidArgumentError):
            await door.admission.score(AskedScoring(prompt, ("abcd",)), caller())
        await door.engine.stop()
        door.admission.close()

    asyncio.run(scenario())


def test_bytes_are_counted_not_characters() -> None:
    async def scenario() -> None:
        door = open_door()
        with pytest.raises(InvalidArgumentError) as caught:
            await door.admission.tokenize(TextPrompt("€" * 334))  # 1002 bytes
        assert (caught.value.reason, caught.value.field) == ("PROMPT_TOO_LARGE", "prompt")
        assert len(await door.admission.tokenize(TextPrompt("€" * 333))) == 334
        turns = ChatPrompt((ChatTurn("user", "a" * 500), ChatTurn("user", "a" * 500)))
        with pytest.raises(InvalidArgumentError):
            await door.admission.tokenize(turns)
        door.admission.close()

    asyncio.run(scenario())


def test_a_conversation_without_a_template_is_refused() -> None:
    async def scenario() -> None:
        door = open_door(has_template=False)
        with pytest.raises(FailedPreconditionError) as caught:
            await door.admission.tokenize(ChatPrompt((ChatTurn("user", "hi"),)))
        assert (caught.value.reason, caught.value.field) == ("NO_CHAT_TEMPLATE", "prompt.chat")
        door.admission.close()

    asyncio.run(scenario())


def test_eos_of_the_base_reaches_the_engine() -> None:
    async def scenario() -> None:
        door = open_door()
        admitted = await door.admission.generate(asking(), caller())
        assert admitted.request.sampling.stop_token_ids == (EOS,)
        await admitted.events.aclose()
        await door.engine.stop()
        door.admission.close()

    asyncio.run(scenario())
