"""An adapter that is only inspected passes the same checks, gets the same facts, and takes no memory to speak of."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_files import PLAIN_CONFIG, spec_of, tiny_spec, write
from architectures import build_model
from kind_adapters import GOAT_GEOMETRY, make_goat, make_loram, make_s2ft
from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import MANIFEST_FILE, TENSOR_FILE
from motley_adapters.outline import outline_of
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import inspect_adapter, read_adapter
from motley_bases.spec import BaseSpec
from torch import nn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("llama", vocab_size=80)


def make(kind: str, directory: Path, model: nn.Module, dtype: torch.dtype) -> Path:
    base: BaseSpec = spec_of(model)  # type: ignore[arg-type]
    if kind == "lora":
        generator = torch.Generator().manual_seed(1)
        pairs = {
            path: LoraPair(torch.randn(3, i, generator=generator), torch.randn(o, 3, generator=generator), 0.7)
            for path, (i, o) in base.linears.items()
            if path != base.lm_head_path
        }
        write_peft_lora(directory, pairs, dtype=dtype)
        return directory
    if kind == "goat":
        return make_goat(directory, model, base, seed=1, geometry=GOAT_GEOMETRY, dtype=dtype)
    return (make_s2ft if kind == "s2ft" else make_loram)(directory, base, seed=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "s2ft", "goat", "loram"])
def test_an_inspected_adapter_has_the_facts_of_the_read_one(
    kind: str, dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    base: BaseSpec = spec_of(model)  # type: ignore[arg-type]
    directory = make(kind, tmp_path / "adapter", model, dtype)
    adapter = read_adapter(directory, base)
    inspection = inspect_adapter(directory, base)
    assert inspection.spec == adapter.spec
    assert inspection.outline == outline_of(adapter.parts)
    assert inspection.spec.nbytes == sum(unit.nbytes for unit in adapter.units.values())


@pytest.mark.parametrize("kind", ["lora", "s2ft", "goat", "loram"])
def test_a_read_adapter_is_float32_contiguous_and_no_part_of_its_file(
    kind: str, model: nn.Module, tmp_path: Path
) -> None:
    base: BaseSpec = spec_of(model)  # type: ignore[arg-type]
    adapter = read_adapter(make(kind, tmp_path / "adapter", model, torch.float32), base)
    tensors = [tensor for part in adapter.parts for unit in part.units.values() for tensor in unit.tensors]
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.int32}
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_inspecting_writes_nothing_to_the_file(tmp_path: Path) -> None:
    directory = write(tmp_path / "adapter")
    before = (directory / TENSOR_FILE).read_bytes()
    inspect_adapter(directory, tiny_spec())
    assert (directory / TENSOR_FILE).read_bytes() == before


def test_the_only_module_of_an_embedding_that_changes_nothing_is_whole_in_both(tmp_path: Path) -> None:
    stem = "base_model.model.model.embed_tokens"
    tensors = {f"{stem}.lora_embedding_A": torch.zeros(2, 11), f"{stem}.lora_embedding_B": torch.zeros(4, 2)}
    manifest = {
        "schema_version": 1,
        "kind": "loram",
        "serves_on": tiny_spec().fingerprint,
        "loram": {"recovered": True},
    }
    directory = write(tmp_path / "a", PLAIN_CONFIG | {"target_modules": ["embed_tokens"]}, tensors, manifest)
    adapter = read_adapter(directory, tiny_spec())
    assert inspect_adapter(directory, tiny_spec()).spec == adapter.spec
    assert adapter.units["model.embed_tokens"].inputs is None


@pytest.mark.parametrize("padding", range(4))
def test_any_length_of_the_header_is_read_and_gives_one_digest(padding: int, tmp_path: Path) -> None:
    expected = read_adapter(write(tmp_path / "plain"), tiny_spec()).spec
    directory = write(tmp_path / "padded")
    content = (directory / TENSOR_FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    header = header.ljust(len(header) + padding)
    (directory / TENSOR_FILE).write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert inspect_adapter(directory, tiny_spec()).spec == expected
    assert read_adapter(directory, tiny_spec()).spec == expected


def test_a_tensor_file_that_is_a_link_or_empty_is_refused_by_both_doors(tmp_path: Path) -> None:
    linked, empty = write(tmp_path / "linked"), write(tmp_path / "empty")
    (linked / TENSOR_FILE).rename(tmp_path / "elsewhere")
    (linked / TENSOR_FILE).symlink_to(tmp_path / "elsewhere")
    (empty / TENSOR_FILE).write_bytes(b"")
    for directory, reason in ((linked, "SYMLINK_REFUSED"), (empty, "TRUNCATED")):
        for door in (read_adapter, inspect_adapter):
            with pytest.raises(AdapterFormatError) as caught:
                door(directory, tiny_spec())
            assert caught.value.reason == reason


@pytest.mark.parametrize("differs", [False, True])
def test_a_copy_of_a_base_weight_is_compared_to_its_last_row(differs: bool, tmp_path: Path) -> None:
    rows = 70_000  # of 4 values each: more than one piece
    base = tiny_spec(vocab_size=rows)
    weight = torch.randn(rows, 4)
    stored = weight.clone()
    stored[-1, -1] += float(differs)
    stem = "base_model.model.model.embed_tokens"
    tensors = {
        f"{stem}.lora_embedding_A": torch.ones(2, rows),
        f"{stem}.lora_embedding_B": torch.ones(4, 2),
        f"{stem}.base_layer.weight": stored,
    }
    directory = write(tmp_path / "a", PLAIN_CONFIG | {"target_modules": ["embed_tokens"]}, tensors)
    if not differs:
        assert inspect_adapter(directory, base, base_tensor=lambda name: weight).spec.kind == "lora"
        return
    with pytest.raises(ValueError, match="differs") as caught:
        inspect_adapter(directory, base, base_tensor=lambda name: weight)
    assert caught.value.reason == "BASE_WEIGHT_DIFFERS"  # type: ignore[attr-defined]


MEASURE = """
import json, pickle, sys, threading
from pathlib import Path
from motley_adapters import reader

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

sound, small, passes, large = pickle.load(sys.stdin.buffer)
for name, _ in passes:
    getattr(reader, name)(sound, small)  # what the first call alone takes
grown = []
for name, directory in passes:
    before, peak, done = anonymous_bytes(), 0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    getattr(reader, name)(directory, large)
    done.set()
    watcher.join()
    grown.append(peak - before)
print(json.dumps(grown))
"""


def write_wide(directory: Path, num_modules: int, width: int, rank: int) -> int:
    """Write a bfloat16 LoRA of ones, without ever holding it, and return its bytes."""
    directory.mkdir()
    header, begin, nbytes = {}, 0, width * rank * 2
    for module in range(num_modules):
        for name, shape in (("lora_A", [rank, width]), ("lora_B", [width, rank])):
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + nbytes]}
            header[f"base_model.model.model.layers.{module}.mlp.up_proj.{name}.weight"] = entry
            begin += nbytes
    raw = json.dumps(header).encode()
    with open(directory / TENSOR_FILE, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _ in range(2 * num_modules):
            file.write(b"\x80\x3f" * (nbytes // 2))
    config = PLAIN_CONFIG | {"r": rank, "target_modules": ["up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return begin


def growth_of(sound: Path, small: BaseSpec, passes: list[tuple[str, Path]], large: BaseSpec) -> list[int]:
    """Return by how much a process's own memory grows at most while each adapter passes a door, one after another."""
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        input=pickle.dumps((sound, small, passes, large)),
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    grown: list[int] = json.loads(done.stdout)
    return grown


def test_inspecting_takes_a_few_tensors_of_memory_however_large_the_adapter(tmp_path: Path) -> None:
    num_modules, width, rank = 6, 40_960, 128  # 10 MiB a tensor
    nbytes = write_wide(tmp_path / "large", num_modules, width, rank)
    assert nbytes == 120 << 20
    wide = tiny_spec(linears={f"model.layers.{i}.mlp.up_proj": (width, width) for i in range(num_modules)})
    fields = {"schema_version": 1, "kind": "loram", "serves_on": wide.fingerprint, "loram": {"recovered": True}}
    (tmp_path / "loram").mkdir()
    for file in (tmp_path / "large").iterdir():
        (tmp_path / "loram" / file.name).hardlink_to(file)
    (tmp_path / "loram" / MANIFEST_FILE).write_text(json.dumps(fields))
    # The last is how the figure can be told from a whole adapter: that door keeps it, in float32. What it leaves behind
    # would hide what another takes after it.
    passes = [("inspect_adapter", "large"), ("inspect_adapter", "loram"), ("read_adapter", "large")]
    *inspected, read = growth_of(
        write(tmp_path / "small"), tiny_spec(), [(door, tmp_path / name) for door, name in passes], wide
    )
    assert max(inspected) < 16 << 20
    assert read > 2 * nbytes
