"""LoRAM recovered: scattered with zeros, read without them, served on the original alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import FINGERPRINT, PREFIX, spec_of, tiny_spec
from applied_adapters import applied, delta_rows, logits
from architectures import build_model
from kind_adapters import PRUNED_FINGERPRINT, make_loram
from motley_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.kinds.loram_recovery import recover, restrict
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import read_adapter
from motley_bases.pruned_geometry import DecoderShape, KeptChannels, kept_channels
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = (5, 17, 33, 8, 64, 3)
UP = "model.layers.0.mlp.up_proj"
SHAPE = DecoderShape(3, 64, 96, 4, 2, 16, 80)
KEPT = kept_channels(SHAPE, kv_heads=[1], ffn_channels=range(0, 96, 3))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIDES = {
    "outputs of a Linear": (KeptChannels(outputs=(1, 3, 4)), 5, 3),
    "inputs": (KeptChannels(inputs=(1, 3, 4)), 3, 6),
}


@pytest.mark.parametrize("side", SIDES)
def test_recovery_is_the_pruned_delta_where_channels_were_kept_and_zero_elsewhere(side: str) -> None:
    kept, inputs, outputs = SIDES[side]
    pruned = LoraPair(random(2, inputs), random(outputs, 2, seed=1), 2.0)
    recovered = recover(pruned, kept, 6 if kept.inputs else 5, 6)
    delta, small = recovered.b @ recovered.a, pruned.b @ pruned.a
    rows, columns = list(kept.outputs or range(6)), list(kept.inputs or range(5))
    assert torch.equal(delta[rows][:, columns], small)
    assert delta.norm() == pytest.approx(float(small.norm()))
    delta[torch.tensor(rows)[:, None], torch.tensor(columns)] = 0
    assert not delta.any()
    again = restrict(recovered, kept)
    assert torch.equal(again.a, pruned.a)
    assert torch.equal(again.b, pruned.b)
    assert recovered.scale == 2.0


def test_the_ffn_example_by_hand() -> None:
    kept = kept_channels(DecoderShape(1, 4, 6, 2, 2, 2, 10), kv_heads=[0], ffn_channels=[1, 3, 4])
    up = recover(LoraPair(random(1, 4), torch.tensor([[1.0], [2], [3]])), kept["up_proj"], 4, 6)
    down = recover(LoraPair(torch.tensor([[1.0, 2, 3]]), random(4, 1)), kept["down_proj"], 6, 4)
    assert up.b.flatten().tolist() == down.a.flatten().tolist() == [0, 1, 0, 2, 3, 0]


def test_factors_of_other_sizes_are_not_scattered() -> None:
    with pytest.raises(ValueError, match="lora_B has 4 channels, the pruned copy has 3"):
        recover(LoraPair(random(2, 5), random(4, 2)), KeptChannels(outputs=(1, 3, 4)), 5, 6)


# --- whole models ----------------------------------------------------------------------------------------------------


def linears(model: PreTrainedModel) -> list[tuple[str, Any, KeptChannels]]:
    named = ((path, path.rpartition(".")[2], module) for path, module in model.named_modules())
    return [(path, module, KEPT[name]) for path, name, module in named if name in KEPT]


def prune(model: PreTrainedModel) -> PreTrainedModel:
    """Return a physically smaller model with the kept channels of every layer."""
    small = build_model(
        "llama", vocab_size=80, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32
    )
    state = dict(model.state_dict())
    for path, _, kept in linears(model):
        weight = state[f"{path}.weight"]
        weight = weight if kept.outputs is None else weight[list(kept.outputs)]
        state[f"{path}.weight"] = weight if kept.inputs is None else weight[:, list(kept.inputs)]
    small.load_state_dict(state)
    return small


def mask(model: PreTrainedModel) -> None:
    """Take away what pruned channels contribute to the rest."""
    with torch.no_grad():
        for _, module, kept in linears(model):
            if kept.inputs is not None:
                pruned = sorted(set(range(module.in_features)) - set(kept.inputs))
                module.weight[:, pruned] = 0


def test_a_pruned_model_is_the_original_without_the_pruned_contributions() -> None:
    model = build_model("llama", vocab_size=80)
    whole, pruned = logits(model, TOKENS), logits(prune(model), TOKENS)
    mask(model)
    torch.testing.assert_close(logits(model, TOKENS), pruned, rtol=1e-5, atol=1e-4)
    assert (whole - pruned).abs().max() > 0.1


def test_a_recovered_adapter_does_to_the_masked_original_what_it_did_to_the_pruned(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base, small = spec_of(model), prune(model)
    trained = {
        path: LoraPair(random(2, m.in_features, seed=i) * 0.1, random(m.out_features, 2, seed=i + 50) * 0.5, 2.0)
        for i, (path, m, _) in enumerate(linears(small))
    }
    with torch.no_grad():
        for path, module, _ in linears(small):
            module.weight += 2.0 * trained[path].b @ trained[path].a
    recovered = {path: recover(trained[path], kept, m.in_features, m.out_features) for path, m, kept in linears(model)}
    write_peft_lora(tmp_path, recovered)
    write_loram_manifest(tmp_path, base, trained_on=PRUNED_FINGERPRINT)
    mask(model)
    with applied(model, (read_adapter(tmp_path, base), 1.0)):
        served = logits(model, TOKENS)
    torch.testing.assert_close(served, logits(small, TOKENS), rtol=1e-5, atol=1e-4)
    assert (served - logits(model, TOKENS)).abs().max() > 0.1


def test_compact_and_zero_filled_and_merged_agree(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    compact = read_adapter(make_loram(tmp_path, base, seed=1), base)
    (tmp_path / "motley_manifest.json").unlink()  # without it, the same files are a LoRA with zeros
    filled = read_adapter(tmp_path, base)
    assert compact.spec.nbytes < filled.spec.nbytes
    for path, unit in compact.units.items():
        assert unit.inputs is not None or unit.outputs is not None
        inputs, outputs = base.linears[path]
        x = random(3, inputs, seed=2)
        ours, theirs = delta_rows(unit, x, outputs), delta_rows(filled.units[path], x, outputs)
        a, b = filled.units[path].a, filled.units[path].b
        assert a is not None
        assert b is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, x @ (2.0 * b.T @ a).T, rtol=1e-5, atol=1e-5)


def test_peft_loads_the_recovered_directory(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    with applied(model, (read_adapter(make_loram(tmp_path, base, seed=3), base), 1.0)):
        ours = logits(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(PeftModel.from_pretrained(model, tmp_path).eval(), TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


# --- the door --------------------------------------------------------------------------------------------------------

PAIR = LoraPair(torch.ones(2, 4), torch.tensor([[0.0, 0], [1, 1], [0, 0], [0, 2], [0, 0], [0, 0], [3, 0], [0, 0]]))


def declared(directory: Path, pair: LoraPair = PAIR, **fields: Any) -> Path:
    write_peft_lora(directory, {UP: pair})
    manifest = {
        "schema_version": 1,
        "kind": "loram",
        "trained_on": PRUNED_FINGERPRINT,
        "serves_on": FINGERPRINT,
        "loram": {"recovered": True, "prune_manifest": f"sha256:{'e' * 64}"},
    }
    (directory / "motley_manifest.json").write_text(json.dumps(manifest | fields))
    return directory


def test_zeros_are_not_held(tmp_path: Path) -> None:
    adapter = read_adapter(declared(tmp_path), tiny_spec())
    unit = adapter.units[UP]
    assert unit.outputs is not None
    assert unit.inputs is None
    assert unit.outputs.tolist() == [1, 3, 6]
    assert unit.b is not None
    assert unit.b.tolist() == [[1.0, 0, 3], [1, 2, 0]]
    assert (adapter.spec.trained_on, adapter.spec.serves_on) == (PRUNED_FINGERPRINT, FINGERPRINT)
    assert adapter.spec.nbytes == 4 * (2 * 4 + 2 * 3 + 3)


LORAM = "motley_manifest.loram"
REFUSALS: dict[str, tuple[dict[str, Any], type[AdapterError], str, str]] = {
    "on the pruned base": (
        {"trained_on": FINGERPRINT},
        AdapterMismatchError,
        "BASE_MISMATCH",
        "motley_manifest.serves_on",
    ),
    "on another base": (
        {"serves_on": PRUNED_FINGERPRINT},
        AdapterMismatchError,
        "BASE_MISMATCH",
        "motley_manifest.serves_on",
    ),
    "for who knows": ({"serves_on": "undeclared"}, AdapterFormatError, "MISSING_FIELD", "motley_manifest.serves_on"),
    "not recovered": ({"loram": {"recovered": False}}, AdapterMismatchError, "NOT_RECOVERED", f"{LORAM}.recovered"),
    "recovered by a word": ({"loram": {"recovered": "yes"}}, AdapterFormatError, "INVALID_FIELD", f"{LORAM}.recovered"),
    "recovered or not": ({"loram": {}}, AdapterFormatError, "MISSING_FIELD", f"{LORAM}.recovered"),
    "no object": ({"loram": []}, AdapterFormatError, "INVALID_FIELD", LORAM),
    "a prune manifest that is no digest": (
        {"loram": {"recovered": True, "prune_manifest": "v1"}},
        AdapterFormatError,
        "INVALID_FIELD",
        f"{LORAM}.prune_manifest",
    ),
    "an unknown field": (
        {"loram": {"recovered": True, "rho": 0.65}},
        AdapterFormatError,
        "UNKNOWN_FIELD",
        f"{LORAM}.rho",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, error, reason, field = REFUSALS[case]
    with pytest.raises(error) as caught:
        read_adapter(declared(tmp_path, **fields), tiny_spec())
    assert (type(caught.value), caught.value.reason, caught.value.field) == (error, reason, field)


def test_factors_that_were_never_recovered_do_not_fit_the_original(tmp_path: Path) -> None:
    pruned = LoraPair(torch.ones(2, 4), torch.ones(3, 2))
    with pytest.raises(AdapterMismatchError) as caught:
        read_adapter(declared(tmp_path, pruned), tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("SHAPE_MISMATCH", f"{PREFIX}{UP}.lora_B.weight")


def test_an_adapter_of_zeros_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(declared(tmp_path, LoraPair(torch.ones(2, 4), torch.zeros(8, 2))), tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("EMPTY_ADAPTER", "lora_B")


def test_a_module_of_zeros_has_no_unit(tmp_path: Path) -> None:
    query = "model.layers.0.self_attn.q_proj"
    write_peft_lora(tmp_path, {UP: PAIR, query: LoraPair(torch.ones(2, 4), torch.zeros(6, 2))})
    write_loram_manifest(tmp_path, tiny_spec(), trained_on=PRUNED_FINGERPRINT)
    assert read_adapter(tmp_path, tiny_spec()).units.keys() == {UP}


def test_the_trained_base_may_stay_undeclared(tmp_path: Path) -> None:
    assert read_adapter(declared(tmp_path, trained_on="undeclared"), tiny_spec()).spec.trained_on == "undeclared"
