"""Quantized bases: what is refused by name, what stays whole, and that nothing changes the weights once loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_bases import packing
from motley_bases.base import Base
from motley_bases.base_record import RECORD_FILE, BaseRecord, write_base_record
from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.linear import AdapterLinear
from motley_bases.loader import load_base, load_model
from motley_bases.quantization import is_quantized, linear_bytes, quantized_linears
from packed_passes import run_packed
from quantized_bases import METHODS, meant_weight, quantized_model, write_meant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj"
SEQUENCES = ([5, 9, 2, 7, 11, 3, 8], [4, 4, 6])
CUTS = ((4, 2), (7, 3))
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stored_once(whole: Path, method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(whole, method, tmp_path_factory.mktemp(method) / "stored")


@pytest.fixture
def stored(stored_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored_once, tmp_path / "stored"))


def store(whole: Path, method: str, directory: Path, **settings: Any) -> Path:
    """Write what transformers makes of a checkpoint, with its tokenizer."""
    quantized_model(whole, method, **settings).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(whole / name, directory / name)
    return directory


def load(directory: Path, **settings: Any) -> Base:
    return load_base(directory, dtype=settings.pop("dtype", "float32"), device=CPU, **settings)


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_quantization_leaves_fingerprint_linears_and_whole_modules_alone(whole: Path, method: str) -> None:
    plain, quantized = load(whole).spec, load(whole, quantize=method)
    spec = quantized.spec
    assert (spec.quantization, plain.quantization) == (method, "none")
    assert (spec.fingerprint, spec.linears, spec.other_modules) == (
        plain.fingerprint, plain.linears, plain.other_modules,
    )  # fmt: skip
    bases = {path: quantized.model.get_submodule(path).base for path in spec.linears}
    assert {path for path, base in bases.items() if not is_quantized(base)} == {"lm_head"}
    tensors = load_file(whole / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(quantized.tensor(name), tensors[name])
    assert spec.identity != plain.identity


def test_a_stored_checkpoint_is_served_as_it_is_and_in_no_other_way(stored: Path, whole: Path, method: str) -> None:
    base = load(stored)
    assert base.spec.quantization == method
    on_load = load(whole, quantize=method)
    for ours, theirs in zip(run_packed(base, SEQUENCES, CUTS), run_packed(on_load, SEQUENCES, CUTS), strict=True):
        assert torch.equal(ours, theirs)
    other = "int8" if method == "nf4" else "nf4"
    for asked in (other, "none"):
        with pytest.raises(UnsupportedBaseError, match=f"stored as {method}") as caught:
            load(stored, quantize=asked)
        assert (caught.value.reason, caught.value.field) == ("QUANTIZED_OTHERWISE", "quantize")


def test_a_checkpoint_made_elsewhere_is_a_base_of_its_own(stored: Path, whole: Path) -> None:
    assert load(stored).spec.fingerprint == fingerprint(stored) != fingerprint(whole)


def test_a_record_makes_adapters_of_the_original_match(stored: Path, whole: Path, method: str) -> None:
    write_base_record(stored, BaseRecord(fingerprint(whole), fingerprint(stored), method))
    assert load(stored).spec.fingerprint == fingerprint(whole)


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"stored_fingerprint": f"sha256:{'0' * 64}"}, "RECORD_MISMATCH", "stored_fingerprint"),
        ({"original_fingerprint": "sha256:12"}, "BROKEN_RECORD", "original_fingerprint"),
        ({"original_fingerprint": None}, "BROKEN_RECORD", "original_fingerprint"),
        ({"schema_version": 2}, "BROKEN_RECORD", "schema_version"),
        ({"quantization": "none"}, "BROKEN_RECORD", "quantization"),
        ({"pruned": True}, "BROKEN_RECORD", "pruned"),
    ],
)
def test_a_record_of_other_weights_or_another_form_is_refused(
    stored: Path, method: str, change: dict[str, Any], reason: str, field: str
) -> None:
    write_base_record(stored, BaseRecord(f"sha256:{'1' * 64}", fingerprint(stored), method))
    edit_json(stored / RECORD_FILE, **change)
    with pytest.raises(UnreadableBaseError) as caught:
        load(stored)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_record_of_the_other_method_is_refused(stored: Path, method: str) -> None:
    other = "int8" if method == "nf4" else "nf4"
    write_base_record(stored, BaseRecord(f"sha256:{'1' * 64}", fingerprint(stored), other))
    with pytest.raises(UnreadableBaseError, match="quantization is") as caught:
        load(stored)
    assert caught.value.reason == "RECORD_MISMATCH"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quant_method": "gptq"}, "quantization_config"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "quantization_config"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantization_config.bnb_4bit_quant_type"),
        ({"load_in_4bit": True}, "quantization_config.bnb_4bit_quant_type"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
            "quantization_config.bnb_4bit_quant_storage",
        ),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "quantization_config.llm_int8_has_fp16_weight"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "quantization_config.llm_int8_skip_modules"),
    ],
)
def test_other_ways_of_quantizing_are_refused_by_name(
    whole: Path, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "base"))
    edit_json(directory / "config.json", quantization_config={"quant_method": "bitsandbytes", **change})
    with pytest.raises(UnsupportedBaseError) as caught:
        load(directory)
    assert (caught.value.reason, caught.value.field) == ("QUANTIZED_CHECKPOINT", field)


def test_a_quantized_lm_head_is_refused(whole: Path, tmp_path: Path) -> None:
    directory = store(whole, "int8", tmp_path / "stored", llm_int8_skip_modules=["nothing"])
    with pytest.raises(UnsupportedBaseError, match="lm_head is quantized") as caught:
        load(directory)
    assert caught.value.reason == "EMBEDDINGS"


def shorten(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{DOWN}.{name}": tensors[f"{DOWN}.{name}"][:-1].clone()})


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{DOWN}.{name}")


def restate(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Change what an NF4 tensor says of itself."""

    def edit(tensors: dict[str, Tensor]) -> None:
        name = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
        said = {**json.loads(bytes(tensors[name].tolist())), **changes}
        tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return edit


def unquantize(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{DOWN}.")]:
        del tensors[name]
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 96)


DAMAGES: dict[str, dict[str, Callable[[dict[str, Tensor]], None]]] = {
    "nf4": {
        "codes": shorten("weight"),
        "scales": shorten("weight.absmax"),
        "scales of scales": shorten("weight.nested_absmax"),
        "shape": restate(shape=[96, 64]),
        "blocks of nothing": restate(blocksize=0),
        "wide blocks": restate(blocksize=128),
        "outer blocks": restate(nested_blocksize=0),
        "no scales": drop("weight.absmax"),
        "whole": unquantize,
    },
    "int8": {
        "codes": shorten("weight"),
        "scales": shorten("SCB"),
        "no scales": drop("SCB"),
        "whole": unquantize,
    },
}


@pytest.mark.parametrize(("way", "damage"), [(way, damage) for way in METHODS for damage in DAMAGES[way]])
def test_quantized_tensors_of_wrong_shapes_are_refused(whole: Path, tmp_path: Path, way: str, damage: str) -> None:
    directory = store(whole, way, tmp_path / "stored")
    edit_tensors(directory, DAMAGES[way][damage])
    with pytest.raises(UnreadableBaseError) as caught:
        load(directory)
    assert caught.value.reason in ("BROKEN_QUANTIZATION", "OTHER_WEIGHTS", "MODEL_CONSTRUCTION")
    if caught.value.reason == "BROKEN_QUANTIZATION":
        assert caught.value.field == DOWN


@pytest.mark.parametrize(
    ("stored_format", "told"),
    [
        (torch.tensor(1, dtype=torch.uint8), "is 1:"),
        (torch.tensor(3, dtype=torch.uint8), "is 3:"),
        (torch.tensor(0), r"is \[\] of I64"),
        (torch.zeros(2, dtype=torch.uint8), r"is \[2\] of U8"),
    ],
)
def test_int8_weights_that_do_not_lie_row_by_row_are_refused(
    whole: Path, tmp_path: Path, stored_format: Tensor, told: str
) -> None:
    directory, name = store(whole, "int8", tmp_path / "stored"), f"{DOWN}.weight_format"
    assert load_file(directory / "model.safetensors")[name] == 0
    edit_tensors(directory, lambda tensors: tensors.update({name: stored_format}))
    with pytest.raises(UnsupportedBaseError, match=told) as caught:
        load(directory)
    assert (caught.value.reason, caught.value.field) == ("WEIGHT_FORMAT", name)


def test_int8_weights_that_do_not_say_how_they_lie_are_rows(whole: Path, tmp_path: Path) -> None:
    directory = store(whole, "int8", tmp_path / "stored")
    said = run_packed(load(directory), SEQUENCES, CUTS)
    edit_tensors(directory, drop("weight_format"))
    for ours, theirs in zip(run_packed(load(directory), SEQUENCES, CUTS), said, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(whole: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(UnsupportedBaseError, match=f"{package}.*pip install") as caught:
        load(whole, quantize="nf4")
    assert (caught.value.reason, caught.value.field) == ("NO_QUANTIZER", "quantize")


def test_an_unknown_way_is_refused(whole: Path) -> None:
    with pytest.raises(UnsupportedBaseError, match="auto, none, nf4, int8") as caught:
        load(whole, quantize="int4")
    assert caught.value.reason == "QUANTIZE"


def test_serving_changes_no_stored_bit_and_what_is_saved_reloads_exactly(
    whole: Path, method: str, tmp_path: Path
) -> None:
    model = load_model(whole, torch.float32, CPU, method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        logits = model(IDS).logits
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float32, CPU, method)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, logits)
        assert torch.equal(model(IDS).logits, logits)


def test_training_after_serving_has_the_gradients_of_the_weights_that_are_meant(
    whole: Path, method: str, tmp_path: Path
) -> None:
    model = load_model(whole, torch.float32, CPU, method)
    meant = load_model(write_meant(whole, method, tmp_path), torch.float32, CPU, "none")
    with torch.inference_mode():
        model(IDS)
    gradients = []
    for trained in (model, meant):
        embedded = trained.get_input_embeddings()(IDS).detach().clone().requires_grad_()
        trained.train()
        trained(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_no_product_of_bitsandbytes_is_taken_however_many_rows_there_are(
    whole: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a product of bitsandbytes")

    for name in ("matmul_4bit", "matmul"):
        monkeypatch.setattr(bitsandbytes, name, refuse)
    model = load_model(whole, torch.float32, CPU, method)
    for path, linear in quantized_linears(model):
        for num_rows in (0, 1, 2, 9):
            x = torch.randn(num_rows, linear.in_features)
            for is_training in (False, True):
                linear.train(is_training)
                y = linear(x.clone().requires_grad_())
                with torch.inference_mode():
                    assert torch.equal(linear(x), y), f"{path} is trained on as it is served"
                y.sum().backward()


def test_no_weight_is_kept_whole_until_a_backward_pass(whole: Path, method: str) -> None:
    model = load_model(whole, torch.float32, CPU, method)
    x = torch.randn(2, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.get_submodule(DOWN.replace("down", "up"))(x)
    assert sum(tensor.nbytes for tensor in kept) <= x.nbytes


@pytest.mark.parametrize("sizes", [{"intermediate_size": size} for size in (99, 90, 96, 80, 128)] + [{"head_dim": 12}])
def test_products_are_those_of_the_weights_that_are_meant_whatever_the_width(
    tmp_path: Path, method: str, sizes: dict[str, int]
) -> None:
    directory = build_checkpoint("llama", tmp_path, **sizes)
    model = load_model(directory, torch.float32, CPU, method)
    meant = quantized_model(directory, method)
    with torch.inference_mode():
        for path, linear in quantized_linears(model):
            weight = meant_weight(meant.get_submodule(path))
            x = torch.randn(4, linear.in_features)
            torch.testing.assert_close(linear(x), x @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not packing.can_pack(CPU, torch.bfloat16), reason="torch does not pack bfloat16 weights here")
def test_only_whole_linears_are_packed(whole: Path, method: str) -> None:
    base = load(whole, dtype="bfloat16", quantize=method)
    sites = {path: module for path, module in base.model.named_modules() if isinstance(module, AdapterLinear)}
    packed = {path for path, site in sites.items() if isinstance(site.base, packing.PackedLinear)}
    assert packed == {"lm_head"}
    assert base.spec.dtype == "bfloat16"


def test_what_is_no_linear_in_the_checkpoint_takes_no_adapter_quantized_either(tmp_path: Path, method: str) -> None:
    directory = build_checkpoint("gpt2", tmp_path)
    plain, quantized = load(directory), load(directory, quantize=method)
    assert quantized.spec.linears == plain.spec.linears
    assert any(is_quantized(module) for module in quantized.model.modules())


def test_bytes_of_a_linear_are_what_its_tensors_take(whole: Path, method: str) -> None:
    model = load_model(whole, torch.float32, CPU, method)
    for path, linear in quantized_linears(model):
        names = [name for name in model.state_dict() if name.startswith(f"{path}.")]
        counted = {name: model.state_dict()[name] for name in names}
        described = ("bitsandbytes__nf4", "weight_format")  # words in files, no tensors in memory
        held = sum(tensor.nbytes for name, tensor in counted.items() if not name.endswith(described))
        offset = 4 if method == "nf4" else 0
        assert linear_bytes(method, linear.in_features, linear.out_features) == held + offset


def test_a_plain_linear_is_not_taken_for_a_quantized_one() -> None:
    assert not is_quantized(nn.Linear(2, 2))
    assert not is_quantized(nn.Embedding(2, 2))
