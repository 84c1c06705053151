"""Whatever is wrong with an S2FT directory is refused, by reason, with the tensor or the field at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_files import FINGERPRINT, tiny_spec
from motley_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from motley_adapters.reader import read_adapter
from torch import Tensor

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
OTHER = f"sha256:{'f' * 64}"
MODULES = "motley_manifest.s2ft.modules"
FORMAT, MISMATCH = AdapterFormatError, AdapterMismatchError

Files = tuple[dict[str, Any], dict[str, Tensor]]


def sound() -> Files:
    manifest = {
        "schema_version": 1,
        "kind": "s2ft",
        "trained_on": FINGERPRINT,
        "serves_on": FINGERPRINT,
        "s2ft": {"modules": {Q: "input", UP: "output"}},
    }
    tensors = {
        f"{Q}.s2_idx": torch.tensor([0, 2], dtype=torch.int32),
        f"{Q}.s2_weight": torch.arange(12.0).reshape(6, 2),
        f"{UP}.s2_idx": torch.tensor([1, 5, 7], dtype=torch.int32),
        f"{UP}.s2_weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
    }
    return manifest, tensors


def write(directory: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "motley_manifest.json").write_text(json.dumps(manifest))
    (directory / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return directory


def tensor(name: str, value: Tensor | None) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        if value is None:
            del files[1][name]
        else:
            files[1][name] = value

    return change


def indices(*channels: int) -> Callable[[Files], None]:
    return tensor(f"{Q}.s2_idx", torch.tensor(channels, dtype=torch.int32))


def root(**fields: Any) -> Callable[[Files], None]:
    return lambda files: files[0].update(fields)


def modules(*, also: dict[str, Any]) -> Callable[[Files], None]:
    return lambda files: files[0]["s2ft"]["modules"].update(also)


def with_nan(value: float) -> Tensor:
    block = torch.arange(12.0).reshape(6, 2)
    block[3, 1] = value
    return block


CASES: dict[str, tuple[Callable[[Files], None], type[AdapterError], str, str]] = {
    "a channel that the Linear does not have": (indices(0, 4), MISMATCH, "CHANNEL_OUT_OF_RANGE", f"{Q}.s2_idx"),
    "a negative channel": (indices(-1, 2), MISMATCH, "CHANNEL_OUT_OF_RANGE", f"{Q}.s2_idx"),
    "a channel twice": (indices(2, 2), FORMAT, "DUPLICATE_CHANNEL", f"{Q}.s2_idx"),
    "channels that do not ascend": (indices(2, 0), FORMAT, "UNSORTED_CHANNELS", f"{Q}.s2_idx"),
    "channels of 64 bits": (tensor(f"{Q}.s2_idx", torch.tensor([0, 2])), FORMAT, "BAD_DTYPE", f"{Q}.s2_idx"),
    "channels that are floats": (tensor(f"{Q}.s2_idx", torch.tensor([0.0, 2])), FORMAT, "BAD_DTYPE", f"{Q}.s2_idx"),
    "channels in a table": (
        tensor(f"{Q}.s2_idx", torch.zeros(2, 1, dtype=torch.int32)),
        MISMATCH,
        "SHAPE_MISMATCH",
        f"{Q}.s2_idx",
    ),
    "no channels": (tensor(f"{Q}.s2_idx", torch.zeros(0, dtype=torch.int32)), FORMAT, "EMPTY_TENSOR", f"{Q}.s2_idx"),
    "a block of whole numbers": (
        tensor(f"{Q}.s2_weight", torch.ones(6, 2, dtype=torch.int32)),
        FORMAT,
        "BAD_DTYPE",
        f"{Q}.s2_weight",
    ),
    "a block for other outputs": (
        tensor(f"{Q}.s2_weight", torch.ones(5, 2)),
        MISMATCH,
        "SHAPE_MISMATCH",
        f"{Q}.s2_weight",
    ),
    "a block that lies on its side": (
        tensor(f"{UP}.s2_weight", torch.ones(4, 3)),
        MISMATCH,
        "SHAPE_MISMATCH",
        f"{UP}.s2_weight",
    ),
    "a flat block": (tensor(f"{Q}.s2_weight", torch.ones(12)), MISMATCH, "SHAPE_MISMATCH", f"{Q}.s2_weight"),
    "a block of more channels than are named": (
        tensor(f"{Q}.s2_weight", torch.ones(6, 3)),
        FORMAT,
        "RANK_MISMATCH",
        f"{Q}.s2_weight",
    ),
    "NaN": (tensor(f"{Q}.s2_weight", with_nan(torch.nan)), FORMAT, "NON_FINITE", f"{Q}.s2_weight"),
    "infinity": (tensor(f"{Q}.s2_weight", with_nan(torch.inf)), FORMAT, "NON_FINITE", f"{Q}.s2_weight"),
    "a weight that overflows": (
        tensor(f"{Q}.s2_weight", with_nan(3e38)),
        FORMAT,
        "WEIGHT_TOO_LARGE",
        f"{Q}.s2_weight",
    ),
    "no channels file": (tensor(f"{Q}.s2_idx", None), FORMAT, "MISSING_TENSOR", f"{Q}.s2_idx"),
    "no block": (tensor(f"{UP}.s2_weight", None), FORMAT, "MISSING_TENSOR", f"{UP}.s2_weight"),
    "a tensor of no kind": (tensor("x", torch.ones(1)), FORMAT, "UNEXPECTED_TENSOR", "x"),
    "tensors of a module that is not named": (
        tensor(f"{UP}.s2_scale", torch.ones(1)),
        FORMAT,
        "UNEXPECTED_TENSOR",
        f"{UP}.s2_scale",
    ),
    "a module that the base does not have": (
        modules(also={"model.layers.9.mlp.up_proj": "input"}),
        MISMATCH,
        "UNKNOWN_MODULE",
        f"{MODULES}.model.layers.9.mlp.up_proj",
    ),
    "a module that is no Linear": (
        modules(also={"model.norm": "input"}),
        MISMATCH,
        "NOT_A_LINEAR",
        f"{MODULES}.model.norm",
    ),
    "the embedding": (
        modules(also={"model.embed_tokens": "output"}),
        MISMATCH,
        "WRONG_MODULE_KIND",
        f"{MODULES}.model.embed_tokens",
    ),
    "lm_head": (modules(also={"lm_head": "output"}), MISMATCH, "WRONG_MODULE_KIND", f"{MODULES}.lm_head"),
    "a side that there is not": (modules(also={Q: "row"}), FORMAT, "INVALID_FIELD", f"{MODULES}.{Q}"),
    "a side that is no word": (modules(also={Q: 1}), FORMAT, "INVALID_FIELD", f"{MODULES}.{Q}"),
    "no module at all": (root(s2ft={"modules": {}}), FORMAT, "INVALID_FIELD", MODULES),
    "modules as a list": (root(s2ft={"modules": [Q]}), FORMAT, "INVALID_FIELD", MODULES),
    "no modules": (root(s2ft={}), FORMAT, "MISSING_FIELD", MODULES),
    "a field that nobody knows": (
        root(s2ft={"modules": {Q: "input"}, "scale": 2}),
        FORMAT,
        "UNKNOWN_FIELD",
        "motley_manifest.s2ft.scale",
    ),
    "another kind's object": (root(goat={}), FORMAT, "UNKNOWN_FIELD", "motley_manifest.goat"),
    "no object": (lambda files: files[0].pop("s2ft"), FORMAT, "MISSING_FIELD", "motley_manifest.s2ft"),
    "an object that is null": (root(s2ft=None), FORMAT, "INVALID_FIELD", "motley_manifest.s2ft"),
    "an unknown schema": (root(schema_version=2), FORMAT, "UNSUPPORTED_SCHEMA", "motley_manifest.schema_version"),
    "an unknown kind": (root(kind="s3ft"), FORMAT, "UNSUPPORTED_KIND", "motley_manifest.kind"),
    "trained on another base": (root(trained_on=OTHER), MISMATCH, "BASE_MISMATCH", "motley_manifest.trained_on"),
    "for another base": (root(serves_on=OTHER), MISMATCH, "BASE_MISMATCH", "motley_manifest.serves_on"),
    "trained on who knows": (root(trained_on="undeclared"), FORMAT, "MISSING_FIELD", "motley_manifest.trained_on"),
    "for who knows": (lambda files: files[0].pop("serves_on"), FORMAT, "MISSING_FIELD", "motley_manifest.serves_on"),
    "another digest": (root(digest=OTHER), FORMAT, "DIGEST_MISMATCH", "motley_manifest.digest"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, error, reason, field = CASES[case]
    files = sound()
    change(files)
    with pytest.raises(error) as caught:
        read_adapter(write(tmp_path, *files), tiny_spec())
    assert (type(caught.value), caught.value.reason, caught.value.field) == (error, reason, field)


def test_the_files_are_sound_before_they_are_changed(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, *sound()), tiny_spec())
    assert adapter.spec.channels[Q].indices == (0, 2)
    assert adapter.spec.channels[UP].side == "output"
    assert (adapter.spec.serves_on, adapter.spec.trained_on) == (FINGERPRINT, FINGERPRINT)


def test_a_configuration_that_says_lora_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *sound())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("UNEXPECTED_FILE", "adapter_config.json")


def test_a_tensor_given_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *sound())
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode().rstrip()
    twice = f'{header[:-1]},"{Q}.s2_idx":{{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}}}'.encode()
    content = len(twice).to_bytes(8, "little") + twice + raw[8 + length :]
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert caught.value.reason == "DUPLICATE_KEY"


def test_a_base_of_narrower_layers_is_refused_by_channel(tmp_path: Path) -> None:
    write(tmp_path, *sound())
    narrow = tiny_spec(linears=dict(tiny_spec().linears) | {UP: (4, 7)})
    with pytest.raises(AdapterMismatchError, match=r"channel 7; the Linear has 7") as caught:
        read_adapter(tmp_path, narrow)
    assert caught.value.reason == "CHANNEL_OUT_OF_RANGE"
