"""What the engine promises besides the right tokens: real batching, reproducible sampling, nothing leaked."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import Answer, Harness, make_harness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motley_bases.kv_cache import bytes_per_block
from motley_server.engine.types import FinishReason, GenerateRequest
from motley_server.errors import CancelledRequestError, DeadlineExceededError, InternalError
from peft_adapters import generate, make_adapter

GONE = CancelledRequestError("the caller is gone", reason="CANCELLED")
NAMES = tuple(f"adapter{index}" for index in range(16))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(checkpoint, root / name, seed=seed, r=1 + seed % 5) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def harness(checkpoint: Path, adapters: dict[str, Path]) -> Harness:
    return make_harness(checkpoint, adapters, token_budget=64)


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 100) for _ in range(length)]


def tokens_of(answers: dict[str, Answer]) -> dict[str, dict[int, list[int]]]:
    return {request_id: answer.token_ids for request_id, answer in answers.items()}


def test_sixteen_adapters_share_every_forward_pass(harness: Harness) -> None:
    calls: dict[str, int] = {}
    hooks = []
    for path in harness.base.spec.linears:
        module = harness.base.model.get_submodule(path).base  # the Linear itself, inside its adapter site
        hooks.append(module.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1})))
    before = harness.core.runner.num_forward_passes
    requests = [
        harness.request(name, prompt_of(8, index), name, max_new_tokens=48, stop_token_ids=())
        for index, name in enumerate(NAMES)
    ]
    answers = harness.run(requests)
    for hook in hooks:
        hook.remove()
    num_passes = harness.core.runner.num_forward_passes - before
    assert num_passes <= 60
    assert all(len(answer.token_ids[0]) == 48 for answer in answers.values())
    assert set(calls) == set(harness.base.spec.linears)
    assert set(calls.values()) == {num_passes}


@pytest.mark.usefixtures("two_threads")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neighbours_change_nobody_s_tokens(harness: Harness, data: st.DataObject) -> None:
    sets = st.lists(st.sampled_from(NAMES), max_size=3, unique=True).map(tuple)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 30), sets, st.booleans()), min_size=2, max_size=8))

    def make(index: int) -> GenerateRequest:
        length, names, sampled = shapes[index]
        pairs = [(name, 0.5 + 0.25 * place) for place, name in enumerate(names)]
        return harness.request(
            str(index),
            prompt_of(length, index),
            *pairs,
            max_new_tokens=6,
            temperature=0.9 if sampled else 0.0,
            seed=index,
        )

    together = tokens_of(harness.run(make(index) for index in range(len(shapes))))
    order = data.draw(st.permutations(range(len(shapes))))
    assert tokens_of(harness.run(make(index) for index in order)) == together
    fewer = order[: data.draw(st.integers(1, len(shapes)))]
    remaining = tokens_of(harness.run(make(index) for index in fewer))
    assert remaining == {str(index): together[str(index)] for index in fewer}


def test_a_weighted_set_is_the_exact_sum_of_its_adapters(
    harness: Harness, checkpoint: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names, weights = list(NAMES[:3]), [0.75, -0.5, 1.5]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    peft_model = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(adapters[name], adapter_name=name)
    # "linear" would mix A and B before multiplying, and demands equal ranks; "cat" is the exact sum.
    peft_model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    peft_model.set_adapter("sum")
    peft_model.save_pretrained(tmp_path, selected_adapters=["sum"], save_embedding_layers=False)
    prompt = prompt_of(12, 3)
    ((expected, _),) = generate(checkpoint, [prompt], tmp_path / "sum", max_new_tokens=8)
    pairs = zip(names, weights, strict=True)
    answers = harness.run([harness.request("sum", prompt, *pairs, max_new_tokens=8)])
    assert answers["sum"].token_ids[0] == expected


def test_the_same_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(
    checkpoint: Path, adapters: dict[str, Path], harness: Harness
) -> None:
    cramped = make_harness(
        checkpoint,
        adapters,
        block_size=4,
        kv_cache_bytes=bytes_per_block(harness.base.spec, 4, harness.base.dtype) * 20,
    )

    def make(seed: int) -> GenerateRequest:
        return harness.request(
            str(seed),
            prompt_of(10, seed),
            NAMES[seed],
            max_new_tokens=16,
            temperature=1.0,
            top_p=0.95,
            seed=7,
            stop_token_ids=(),
        )

    alone = {str(seed): harness.run([make(seed)])[str(seed)].token_ids for seed in range(6)}
    assert tokens_of(harness.run(make(seed) for seed in range(6))) == alone
    assert tokens_of(cramped.run(make(seed) for seed in range(6))) == alone
    assert cramped.observer.num_preemptions > 0
    assert len({tuple(tokens[0]) for tokens in alone.values()}) == 6


def test_candidates_of_one_request_differ_and_share_their_prompt(harness: Harness) -> None:
    hits = harness.observer.num_hit_tokens
    request = harness.request("n", prompt_of(33, 77), n=4, temperature=1.5, seed=3, max_new_tokens=10)
    answer = harness.run([request])["n"]
    assert sorted(answer.token_ids) == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in answer.token_ids.values()}) > 1
    assert harness.observer.num_hit_tokens - hits >= 3 * 32
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(map(len, answer.token_ids.values()))
    one = harness.run([harness.request("one", prompt_of(33, 77), temperature=1.5, seed=3, max_new_tokens=10)])["one"]
    assert one.token_ids[0] == answer.token_ids[0]


def test_a_prefix_computed_under_one_adapter_or_tenant_serves_no_other(
    checkpoint: Path, adapters: dict[str, Path], harness: Harness
) -> None:
    fresh = make_harness(checkpoint, adapters)
    prompt = prompt_of(40, 5)

    def hits(request: GenerateRequest) -> int:
        answer = fresh.run([request])[request.request_id]
        assert answer.usage is not None
        return answer.usage.cached_prompt_tokens

    assert hits(fresh.request("first", prompt, NAMES[0])) == 0
    assert hits(fresh.request("again", prompt, NAMES[0])) == 32
    assert hits(fresh.request("base", prompt)) == 0
    assert hits(fresh.request("other", prompt, NAMES[1])) == 0
    assert hits(fresh.request("weight", prompt, (NAMES[0], 0.5))) == 0
    assert hits(fresh.request("tenant", prompt, NAMES[0], tenant_id="somebody-else")) == 0


def test_scores_equal_a_plain_forward_pass(harness: Harness, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = prompt_of(30, 9)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    expected = [float(logprobs[position, prompt[position + 1]]) for position in range(19, 29)]
    for request_id in ("cold", "cached"):
        request = harness.request(
            request_id, prompt, prompt_logprobs=True, num_context_tokens=20, logprobs=1, max_new_tokens=1
        )
        entries = harness.run([request])[request_id].prompt_logprobs
        assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-4)
        assert [entry.token_id for entry in entries] == prompt[20:]
        best = [int(logprobs[position].argmax()) for position in range(19, 29)]
        assert [entry.top[0][0] for entry in entries] == best


def test_a_cancelled_request_gives_its_blocks_back_at_once(harness: Harness) -> None:
    cancelled: list[object] = []

    def cancel_in_the_middle(step: int) -> None:
        if step == 3:
            event = harness.core.cancel("gone", GONE)
            assert event is not None
            cancelled.append(event.error)
            harness.core.check_integrity()

    requests = [
        harness.request(name, prompt_of(9, 1), max_new_tokens=10, stop_token_ids=()) for name in ("stays", "gone")
    ]
    answers = harness.run(requests, before_step=cancel_in_the_middle)
    assert cancelled == [GONE]
    assert len(answers["gone"].token_ids[0]) == 3
    assert len(answers["stays"].token_ids[0]) == 10
    assert harness.core.cancel("gone", GONE) is None
    assert harness.observer.requests[-2].outcome == "cancelled"


def test_a_request_past_its_deadline_ends_with_what_it_has(harness: Harness) -> None:
    requests = [
        harness.request(
            "late", prompt_of(9, 1), max_new_tokens=200, stop_token_ids=(), deadline=time.monotonic() + 0.05
        ),
        harness.request(
            "in-time", prompt_of(9, 1), max_new_tokens=3, stop_token_ids=(), deadline=time.monotonic() + 60
        ),
    ]
    answers = harness.run(requests)
    assert isinstance(answers["late"].error, DeadlineExceededError)
    assert answers["in-time"].finish_reason[0] is FinishReason.LENGTH


def test_a_broken_forward_pass_fails_its_requests_and_nothing_else(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(harness.core.runner, "run", lambda batch: (_ for _ in ()).throw(RuntimeError("planted")))
        answers = harness.run([harness.request("unlucky", prompt_of(5, 1))])
    assert isinstance(answers["unlucky"].error, InternalError)
    assert "planted" not in answers["unlucky"].error.message
    assert len(harness.run([harness.request("lucky", prompt_of(5, 1))])["lucky"].token_ids[0]) > 0


def test_a_checkpoint_s_every_eos_id_stops_and_min_new_tokens_holds_them_off(harness: Harness) -> None:
    prompt = prompt_of(6, 2)
    free = harness.run([harness.request("free", prompt, max_new_tokens=12, stop_token_ids=())])["free"].token_ids[0]
    stop = free[4]
    first = free.index(stop)
    stopped = harness.run([harness.request("stopped", prompt, max_new_tokens=12, stop_token_ids=(stop, 3))])["stopped"]
    assert stopped.token_ids[0] == free[: first + 1]
    assert stopped.finish_reason[0] is FinishReason.STOP
    held = harness.run([harness.request("held", prompt, max_new_tokens=12, stop_token_ids=(stop,), min_new_tokens=12)])
    assert len(held["held"].token_ids[0]) == 12
    assert stop not in held["held"].token_ids[0][:11]


def test_a_request_that_breaks_its_own_text_or_its_own_start_fails_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_detokenizer = harness.core._make_detokenizer

    class Broken:
        def append(self, token_ids: object) -> None:
            raise RuntimeError("planted")

    def make(request: GenerateRequest) -> object:
        if request.request_id == "unbegun":
            raise RuntimeError("planted")
        return Broken() if request.request_id == "unlucky" else make_detokenizer(request)

    monkeypatch.setattr(harness.core, "_make_detokenizer", make)
    event = harness.core.add(harness.request("unbegun", prompt_of(5, 1)), time.monotonic())
    assert event is not None
    assert isinstance(event.error, InternalError)
    requests = [harness.request(name, prompt_of(5, 1), NAMES[0], max_new_tokens=4) for name in ("unlucky", "lucky")]
    answers = harness.run(requests)
    assert isinstance(answers["unlucky"].error, InternalError)
    assert "planted" not in answers["unlucky"].error.message
    assert len(answers["lucky"].token_ids[0]) == 4
