"""A pruned base, served: it answers as the dense model without the pruned parts, and as transformers does."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from kind_definitions import define
from kind_sets import KINDS, SETS, make_kinds
from motley_adapters.errors import AdapterMismatchError
from motley_adapters.reader import read_adapter
from motley_bases.fingerprint import fingerprint
from motley_bases.kv_cache import KVCache, bytes_per_block
from motley_bases.loader import load_base
from motley_trainer.bases.quantize import quantize_base
from packed_passes import run_packed
from peft_adapters import generate, greedy_answers, make_adapter
from pruned_bases import GROUPED_KEEPS, MULTI_HEAD_KEEPS, Keeps, load, prune_checkpoint, zero_checkpoint
from torch import Tensor

CPU = torch.device("cpu")
CASES: dict[str, tuple[str, dict[str, Any], Keeps]] = {
    "llama": ("llama", {}, GROUPED_KEEPS),
    "llama with a key-value head a query head": ("llama", {"num_key_value_heads": 4}, MULTI_HEAD_KEEPS),
    "llama tied": ("llama_tied", {}, GROUPED_KEEPS),
    "llama with biases": ("llama_biased", {}, GROUPED_KEEPS),
    "llama with scaled RoPE": ("llama3_rope", {}, GROUPED_KEEPS),
    "mistral": ("mistral", {}, GROUPED_KEEPS),
    "qwen2": ("qwen2", {}, GROUPED_KEEPS),
    "qwen3": ("qwen3", {}, GROUPED_KEEPS),
}
# Two sequences: chunks, then steps.
CUTS = ((9, 4), (15, 5), (16, 6), (17, 7))
SEQUENCES = [[(37 * place + 11 * index) % 180 + 10 for place in range(length)] for index, length in enumerate(CUTS[-1])]


@dataclass(frozen=True)
class Copies:
    """One checkpoint, pruned, and dense with the pruned parts unread."""

    whole: Path
    pruned: Path
    zeroed: Path


def make_copies(case: str, root: Path) -> Copies:
    architecture, overrides, keeps = CASES[case]
    whole = build_checkpoint(architecture, root / "whole", **overrides)
    return Copies(
        whole, prune_checkpoint(whole, root / "pruned", keeps), zero_checkpoint(whole, root / "zeroed", keeps)
    )


@pytest.fixture(scope="module", params=CASES)
def copies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return make_copies(request.param, tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return make_copies("llama", tmp_path_factory.mktemp("llama"))


def served_logits(checkpoint: Path) -> list[Tensor]:
    return run_packed(load_base(checkpoint, dtype="float32", device=CPU), SEQUENCES, CUTS)


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_removing_groups_equals_zeroing_them_in_the_dense_model(copies: Copies) -> None:
    pruned, zeroed, whole = (served_logits(path) for path in (copies.pruned, copies.zeroed, copies.whole))
    for small, dense, full in zip(pruned, zeroed, whole, strict=True):
        assert_same_logits(small, dense)
        assert (small - full).abs().max() > 0.1, "nothing was pruned that mattered"


@torch.inference_mode()
def test_paged_and_chunked_equals_one_pass_without_a_cache(copies: Copies) -> None:
    model: Any = load(copies.pruned).eval()
    model.set_attn_implementation("eager")
    for sequence, served in zip(SEQUENCES, served_logits(copies.pruned), strict=True):
        assert_same_logits(served, model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0])


def test_the_engine_answers_as_generate_does_with_the_pruned_class(copies: Copies) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(10, 190) for _ in range(length)] for length in (1, 3, 8, 17, 33, 33)]
    prompts[5][:20] = prompts[4][:20]
    roomy = make_harness(copies.pruned)
    block = bytes_per_block(roomy.base.spec, 4, torch.float32)
    harness = make_harness(
        copies.pruned, base=roomy.base, block_size=4, token_budget=24, max_running=8, kv_cache_bytes=block * 22
    )
    requests = [
        harness.request(str(index), prompt, max_new_tokens=8, logprobs=0) for index, prompt in enumerate(prompts)
    ]
    answers = harness.run(requests)
    for index, (tokens, logprobs) in enumerate(generate(copies.pruned, prompts, max_new_tokens=8)):
        assert answers[str(index)].token_ids[0] == tokens, index
        assert [entry.logprob for entry in answers[str(index)].logprobs[0]] == pytest.approx(logprobs, abs=1e-4)
    assert harness.observer.num_preemptions > 0, "the cache was never short"


def test_what_was_saved_is_loaded_bit_for_bit(copies: Copies, tmp_path: Path) -> None:
    load(copies.pruned).save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(copies.pruned)


def test_layers_and_linears_are_described_with_their_own_sizes(llama: Copies) -> None:
    spec = load_base(llama.pruned, dtype="float32", device=CPU).spec
    assert [(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in spec.layers] == [
        (4, 2, 16), (2, 1, 16), (2, 1, 16),
    ]  # fmt: skip
    assert spec.linears["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert spec.linears["model.layers.1.self_attn.q_proj"] == (64, 32)
    assert spec.linears["model.layers.1.self_attn.v_proj"] == (64, 16)
    assert spec.linears["model.layers.1.self_attn.o_proj"] == (32, 64)
    assert spec.linears["model.layers.1.mlp.up_proj"] == (64, 32)
    assert spec.linears["model.layers.2.mlp.down_proj"] == (40, 64)
    assert spec.fingerprint == fingerprint(llama.pruned) != fingerprint(llama.whole)
    assert spec.pruned_from == fingerprint(llama.whole)
    assert load_base(llama.whole, dtype="float32", device=CPU).spec.pruned_from is None


def test_the_cache_holds_the_heads_that_are_left(llama: Copies) -> None:
    spec = load_base(llama.pruned, dtype="float32", device=CPU).spec
    kv = KVCache.allocate(spec, 5, 4, torch.float32, CPU)
    assert [layer.key.shape[2] for layer in kv.layers] == [2, 1, 1]
    allocated = sum(layer.key.nbytes + layer.value.nbytes for layer in kv.layers)
    assert allocated == 5 * bytes_per_block(spec, 4, torch.float32) == 5 * 4 * (2 + 1 + 1) * 2 * 16 * 4


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_pruned_base_is_quantized_at_load_or_as_a_checkpoint(llama: Copies, method: str, tmp_path: Path) -> None:
    quantize_base(llama.pruned, method, tmp_path / "stored")
    at_load = load_base(llama.pruned, dtype="float32", device=CPU, quantize=method)
    stored = load_base(tmp_path / "stored", dtype="float32", device=CPU)
    assert stored.spec == replace(at_load.spec, name="stored")
    assert (stored.spec.quantization, stored.spec.pruned_from) == (method, fingerprint(llama.whole))
    assert stored.spec.fingerprint == fingerprint(llama.pruned)
    plain = served_logits(llama.pruned)
    for ours, theirs, whole in zip(
        *(run_packed(base, SEQUENCES, CUTS) for base in (at_load, stored)), plain, strict=True
    ):
        assert torch.equal(ours, theirs)
        assert 0.01 < (ours - whole).norm() / whole.norm() < 0.5, "as near as rounding, and no nearer"


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(llama: Copies, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Harness]:
    paths = make_kinds(llama.pruned, tmp_path_factory.mktemp("kinds"))
    return paths, make_harness(llama.pruned, paths, block_size=4, token_budget=40, max_running=32)


def test_every_kind_shares_a_batch_and_answers_as_alone_and_by_its_definition(
    llama: Copies, kinds: tuple[dict[str, Path], Harness]
) -> None:
    paths, harness = kinds
    prompt = SEQUENCES[0]

    def ask(*names: str) -> dict[str, tuple[list[int], list[float]]]:
        requests = [
            harness.request(name, prompt, *SETS[name], max_new_tokens=6, logprobs=0, stop_token_ids=())
            for name in names
        ]
        answers = harness.run(requests)
        return {
            name: (answer.token_ids[0], [entry.logprob for entry in answer.logprobs[0]])
            for name, answer in answers.items()
        }

    together = ask(*SETS)
    assert max(step.num_distinct_adapters for step in harness.observer.steps) == len(KINDS), "they shared no batch"
    plain = together["base"]
    for name, members in SETS.items():
        defined = define(llama.pruned, [(paths[member], weight) for member, weight in members]).model
        defined.generation_config.eos_token_id = None
        [(tokens, logprobs)] = greedy_answers(defined, [prompt], max_new_tokens=6)
        for found in (together[name], ask(name)[name]):
            assert found[0] == tokens, name
            assert found[1] == pytest.approx(logprobs, abs=1e-4), name
        assert not members or together[name] != plain, f"{name} moves nothing"


def test_adapters_of_the_original_do_not_fit_the_pruned_copy_and_the_reverse(llama: Copies, tmp_path: Path) -> None:
    whole, pruned = (load_base(path, dtype="float32", device=CPU).spec for path in (llama.whole, llama.pruned))
    of_whole = make_adapter(llama.whole, tmp_path / "whole", seed=1)
    of_pruned = make_adapter(llama.pruned, tmp_path / "pruned", seed=1)
    assert read_adapter(of_whole, whole).units.keys() == read_adapter(of_pruned, pruned).units.keys()
    for directory, spec in ((of_whole, pruned), (of_pruned, whole)):
        with pytest.raises(AdapterMismatchError) as caught:
            read_adapter(directory, spec)
        assert caught.value.reason == "SHAPE_MISMATCH"
