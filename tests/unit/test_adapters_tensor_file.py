"""Malformed safetensors files are refused by reason; on the others we agree with the format's own library."""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import struct
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_adapters.errors import AdapterError, AdapterFormatError
from motley_adapters.tensor_file import (
    MAX_HEADER_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    in_pieces,
    parse_header,
    parse_tensors,
)

FILE = "adapter_model.safetensors"


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_that_the_library_saved(dtype: torch.dtype) -> None:
    saved = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(2).to(dtype), "scalar": torch.tensor(2.5, dtype=dtype)}
    tensors = parse_tensors(safetensors.torch.save(saved, {"format": "pt"}))
    assert tensors.keys() == saved.keys()
    assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], saved[name]) for name in saved)


def test_a_header_of_odd_length_still_gives_aligned_tensors() -> None:
    raw = json.dumps({"x": entry([2], 0, 8)}).encode()
    raw += b" " * (1 - len(raw) % 2)  # odd, so that the data begin at an odd offset
    tensor = parse_tensors(file_of(raw, floats(1.0, 2.0)))["x"]
    assert tensor.tolist() == [1.0, 2.0]
    assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize(("padding", "is_view"), [(0, True), (4, True), (1, False), (2, False)])
def test_an_aligned_tensor_is_a_view_and_another_a_copy(padding: int, is_view: bool) -> None:
    raw = json.dumps({"x": entry([2], 0, 8)}).encode()
    raw += b" " * (-len(raw) % 4 + padding)
    content = bytearray(file_of(raw, floats(1.0, 2.0)))
    tensor = parse_tensors(content)["x"]
    content[-8:] = floats(3.0, 4.0)
    assert tensor.tolist() == ([3.0, 4.0] if is_view else [1.0, 2.0])


def test_a_tensor_keeps_what_it_views_alive() -> None:
    tensor = parse_tensors(bytearray(file_of({"x": entry([1 << 16], 0, 1 << 18)}, floats(1.5) * (1 << 16))))["x"]
    gc.collect()
    junk = [bytearray(b"\xff" * (1 << 18)) for _ in range(8)]
    assert bool((tensor == 1.5).all())
    assert junk


@pytest.mark.parametrize("shape", [(1,), (300_000,), (3, 100_000), (2, 300_000), (100_000, 3), (7, 5, 9000)])
def test_pieces_are_the_tensor_in_order_and_each_is_small_or_one_row(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    for given_tensor in (tensor, tensor.mT if tensor.ndim > 1 else tensor):
        pieces = in_pieces(given_tensor)
        assert torch.equal(torch.cat(pieces), given_tensor)
        assert all(piece.numel() <= 1 << 18 or len(piece) == 1 for piece in pieces)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle() -> None:
    raw = json.dumps({"x": entry([1], 0, 4)}).encode().ljust(640)
    assert struct.pack("<Q", 640).startswith(b"\x80\x02")
    assert parse_tensors(file_of(raw, floats(1.0)))["x"].tolist() == [1.0]


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2)}, buffer)
    return buffer.getvalue()


ONE = entry([1], 0, 4)
MALFORMED: dict[str, tuple[bytes, str, str]] = {
    "empty file": (b"", "TRUNCATED", FILE),
    "seven bytes": (b"\0" * 7, "TRUNCATED", FILE),
    "header past the end": (file_of({"x": ONE}, floats(1), length=4000), "TRUNCATED", FILE),
    "header of 200 MB": (file_of({"x": ONE}, floats(1), length=200_000_000), "HEADER_TOO_LARGE", FILE),
    "header one byte over the bound": (file_of(b"{", length=MAX_HEADER_BYTES + 1), "HEADER_TOO_LARGE", FILE),
    "torch.save in disguise": (torch_saved(), "PICKLE_REFUSED", FILE),
    "pickle in disguise": (pickle.dumps({"x": 1}, protocol=2), "PICKLE_REFUSED", FILE),
    "protocol 5 in disguise": (pickle.dumps({"x": list(range(99))}, protocol=5), "PICKLE_REFUSED", FILE),
    "no object": (file_of([]), "BAD_HEADER", FILE),
    "space before the object": (file_of(b' {"x": 1}'), "BAD_HEADER", FILE),
    "empty header": (file_of(b""), "BAD_HEADER", FILE),
    "not JSON": (file_of(b"{x}"), "BAD_JSON", FILE),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "BAD_JSON", FILE),
    "nested without end": (file_of(b'{"x":' + b"[" * 200_000), "BAD_JSON", FILE),
    "number without end": (file_of(b'{"x":' + b"9" * 10_000 + b"}"), "BAD_JSON", FILE),
    "NaN in the header": (file_of(b'{"x": NaN}'), "BAD_JSON", FILE),
    "tensor twice": (
        file_of(b'{"x":' + json.dumps(ONE).encode() + b',"x":' + json.dumps(ONE).encode() + b"}", floats(1)),
        "DUPLICATE_KEY",
        f"{FILE}.x",
    ),
    "dtype twice": (
        file_of(b'{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', floats(1)),
        "DUPLICATE_KEY",
        f"{FILE}.dtype",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"n": 1}, "x": ONE}, floats(1)), "BAD_HEADER", FILE),
    "metadata no map": (file_of({"__metadata__": None, "x": ONE}, floats(1)), "BAD_HEADER", FILE),
    "entry no object": (file_of({"x": 1}), "BAD_HEADER", "x"),
    "entry without shape": (file_of({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, floats(1)), "BAD_HEADER", "x"),
    "entry with more": (file_of({"x": ONE | {"note": ""}}, floats(1)), "BAD_HEADER", "x"),
    "integers": (file_of({"x": entry([1], 0, 8, "I64")}, b"\0" * 8), "BAD_DTYPE", "x"),
    "float64": (file_of({"x": entry([1], 0, 8, "F64")}, b"\0" * 8), "BAD_DTYPE", "x"),
    "dtype no string": (file_of({"x": entry([1], 0, 4, ["F32"])}, floats(1)), "BAD_DTYPE", "x"),
    "negative shape": (file_of({"x": entry([-1, -1], 0, 4)}, floats(1)), "BAD_SHAPE", "x"),
    "fractional shape": (file_of({"x": entry([1.0], 0, 4)}, floats(1)), "BAD_SHAPE", "x"),
    "true as a shape": (file_of({"x": entry([True], 0, 4)}, floats(1)), "BAD_SHAPE", "x"),
    "nine dimensions": (file_of({"x": entry([1] * 9, 0, 4)}, floats(1)), "BAD_SHAPE", "x"),
    "shape no list": (file_of({"x": entry("1", 0, 4)}, floats(1)), "BAD_SHAPE", "x"),
    "offsets reversed": (file_of({"x": entry([1], 4, 0)}, floats(1)), "BAD_OFFSETS", "x"),
    "three offsets": (file_of({"x": ONE | {"data_offsets": [0, 2, 4]}}, floats(1)), "BAD_OFFSETS", "x"),
    "negative offset": (file_of({"x": entry([1], -4, 0)}, floats(1)), "BAD_OFFSETS", "x"),
    "no values": (file_of({"x": entry([0, 4], 0, 0)}), "EMPTY_TENSOR", "x"),
    "shape and bytes differ": (file_of({"x": entry([2], 0, 4)}, floats(1)), "SIZE_MISMATCH", "x"),
    "dimensions that overflow": (file_of({"x": entry([1 << 62, 1 << 62], 0, 4)}, floats(1)), "SIZE_MISMATCH", "x"),
    "overlap": (file_of({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, floats(1, 2, 3)), "OVERLAP", "y"),
    "the same bytes twice": (file_of({"x": ONE, "y": ONE}, floats(1)), "OVERLAP", "y"),
    "hole": (file_of({"x": ONE, "y": entry([1], 8, 12)}, floats(1, 2, 3)), "HOLE", "y"),
    "hole at the start": (file_of({"x": entry([1], 4, 8)}, floats(1, 2)), "HOLE", "x"),
    "trailing bytes": (file_of({"x": ONE}, floats(1) + b"\0"), "TRAILING_BYTES", FILE),
    "only trailing bytes": (file_of({}, b"\0"), "TRAILING_BYTES", FILE),
    "cut in the data": (file_of({"x": entry([2], 0, 8)}, floats(1)), "TRUNCATED", "x"),
    "a long name": (file_of({"x" * (MAX_NAME_CHARACTERS + 1): ONE}, floats(1)), "NAME_TOO_LONG", FILE),
    "NaN": (file_of({"x": ONE, "y": entry([1], 4, 8)}, floats(1, float("nan"))), "NON_FINITE", "y"),
    "infinity": (file_of({"x": ONE}, floats(float("-inf"))), "NON_FINITE", "x"),
    "NaN in bfloat16": (file_of({"x": entry([1], 0, 2, "BF16")}, b"\xc0\x7f"), "NON_FINITE", "x"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_reason_and_field(case: str) -> None:
    content, reason, field = MALFORMED[case]
    with pytest.raises(AdapterFormatError) as caught:
        parse_tensors(content)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_more_tensors_than_the_limit_are_refused() -> None:
    header = {str(i): entry([1], 4 * i, 4 * i + 4) for i in range(MAX_TENSORS + 1)}
    with pytest.raises(AdapterFormatError) as caught:
        parse_header(file_of(header, b"\0" * 4 * (MAX_TENSORS + 1)))
    assert caught.value.reason == "TOO_MANY_TENSORS"


def test_a_lone_surrogate_in_a_name_leaves_an_error_that_can_be_encoded() -> None:
    with pytest.raises(AdapterFormatError) as caught:
        parse_tensors(file_of(b'{"\\ud800": 1}'))
    assert caught.value.field is not None
    assert (caught.value.message + caught.value.field).encode()


VALID = safetensors.torch.save({"x": torch.ones(2, 3), "y": torch.zeros(4).half()}, {"k": "v"})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_adapter_errors(content: bytes) -> None:
    try:
        parse_tensors(content)
    except AdapterError:
        return
    safetensors.torch.load(content)  # what we take, the library takes


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_means_what_the_library_reads(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    try:
        tensors = parse_tensors(content[:cut])
    except AdapterError:
        return
    expected = safetensors.torch.load(bytes(content[:cut]))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
