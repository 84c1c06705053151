"""Admission: defaults, ranges, leases and deadlines, without a wire."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest
from admission_door import Door, asking, caller, open_door
from motley_server.asked import (
    AskedAdapter,
    AskedGeneration,
    AskedScoring,
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
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.library.sets import AdapterSets
from paper_library import Facts, count_overlaps, digest_of
from rpc_harness import CONTEXT, EOS, LetterTokenizer


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
        await door.close()

    asyncio.run(scenario())


def test_s2ft_adapters_of_one_request_may_overlap_and_each_says_how_far() -> None:
    async def served(door: Door, *names: str) -> list[tuple[str, str, int]]:
        admitted = await door.admission.generate(asking(*((name, None) for name in names)), caller())
        await admitted.events.aclose()
        return [(one.name, one.kind, one.overlapping_channels) for one in admitted.request.adapters]

    async def scenario() -> None:
        door = open_door()
        overlapping = [("alpha", "lora", 0), ("columns", "s2ft", 2), ("rows", "s2ft", 2), ("apart", "s2ft", 0)]
        assert await served(door, "apart", "columns", "alpha", "rows") == overlapping
        assert await served(door, "columns", "alpha") == [("alpha", "lora", 0), ("columns", "s2ft", 0)]
        assert await served(door, "rows", "apart") == [("rows", "s2ft", 0), ("apart", "s2ft", 0)]
        await door.engine.stop()
        await door.close()

    asyncio.run(scenario())


def test_an_absent_adapter_overlaps_nobody_and_a_set_is_counted_once() -> None:
    counted = []

    def count(specs: Sequence[Facts]) -> dict[str, int]:
        counted.append([one.digest for one in specs])
        return count_overlaps(specs)

    async def taken(sets: AdapterSets, *asked: AskedAdapter) -> list[tuple[str, int]]:
        with await sets.take(asked, caller()) as held:
            return [(one.name, one.overlapping_channels) for one in held.adapters]

    async def scenario() -> None:
        door = open_door()
        library, intake = door.library, cast(Any, door.library.intake)
        registry = library.registry
        sets = AdapterSets(registry.database, registry.adapters, library.holds, intake, cast(Any, count))
        pairs = [("rows", 0.5), ("alpha", 1.0), ("columns", -1.0)]
        for order in (pairs, pairs[::-1], [(name, weight / 2) for name, weight in pairs]):
            found = await taken(sets, *(AskedAdapter(*pair) for pair in order))
            assert found == [("alpha", 0), ("columns", 2), ("rows", 2)]
        assert counted == [[digest_of("a"), digest_of("b")]]
        assert await taken(sets, AskedAdapter("columns"), AskedAdapter("rows", 0.0)) == [("columns", 0)]
        assert door.leases.held == []
        await door.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "name", "version", "letter"),
    [
        ("zeta", "zeta", 2, "2"),
        ("zeta@default", "zeta", 2, "2"),
        ("zeta@1", "zeta", 1, "1"),
        ("local/zeta@1", "zeta", 1, "1"),
        ("public/shared", "public/shared", 1, "5"),
        (f"zeta@{digest_of('1')}", "zeta", 1, "1"),
    ],
)
def test_a_name_means_one_version(text: str, name: str, version: int, letter: str) -> None:
    async def scenario() -> None:
        door = open_door()
        admitted = await door.admission.generate(asking((text, None)), caller())
        (served,) = admitted.request.adapters
        assert (served.name, served.version, served.digest) == (name, version, digest_of(letter))
        await admitted.events.aclose()
        await door.engine.stop()
        await door.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["nobody", "zeta@3", "zeta@prod", "other/secret", "shared", f"zeta@{digest_of('3')}"])
def test_what_a_tenant_cannot_use_is_not_there(text: str) -> None:
    async def scenario() -> None:
        door = open_door()
        with pytest.raises(NotFoundError) as caught:
            await door.admission.generate(asking(("alpha", None), (text, None)), caller())
        assert (caught.value.reason, caught.value.field) == ("ADAPTER_NOT_FOUND", "adapters[1].name")
        assert caught.value.message == f"there is no adapter {text!r} that you may use"
        assert (door.leases.held, door.library.holds.bundles(), door.engine.submitted) == ([], set(), [])
        await door.close()

    asyncio.run(scenario())


def test_a_malformed_name_is_the_callers_fault() -> None:
    async def scenario() -> None:
        door = open_door()
        with pytest.raises(InvalidArgumentError) as caught:
            await door.admission.generate(asking(("a@@", None)), caller())
        assert (caught.value.reason, caught.value.field) == ("INVALID_ADAPTER_NAME", "adapters[0].name")
        await door.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("weight", [100.0, -100.0])
def test_the_largest_weights_are_taken(weight: float) -> None:
    async def scenario() -> None:
        door = open_door()
        admitted = await door.admission.generate(asking(("alpha", weight)), caller())
        assert [one.weight for one in admitted.request.adapters] == [weight]
        await admitted.events.aclose()
        await door.engine.stop()
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

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
        await door.close()

    asyncio.run(scenario())


def test_a_conversation_without_a_template_is_refused() -> None:
    async def scenario() -> None:
        door = open_door(has_template=False)
        with pytest.raises(FailedPreconditionError) as caught:
            await door.admission.tokenize(ChatPrompt((ChatTurn("user", "hi"),)))
        assert (caught.value.reason, caught.value.field) == ("NO_CHAT_TEMPLATE", "prompt.chat")
        await door.close()

    asyncio.run(scenario())


def test_eos_of_the_base_reaches_the_engine() -> None:
    async def scenario() -> None:
        door = open_door()
        admitted = await door.admission.generate(asking(), caller())
        assert admitted.request.sampling.stop_token_ids == (EOS,)
        await admitted.events.aclose()
        await door.engine.stop()
        await door.close()

    asyncio.run(scenario())
