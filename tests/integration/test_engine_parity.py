"""The engine answers as transformers does, and as PEFT does under an adapter, whatever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, build_checkpoint
from engine_harness import Answer, Harness, make_harness
from motley_bases.kv_cache import bytes_per_block
from peft_adapters import generate, make_adapter

NUM_REQUESTS = 16
MAX_NEW_TOKENS = 12
LORAS: dict[str, dict[str, object]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.1.mlp.down_proj": 9},
    },
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "strength": 3.0},
}


def draw_prompts(vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """Draw prompts of very different lengths, a few of them with a long common beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(10, vocab_size) for _ in range(21)]
    lengths = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 33, 40, 47, 61][:NUM_REQUESTS]
    prompts = [[rng.randrange(10, vocab_size) for _ in range(length)] for length in lengths]
    return [shared + prompt[: len(prompt) // 2] if index % 4 == 0 else prompt for index, prompt in enumerate(prompts)]


def cramped_settings(harness: Harness, num_blocks: int = 40) -> dict[str, int]:
    """Return sizes in which prompts are chunked, sequences preempted and prefixes found again."""
    return {
        "block_size": 4,
        "token_budget": 24,
        "max_running": 12,
        "kv_cache_bytes": bytes_per_block(harness.base.spec, 4, harness.base.dtype) * num_blocks,
    }


def assert_answers(answers: dict[str, Answer], expected: list[tuple[list[int], list[float]]], prefix: str = "") -> None:
    for index, (tokens, logprobs) in enumerate(expected):
        answer = answers[f"{prefix}{index}"]
        assert answer.token_ids[0] == tokens, f"request {prefix}{index}"
        assert [entry.logprob for entry in answer.logprobs[0]] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_equal_generate_under_chunks_preemption_and_prefix_hits(
    architecture: str, tmp_path: Path
) -> None:
    directory = build_checkpoint(architecture, tmp_path / "base")
    roomy = make_harness(directory)
    harness = make_harness(directory, base=roomy.base, **cramped_settings(roomy))
    prompts = draw_prompts(harness.base.spec.vocab_size)
    requests = [
        harness.request(str(index), prompt, max_new_tokens=MAX_NEW_TOKENS, logprobs=0)
        for index, prompt in enumerate(prompts)
    ]
    answers = harness.run(requests)
    assert_answers(answers, generate(directory, prompts, max_new_tokens=MAX_NEW_TOKENS))
    assert harness.observer.num_preemptions > 0
    assert harness.observer.num_hit_tokens > 0
    assert max(step.num_tokens for step in harness.observer.steps) <= 24 < len(prompts[-1]), "no prompt was chunked"
    assert max(step.num_sequences for step in harness.observer.steps) > 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_adapter_answers_as_peft_does_alone_and_mixed(architecture: str, tmp_path: Path) -> None:
    directory = build_checkpoint(architecture, tmp_path / "base")
    phi = architecture == "phi3"
    fused = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    loras = {"plain": {"target_modules": fused}} if phi else dict(LORAS)
    paths = {
        name: make_adapter(directory, tmp_path / name, seed=seed, **config)  # type: ignore[arg-type]
        for seed, (name, config) in enumerate(loras.items())
    }
    roomy = make_harness(directory)
    # Fewer requests need less room to be in each other's way, whenever their adapter comes.
    harness = make_harness(directory, paths, base=roomy.base, **cramped_settings(roomy, 16 if phi else 40))
    drawn = draw_prompts(harness.base.spec.vocab_size, seed=1)
    prompts = [drawn[index] for index in (4, 8, 3, 5, 6, 7)]  # the first two begin alike
    plain = generate(directory, prompts, max_new_tokens=6)
    expected = {name: generate(directory, prompts, path, max_new_tokens=6) for name, path in paths.items()}
    for name, answers in expected.items():
        assert any(tokens != base for (tokens, _), (base, _) in zip(answers, plain, strict=True)), (
            f"{name} moves nothing"
        )
    mixed = [
        harness.request(f"{name}/{index}", prompt, *adapters, max_new_tokens=6, logprobs=0)
        for index, prompt in enumerate(prompts)
        for name, adapters in [("base", ()), *((name, (name,)) for name in paths)]
    ]
    answers = harness.run(mixed)
    assert_answers(answers, plain, "base/")
    for name in paths:
        assert_answers(answers, expected[name], f"{name}/")
    assert max(step.num_distinct_adapters for step in harness.observer.steps) == len(paths)
    assert harness.observer.num_preemptions > 0
    assert harness.observer.num_hit_tokens > 0
    longest = max(map(len, prompts))
    assert max(step.num_tokens for step in harness.observer.steps) <= 24 < longest, "no prompt was chunked"
    for name in paths:
        alone = harness.run([harness.request("alone/0", prompts[0], name, max_new_tokens=6, logprobs=0)])
        assert_answers(alone, expected[name][:1], "alone/")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice for merging
def test_adapters_on_embedding_and_lm_head_answer_as_peft_does(tmp_path: Path) -> None:
    for architecture in ("llama", "gemma3_text"):
        directory = build_checkpoint(architecture, tmp_path / architecture)
        path = make_adapter(
            directory,
            tmp_path / f"{architecture}-a",
            seed=5,
            target_modules=["embed_tokens", "lm_head", "q_proj"],
            strength=2.0,
        )
        harness = make_harness(directory, {"ends": path})
        prompts = draw_prompts(harness.base.spec.vocab_size, seed=2)[2:8]
        requests = [
            harness.request(f"{name}/{index}", prompt, *adapters, max_new_tokens=6, logprobs=0)
            for index, prompt in enumerate(prompts)
            for name, adapters in (("base", ()), ("ends", ("ends",)))
        ]
        answers = harness.run(requests)
        plain = generate(directory, prompts, max_new_tokens=6)
        expected = generate(directory, prompts, path, max_new_tokens=6)
        assert [tokens for tokens, _ in expected] != [tokens for tokens, _ in plain], "the adapter moves nothing"
        assert_answers(answers, plain, "base/")
        assert_answers(answers, expected, "ends/")
