"""Adapter directories of every kind, damaged at random: bytes, safetensors headers and JSON, as an attacker would.

A directory is its files by name. Where a header or a JSON file is damaged, it is damaged as a tree and written down
again, so that most cases get past the parser and into the checks behind it.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from adapter_files import PREFIX, tiny_spec, write
from hypothesis import strategies as st
from kind_adapters import make_goat, make_loram, make_s2ft
from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import CONFIG_FILE, MANIFEST_FILE, RESIDUAL_FILE, TENSOR_FILE
from motley_adapters.kinds.goat import GoatGeometry
from motley_adapters.outline import outline_of
from motley_adapters.reader import Inspection, inspect_adapter, read_adapter
from motley_adapters.spec import Adapter
from motley_bases.spec import BaseSpec

BASE = tiny_spec()
KINDS = ("lora", "loram", "s2ft", "goat")
FILES = (CONFIG_FILE, MANIFEST_FILE, TENSOR_FILE, RESIDUAL_FILE)

Files = Mapping[str, bytes]
Damage = Callable[[st.DataObject, bytes], bytes]


class Spelled(str):
    """Text that stands in JSON as it is, such as a number that no object would be written as."""


class Fields(list[list[Any]]):
    """An object of JSON as [key, value] in order, so that it can give a key twice."""


@cache
def sound_files(kind: str) -> Files:
    """Return the files of a sound adapter of a kind."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / kind
        if kind == "lora":
            write(directory)
            manifest = {"schema_version": 1, "kind": "lora", "trained_on": BASE.fingerprint, "provenance": {"by": "us"}}
            (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
        elif kind == "loram":
            make_loram(directory, BASE, seed=1, rank=2)
        elif kind == "s2ft":
            make_s2ft(directory, BASE, seed=1, sides={"q_proj": "input", "up_proj": "output"}, num_channels=2)
        else:
            generator = torch.Generator().manual_seed(1)
            sides = {f"{path}.weight": (outputs, inputs) for path, (inputs, outputs) in BASE.linears.items()}
            geometry = GoatGeometry(experts=2, top_k=1, rank=2, rho=10.0, segments="head")
            make_goat(
                directory, lambda name: torch.randn(sides[name], generator=generator), BASE, seed=1, geometry=geometry
            )
        if kind in ("s2ft", "goat"):  # undeclared, so that other content is another adapter, and not always an error
            fields = json.loads((directory / MANIFEST_FILE).read_text())
            (directory / MANIFEST_FILE).write_text(json.dumps(fields | {"digest": None}))
        return {file.name: file.read_bytes() for file in directory.iterdir()}


_PATHS = sorted({*BASE.linears, BASE.embedding_path, *BASE.other_modules, "q_proj", "up_proj"})
_WORDS = (
    "all-linear LORA lora loram s2ft goat undeclared input output F32 F16 BF16 I32 I64 BOOL none gaussian dtype shape "
    "data_offsets __metadata__ r lora_alpha rank_pattern alpha_pattern target_modules layers_pattern exclude_modules "
    "layers_to_transform use_dora modules_to_save bias kind digest serves_on experts top_k scales residual eta modules"
).split()
_ODD_TEXTS = ["", "\0", "\x1b[2J\r\n", "\ud800", "\udfff\ud800", "‮", "é" * 600, "a" * 5000, "../../etc/passwd", "/"]
_PATTERNS = [
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "*",
        "\\",
        ".*",
        "^",
        "$",
        "(?i)q",
        "(?P<idx>a)",
        "(?P=idx)",
        "(?R)",
        "\\p{L}",
        "\\N{DASH}",
    ),
    *("(a+)+$", "a{0,99999}{0,99999}", "(" * 700 + ")" * 700, "[[a]--b]", "(?:a){e<=1}", "\\1", "(?<=a*)b", "|", "x|y"),
    *(rf".*\.({word})" for word in ("q_proj|up_proj", "[a-z]_proj", "\\w+")),
]
_TEXTS = st.sampled_from([*_PATHS, *_WORDS, *_ODD_TEXTS, *_PATTERNS, BASE.fingerprint, f"{PREFIX}lm_head.weight"])
_NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 4, 8, 2**16, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e30, 1e308]
)
_SPELLED = st.sampled_from(
    [
        *(
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "1E-999",
            "9" * 4000,
            "9" * 5000,
            "-0",
            "01",
            "+1",
            "1.",
            "0x10",
        ),
        *("[" * 300 + "]" * 300, "[" * 980 + "]" * 980, "[" * 100_000, '{"a":' * 60 + "1" + "}" * 60),
        *('"\\ud800"', '"\ud800"', '"\\u0000"', '"\n"', '"\\x"', "'a'", "", "tru", "/**/1", "1,2", "}", "\0"),
    ]
).map(Spelled)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_VALUES = st.one_of(
    _LEAVES,
    _SPELLED,
    st.lists(_LEAVES, max_size=3),
    st.lists(st.tuples(_TEXTS, _LEAVES).map(list), max_size=2).map(Fields),
)
_LENGTHS = st.sampled_from([0, 1, 2, 7, 8, 2**10, 4 << 20, (4 << 20) + 1, 2**31, 2**32, 2**63, 2**64 - 1])
_WORST_VALUES = st.sampled_from(
    [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\xff" * 4, b"\x01\x00\x00\x00", b"\x00" * 4]
)


def damage_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Change bytes without regard to what they mean."""
    changed = bytearray(content)
    at, until = sorted(data.draw(st.tuples(*[st.integers(0, len(changed))] * 2)))
    match data.draw(st.integers(0, 5)):
        case 0:
            changed[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        case 1:
            del changed[at:]
        case 2:
            del changed[at : min(until, at + 16)]
        case 3:
            changed[at:at] = changed[at:until] or b"\0"
        case 4:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        case _:
            changed[:] = data.draw(st.binary(max_size=64))
    return bytes(changed)


def damage_json(data: st.DataObject, content: bytes) -> bytes:
    """Change a JSON file as a tree."""
    try:
        tree = json.loads(content, object_pairs_hook=lambda pairs: Fields([key, value] for key, value in pairs))
    except (ValueError, RecursionError):
        return damage_bytes(data, content)
    if b"[" * 99 in content:  # damaged before, into what is deeper than this can walk
        return damage_bytes(data, content)
    root = [tree]
    for _ in range(data.draw(st.integers(1, 2))):
        _damage_tree(data, root)
    return _spell(root[0]).encode("utf-8", "surrogatepass")


def damage_tensor_file(data: st.DataObject, content: bytes) -> bytes:
    """Change a safetensors file: its header as a tree, the length of that, or the values."""
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else len(content)
    header, values = content[8 : 8 + length], bytearray(content[8 + length :])
    match data.draw(st.integers(0, 9)):
        case 0:
            return struct.pack("<Q", data.draw(_LENGTHS)) + content[8:]
        case 1 | 2 if values:
            at = data.draw(st.integers(0, len(values) // 4)) * 4
            values[at : at + 4] = data.draw(_WORST_VALUES)
        case 3:
            values += data.draw(st.binary(min_size=1, max_size=8))
        case 4:
            header += b" " * data.draw(st.integers(1, 9))  # unaligned, and sound
        case _:
            header = damage_json(data, header)
    return struct.pack("<Q", len(header)) + header + bytes(values)


def damaged_files(data: st.DataObject) -> Files:
    """Draw a directory of some kind that was sound until one to three things were changed."""
    files = dict(sound_files(data.draw(st.sampled_from(KINDS))))
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        name = data.draw(st.sampled_from(sorted(files)))
        match data.draw(st.integers(0, 11)):
            case 0:
                other = sound_files(data.draw(st.sampled_from(KINDS)))
                files |= {name: other[name] for name in other.keys() & {data.draw(st.sampled_from(FILES))}}
            case 1 if len(files) > 1:
                del files[name]
            case 2:
                files[name] = damage_bytes(data, files[name])
            case _:
                damage: Damage = damage_tensor_file if name.endswith(".safetensors") else damage_json
                files[name] = damage(data, files[name])
    return files


def outcome(files: Files, directory: Path, base: BaseSpec = BASE) -> str:
    """Pass a directory through both doors, and return the digest or the reason that both give.

    Raises: AssertionError if they differ, or if an error says less than an error must; whatever else a door raises.
    """
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    inspected = _said(lambda: _facts(inspect_adapter(directory, base)))
    assert inspected == _said(lambda: _facts(read_adapter(directory, base)))
    return inspected[0]


def _facts(found: Inspection | Adapter) -> tuple[str, object]:
    outline = found.outline if isinstance(found, Inspection) else outline_of(found.parts)
    return found.spec.digest, (found.spec, outline)


def _said(door: Callable[[], tuple[str, object]]) -> tuple[str, object]:
    """Return what a door gives, or the reason of an error that it raises; that must have texts that can be sent."""
    try:
        return door()
    except (AdapterFormatError, AdapterMismatchError) as error:
        refusal = error
    assert re.fullmatch(r"[A-Z][A-Z0-9_]*", refusal.reason)
    assert f"{refusal.message}{refusal.field}".encode()
    return refusal.reason, (type(refusal), refusal.field, refusal.message)


_EXACT = 2**53  # beyond it a float has no halves, and far beyond it there is no float


def _damage_tree(data: st.DataObject, root: list[Any]) -> None:
    """Change one place of a tree; the places are the items of its lists and objects."""
    container, at = data.draw(st.sampled_from(_places(root)))
    is_fields = isinstance(container, Fields)
    match data.draw(st.integers(0, 9)):
        case 0 if container is not root:
            del container[at]
        case 1 if container is not root:
            container.append(list(container[at]) if is_fields else container[at])
        case 2 if is_fields:
            container[at][0] = data.draw(_TEXTS)
        case 3 if is_fields:
            container.append([data.draw(_TEXTS), data.draw(_VALUES)])
        case 4 if container is not root:
            other = data.draw(st.integers(0, len(container) - 1))
            container[at], container[other] = container[other], container[at]
        case 5 if type(_value(container, at)) in (int, float):
            number, step = _value(container, at), data.draw(st.sampled_from([-4, -1, 1, 2, 4, 0.5]))
            _put(container, at, number + (step if abs(number) < _EXACT else int(step)))
        case 6 | 7 if type(_value(container, at)) in (int, float):
            _put(container, at, data.draw(_NUMBERS))
        case _:
            _put(container, at, data.draw(_VALUES))


def _places(container: list[Any]) -> list[tuple[list[Any], int]]:
    places = []
    for at in range(len(container)):
        places.append((container, at))
        value = _value(container, at)
        if isinstance(value, list):
            places += _places(value)
    return places


def _value(container: list[Any], at: int) -> Any:
    return container[at][1] if isinstance(container, Fields) else container[at]


def _put(container: list[Any], at: int, value: Any) -> None:
    if isinstance(container, Fields):
        container[at][1] = value
    else:
        container[at] = value


def _spell(value: Any) -> str:
    if isinstance(value, Spelled):
        return str(value)
    if isinstance(value, Fields):
        return f"{{{','.join(f'{json.dumps(str(key))}:{_spell(item)}' for key, item in value)}}}"
    if isinstance(value, list):
        return f"[{','.join(_spell(item) for item in value)}]"
    return json.dumps(value)
