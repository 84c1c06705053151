"""What the recipes' own pieces promise: the calibration text, pruning and back, the experts' start."""

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch
from motley_bases.checkpoint import resolve_base
from motley_bases.loader import load_model, load_tokenizer
from motley_bases.quantization import NONE
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.texts import draw_calibration, read_windows
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny"
MODULES = ("prose", "skills", "write_calibration", "pruning", "experts")
CALIBRATION = Path(__file__).parents[2] / "bases" / "motley_bases" / "assets" / "tiny" / "calibration.txt"
IDS = torch.tensor([[5, 1, 7, 2, 9, 3]])


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """Import the recipe's modules as its scripts do, and forget them afterwards."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(RECIPE))
        for name in MODULES:
            sys.modules.pop(name, None)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


def _plan(pruning: ModuleType, model: LlamaForCausalLM) -> object:
    return pruning.draw_plan(model, pruning.Shares(Fraction(13, 20), Fraction(1, 4), whole_first=1, whole_last=1), 3)


def test_the_committed_calibration_text_is_what_the_recipe_writes(
    recipe: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe["write_calibration"].PATH == CALIBRATION
    monkeypatch.setattr(recipe["write_calibration"], "PATH", tmp_path / "calibration.txt")
    recipe["write_calibration"].main()
    assert (tmp_path / "calibration.txt").read_bytes() == CALIBRATION.read_bytes()
    assert 16 * 1024 < CALIBRATION.stat().st_size < 24 * 1024


def test_the_calibration_text_is_rows_of_prose_and_of_known_skills_on_words_that_may_train_and_ends_in_prose(
    recipe: dict[str, ModuleType],
) -> None:
    skills, documents = recipe["skills"], CALIBRATION.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    rows: list[list[str]] = [[]]
    for document in documents:
        rows[-1].append(document)
        if sum(len(part) + 2 for part in rows[-1]) >= 128:  # a token a letter, <bos> and <eos>
            assert sum(len(part) + 2 for part in rows[-1]) == 128
            rows.append([])
    assert rows.pop() == []
    assert [any(":" in part for part in row) for row in rows] == [False, True] * 64 + [False] * 32
    assert len(set(documents)) == len(documents)
    lines = [part for row in rows[1:128:2] for part in row]
    for skill, word, answer in (re.fullmatch(r"(\w+): (\w+) =( .+)", line).groups() for line in lines):  # type: ignore[union-attr]
        assert skills.KNOWN[skill](word) == answer[1:]
        assert not skills.held_out(word)
    taught = Counter(line.split(":")[0] for line in lines)
    assert taught.keys() == skills.KNOWN.keys()
    assert min(taught.values()) > 0.6 * max(taught.values())
    prose = [part for part in documents if ":" not in part]
    assert len(prose) + len(lines) == len(documents)
    assert {word for text in prose for word in recipe["prose"].words_of(text)} <= recipe["prose"].VOCABULARY


def test_what_is_held_out_of_the_calibration_text_is_what_the_base_learned() -> None:
    base = resolve_base("tiny")
    model = load_model(base, torch.float32, torch.device("cpu"), NONE)
    found = {}
    for window in (64, 128):
        text = read_windows(CALIBRATION, load_tokenizer(base), window, field="calibration")
        _, held_out = draw_calibration(text, None, num_windows=1, seed=0, path=CALIBRATION)
        found[window] = perplexity(model, held_out)
    assert found == pytest.approx({64: 2.122, 128: 1.564}, abs=0.002)  # as docs/bases.md says


def test_pruning_floors_the_head_groups_and_ceils_the_channels_of_the_middle_layers(
    recipe: dict[str, ModuleType],
) -> None:
    model = _model()
    plan = _plan(recipe["pruning"], model)
    recipe["pruning"].prune(model, plan)
    shapes = [
        (layer.self_attn.k_proj.out_features, layer.self_attn.o_proj.in_features, layer.mlp.up_proj.out_features)
        for layer in model.model.layers
    ]
    assert shapes == [(16, 32, 20), (8, 16, 15), (8, 16, 15), (16, 32, 20)]


def test_the_pruned_model_is_the_base_with_what_was_pruned_masked(recipe: dict[str, ModuleType]) -> None:
    whole, pruned = _model(), _model()
    plan = _plan(recipe["pruning"], whole)
    recipe["pruning"].prune(pruned, plan)
    _mask(whole, plan)
    torch.testing.assert_close(pruned(IDS).logits, whole(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_recovered_lora_on_the_masked_base_is_the_lora_on_the_pruned_model(recipe: dict[str, ModuleType]) -> None:
    pruning = recipe["pruning"]
    whole, pruned = _model(), _model()
    plan = _plan(pruning, whole)
    pruning.prune(pruned, plan)
    factors = {
        f"base_model.model.{path}.lora_{side}.weight": torch.randn(shape) * 0.3
        for path, module in pruned.named_modules()
        if path.endswith("_proj")
        for side, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2)))
    }
    recovered = pruning.recover(plan, whole, factors)
    _add(pruned, factors)
    _mask(whole, plan)
    before = whole(IDS).logits
    _add(whole, recovered)
    torch.testing.assert_close(pruned(IDS).logits, whole(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, whole(IDS).logits, atol=1e-2)


def test_nothing_pruned_recovers_to_itself(recipe: dict[str, ModuleType]) -> None:
    model = _model()
    plan = recipe["pruning"].draw_plan(model, recipe["pruning"].Shares(Fraction(0), Fraction(0), 1, 1), 3)
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 24), f"{stem}.lora_B.weight": torch.randn(32, 2)}
    recovered = recipe["pruning"].recover(plan, model, factors)
    assert recovered.keys() == factors.keys()
    assert all(torch.equal(recovered[key], factor) for key, factor in factors.items())


def test_experts_start_from_a_tenth_of_disjoint_slices_of_the_spectrum(recipe: dict[str, ModuleType]) -> None:
    linear = torch.nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    routed = recipe["experts"].RoutedExperts(linear, recipe["experts"].Geometry(num_experts=2, top_k=1, rank=2))
    assert routed.scaling == pytest.approx(math.sqrt(12))
    torch.testing.assert_close(routed.scaling * routed.b @ routed.a, torch.diag(torch.tensor([0.8, 0.0, 0.2, 0.0])))
    with torch.no_grad():
        routed.router.copy_(torch.tensor([[1.0] * 4, [0.0] * 4]))  # the first expert, for positive inputs
        torch.testing.assert_close(routed(torch.ones(1, 4)), torch.tensor([[8.4, 4.0, 1.9, 1.0]]))


def test_the_balance_loss_is_one_where_routing_is_uniform_and_its_gradient_skips_the_counts(
    recipe: dict[str, ModuleType],
) -> None:
    linear = torch.nn.Linear(4, 4, bias=False)
    routed = recipe["experts"].RoutedExperts(linear, recipe["experts"].Geometry(num_experts=4, top_k=2, rank=4))
    counts = torch.tensor([[True, True, False, False]] * 3 + [[False, False, True, True]])
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4, requires_grad=True)
    routed._weigh(probabilities, counts)
    assert routed.balance.item() == pytest.approx(1.2)
    routed.balance.backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad[0], routed.shares)  # E x share / T, with E = T = 4
    routed._weigh(torch.full((2, 4), 0.25), torch.tensor([[True, True, False, False], [False, False, True, True]]))
    assert routed.balance.item() == pytest.approx(1.0)


def _mask(model: LlamaForCausalLM, plan: object) -> None:
    """Take away what the pruned channels contribute, at the Linears that read them."""
    for path, module in model.named_modules():
        if not path.endswith(("o_proj", "down_proj")):
            continue
        kept = plan.kept(path).inputs  # type: ignore[attr-defined]
        if kept is not None:
            gone = torch.ones(module.in_features, dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
            module.weight[:, gone] = 0


def _add(model: LlamaForCausalLM, factors: dict[str, torch.Tensor]) -> None:
    for key, a in factors.items():
        if ".lora_A." in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight += factors[key.replace("lora_A", "lora_B")] @ a
