"""The base fingerprint: over names and stored bytes, whatever the files; and what broken files are called."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_bases import fingerprint as module
from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import CACHE_FILE, fingerprint, stored_dtypes
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def write_raw(path: Path, header: str, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def refusal(directory: Path) -> UnreadableBaseError:
    with pytest.raises(UnreadableBaseError) as caught:
        fingerprint(directory)
    return caught.value


def test_it_is_the_documented_digest(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor([1.5], dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    a_bytes, b_bytes = struct.pack("<H", 0x3FC0), struct.pack("<6f", *range(6))
    expected = hashlib.sha256()
    for name, dtype, shape, stored in (("a", "BF16", [1], a_bytes), ("b", "F32", [2, 3], b_bytes)):
        line = json.dumps([name, dtype, shape, hashlib.sha256(stored).hexdigest()])
        expected.update(line.encode() + b"\n")
    assert fingerprint(tmp_path) == f"sha256:{expected.hexdigest()}"


def test_sharding_does_not_matter(tmp_path: Path) -> None:
    whole = build_checkpoint("llama", tmp_path / "whole")
    sharded = build_checkpoint("llama", tmp_path / "sharded", shard_bytes=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert fingerprint(whole) == fingerprint(sharded)


def test_file_metadata_order_and_config_do_not_matter(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    before = fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(dict(reversed(tensors.items())), directory / "model.safetensors", metadata={"note": "written again"})
    edit_json(directory / "config.json", rms_norm_eps=0.1)
    assert fingerprint(directory) == before


def test_one_bit_a_name_a_shape_or_a_dtype_changes_it(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.int32)
    seen = set()
    flipped = weight.clone()
    flipped[5] ^= 1
    variants = [
        {"w": weight},
        {"w": flipped},
        {"v": weight},
        {"w": weight.view(2, 3)},
        {"w": weight.view(torch.float32)},
        {"w": weight, "z": weight[:0]},
    ]
    for tensors in variants:
        save_file(tensors, tmp_path / "model.safetensors")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == len(variants)


def test_tied_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    directory = build_checkpoint("llama_tied", tmp_path / "tied")
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    before = fingerprint(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(directory) != before


def test_it_does_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    before = fingerprint(directory)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    assert fingerprint(directory) == before


def test_the_cache_spares_reading_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama", shard_bytes=60_000)
    cache = tmp_path / "state" / "cache"
    shards = sorted(directory.glob("*.safetensors"))
    digested: list[str] = []
    digest_file = module.digest_file

    def counted(path: Path) -> tuple[module.StoredTensor, ...]:
        digested.append(path.name)
        return digest_file(path)

    monkeypatch.setattr(module, "digest_file", counted)
    first = fingerprint(directory, cache_directory=cache)
    assert digested == [path.name for path in shards]
    assert fingerprint(directory, cache_directory=cache) == first
    assert len(digested) == len(shards), "the cache was not used"
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    os.utime(shards[0], ns=(1, 1))
    changed = fingerprint(directory, cache_directory=cache)
    assert digested[len(shards) :] == [shards[0].name]
    assert changed != first
    assert changed == fingerprint(directory)
    assert [path.name for path in cache.iterdir()] == [CACHE_FILE]
    assert len(json.loads((cache / CACHE_FILE).read_text(encoding="utf-8"))) == len(shards), "stale entries stay"


@pytest.mark.parametrize("content", ["", "[]", '{"/x": 3}', '{"/x": [1, 2]}', '{"/x": [1, 2, [["a"]]]}', "\x00"])
def test_a_cache_that_cannot_be_understood_is_made_again(content: str, tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    (tmp_path / CACHE_FILE).write_text(content, encoding="utf-8")
    assert fingerprint(directory, cache_directory=tmp_path) == fingerprint(directory)
    assert str(directory) in (tmp_path / CACHE_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', b"\0" * 8),
        ("[]", b""),
        ('{"a": 3}', b""),
        ('{"a": {"dtype": "F32", "shape": [2]}}', b""),
        ('{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}', b"\0" * 8),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', b"\0" * 8),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}', b"\0" * 8),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 7),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]}}', b"\0" * 8),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 8]}}', b"\0" * 8),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            ' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            b"\0" * 8,
        ),
    ],
)
def test_a_broken_header_is_unreadable(header: str, data: bytes, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", header, data)
    assert refusal(tmp_path).reason == "BROKEN_WEIGHTS"


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 16, struct.pack("<Q", 9) + b"{}"])
def test_what_is_no_safetensors_file_is_unreadable(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert refusal(tmp_path).reason == "BROKEN_WEIGHTS"


def test_a_tensor_in_two_shards_is_unreadable(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "y.safetensors")
    weight_map = {"w": "x.safetensors", "v": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    error = refusal(tmp_path)
    assert error.reason == "BROKEN_WEIGHTS"
    assert "another shard" in error.message


def test_bytes_are_counted_by_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert stored_dtypes([tmp_path / "x.safetensors"]) == {"F16": 6, "F32": 8}
