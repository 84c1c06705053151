"""Loading: which directories are bases, in which dtype they are served, and that weights fit exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_bases import checkpoint
from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.kv_cache import KVCache, bytes_per_block
from motley_bases.loader import load_base, resolve_base
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return build_checkpoint("llama", tmp_path / "llama")


def resolve_refusal(directory: Path) -> UnreadableBaseError:
    with pytest.raises(UnreadableBaseError) as caught:
        resolve_base(str(directory))
    return caught.value


def load_refusal(directory: Path) -> UnreadableBaseError:
    with pytest.raises(UnreadableBaseError) as caught:
        load_base(directory, dtype="float32", device=CPU)
    return caught.value


def test_a_directory_resolves_to_itself(llama: Path) -> None:
    assert resolve_base(str(llama)) == llama


def test_tiny_resolves_to_the_embedded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    llama.rename(tmp_path / "tiny")
    (tmp_path / "assets").mkdir()
    (tmp_path / "tiny").rename(tmp_path / "assets" / "tiny")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    assert resolve_base("tiny") == tmp_path / "assets" / "tiny"


def test_a_name_that_is_nothing_is_unreadable(tmp_path: Path) -> None:
    error = resolve_refusal(tmp_path / "nothing")
    assert error.reason == "NO_SUCH_BASE"
    assert "tiny" in error.message


@pytest.mark.parametrize(
    ("name", "reason"),
    [("config.json", "NO_CONFIG"), ("model.safetensors", "NO_WEIGHTS"), ("tokenizer.json", "NO_TOKENIZER")],
)
def test_a_missing_file_is_named(name: str, reason: str, llama: Path) -> None:
    (llama / name).unlink()
    error = resolve_refusal(llama)
    assert error.reason == reason
    assert name in error.message


def test_pickled_weights_are_refused_by_name(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    for refuse in (resolve_refusal, load_refusal):
        error = refuse(llama)
        assert error.reason == "PICKLED_WEIGHTS"
        assert "pytorch_model.bin" in error.message


def test_pickled_weights_beside_safetensors_are_not_read(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert load_base(llama, dtype="auto", device=CPU).spec.name == "llama"


def test_an_adapter_directory_is_no_base(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert resolve_refusal(llama).reason == "IS_AN_ADAPTER"


@pytest.mark.parametrize("name", ["~no-such-user/base", "n" * 5000])
def test_a_name_that_cannot_be_one_is_unreadable(name: str) -> None:
    assert resolve_refusal(Path(name)).reason == "NO_SUCH_BASE"


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_not_an_object_is_unreadable(content: str, llama: Path) -> None:
    (llama / "config.json").write_text(content, encoding="utf-8")
    assert resolve_refusal(llama).reason == "BROKEN_JSON"


@pytest.mark.parametrize(
    ("reason", "fields", "words"),
    [
        ("BROKEN_CONFIG", {"rms_norm_eps": "wide"}, "wide"),
        ("BROKEN_CONFIG", {"num_attention_heads": 3}, "multiple"),
        ("BROKEN_CONFIG", {"dtype": "float33"}, "float33"),
        ("BROKEN_CONFIG", {"id2label": 3}, "items"),
        ("BROKEN_CONFIG", {"sliding_window": "x"}, "sliding_window"),
        ("MODEL_CONSTRUCTION", {"hidden_act": "swoosh"}, "KeyError: 'swoosh'"),
        ("MODEL_CONSTRUCTION", {"pad_token_id": 100_000}, "Padding_idx"),
        ("MODEL_CONSTRUCTION", {"base_model_tp_plan": 3}, "not iterable"),
        ("MODEL_CONSTRUCTION", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "TypeError"),
    ],
)
def test_a_config_that_transformers_trips_over_is_refused_in_its_words(
    reason: str, fields: dict[str, Any], words: str, llama: Path
) -> None:
    edit_json(llama / "config.json", **fields)
    error = load_refusal(llama)
    assert error.reason == reason
    assert str(llama) in error.message
    assert words in error.message
    assert "\n" not in error.message
    assert (error.__cause__ is None) == (error.field is not None), "the library's error is not chained"


def test_a_rope_type_that_is_no_name_is_refused(llama: Path) -> None:
    edit_json(llama / "config.json", rope_parameters={"rope_type": ["linear"]})
    with pytest.raises(UnsupportedBaseError) as caught:
        load_base(llama, dtype="float32", device=CPU)
    assert caught.value.reason == "ROPE_TYPE"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe"])
def test_a_tokenizer_that_is_broken_is_unreadable(name: str, content: bytes, llama: Path) -> None:
    (llama / name).write_bytes(content)
    error = load_refusal(llama)
    assert error.reason == "BROKEN_TOKENIZER"
    assert str(llama) in error.message
    assert error.__cause__ is not None


def test_a_tokenizer_without_a_model_is_unreadable(llama: Path) -> None:
    for content in ("{}", '{"added_tokens": [], "model": {"type": "swoosh"}}'):
        (llama / "tokenizer.json").write_text(content, encoding="utf-8")
        assert load_refusal(llama).reason == "BROKEN_TOKENIZER"


def outside(index: dict[str, str]) -> None:
    index["lm_head.weight"] = "../model.safetensors"


def missing(index: dict[str, str]) -> None:
    index["lm_head.weight"] = "model-9-of-9.safetensors"


def pickled(index: dict[str, str]) -> None:
    index["lm_head.weight"] = "model.bin"


def empty(index: dict[str, str]) -> None:
    index.clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(outside, "BROKEN_INDEX"), (missing, "MISSING_SHARD"), (pickled, "BROKEN_INDEX"), (empty, "BROKEN_INDEX")],
)
def test_an_index_that_points_elsewhere_is_unreadable(
    change: Callable[[dict[str, str]], None], reason: str, tmp_path: Path
) -> None:
    directory = build_checkpoint("llama", tmp_path / "sharded", shard_bytes=60_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")
    assert resolve_refusal(directory).reason == reason


def test_a_sharded_checkpoint_loads_the_same_weights(tmp_path: Path, llama: Path) -> None:
    sharded = build_checkpoint("llama", tmp_path / "sharded", shard_bytes=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole_base, sharded_base = (load_base(path, dtype="auto", device=CPU) for path in (llama, sharded))
    for (name, left), right in zip(whole_base.model.named_parameters(), sharded_base.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def cut_short(content: bytes) -> bytes:
    return content[:-100]


def cut_in_the_header(content: bytes) -> bytes:
    return content[:50]


def nothing(content: bytes) -> bytes:
    return b""


def bad_text(content: bytes) -> bytes:
    return content[:20] + b"\xff" + content[21:]


def bad_length(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


@pytest.mark.parametrize("damage", [cut_short, cut_in_the_header, nothing, bad_text, bad_length])
def test_damaged_weights_are_unreadable(damage: Callable[[bytes], bytes], llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    error = load_refusal(llama)
    assert error.reason == "BROKEN_WEIGHTS"
    assert str(path) in error.message


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_weights_that_are_not_the_models_are_refused_by_name(kind: str, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing_keys":
        del tensors[name]
    elif kind == "unexpected_keys":
        name = "model.layers.1.mlp.up_proj.bias"
        tensors[name] = torch.zeros(96)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    error = load_refusal(llama)
    assert (error.reason, error.field) == ("OTHER_WEIGHTS", kind)
    assert name in error.message


@pytest.mark.parametrize(
    ("stored", "asked", "served"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float16, "float16", torch.float16),
    ],
)
@pytest.mark.parametrize("is_declared", [True, False])
def test_the_served_dtype(
    stored: torch.dtype, asked: str, served: torch.dtype, is_declared: bool, tmp_path: Path
) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama", dtype=stored)
    if not is_declared:
        edit_json(directory / "config.json", dtype=None, torch_dtype=None)
    base = load_base(directory, dtype=asked, device=CPU)
    assert base.dtype is served
    assert {parameter.dtype for parameter in base.model.parameters()} == {served}
    assert base.device == CPU


def test_serving_float16_in_float32_is_said_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama", dtype=torch.float16)
    with caplog.at_level(logging.INFO, logger="motley_bases.loader"):
        load_base(directory, dtype="auto", device=CPU)
    assert "overflows" in caplog.text


def test_a_dtype_that_nothing_tells_is_refused(llama: Path) -> None:
    edit_json(llama / "config.json", dtype=None, torch_dtype=None)
    save_file({}, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedBaseError, match="dtype None is none of") as caught:
        load_base(llama, dtype="auto", device=CPU)
    assert (caught.value.reason, caught.value.field) == ("DTYPE", "dtype")


def test_an_unknown_dtype_is_refused(llama: Path) -> None:
    with pytest.raises(UnsupportedBaseError, match="int8") as caught:
        load_base(llama, dtype="int8", device=CPU)
    assert caught.value.field == "dtype"


def test_a_loaded_model_is_frozen_and_the_progress_bars_are_as_they_were(llama: Path) -> None:
    were_enabled = transformers_logging.is_progress_bar_enabled()
    base = load_base(llama, dtype="auto", device=CPU)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert transformers_logging.is_progress_bar_enabled() == were_enabled


def test_a_tensor_is_found_under_its_checkpoint_name(llama: Path) -> None:
    base = load_base(llama, dtype="auto", device=CPU)
    stored = load_file(llama / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        assert torch.equal(base.tensor(name), stored[name])


def test_the_kv_cache_is_sized_by_each_layers_own_heads(tmp_path: Path) -> None:
    base = load_base(build_checkpoint("qwen3", tmp_path / "qwen3"), dtype="auto", device=CPU)
    kv = KVCache.allocate(base.spec, 5, 8, torch.bfloat16, CPU)
    assert {tuple(layer.key.shape) for layer in kv.layers} == {(5, 8, 2, 24)}
    assert len(kv.layers) == 3
    total = sum(layer.key.nbytes + layer.value.nbytes for layer in kv.layers)
    assert total == 5 * bytes_per_block(base.spec, 8, torch.bfloat16)
    assert not any(layer.key.any() or layer.value.any() for layer in kv.layers)
