"""A directory gives its named regular files and nothing else: no link, no device, no pickle, no flood."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import (
    CONFIG_FILE,
    MAX_JSON_BYTES,
    MAX_TENSOR_FILE_BYTES,
    PICKLE_FILES,
    TENSOR_FILE,
    FileReader,
    map_file,
    parse_json_object,
    read_file,
    read_json_file,
    read_tensor_file,
    show,
)


def refusal_of_reading(directory: Path, name: str = CONFIG_FILE, max_bytes: int = 100) -> tuple[str, str | None]:
    """Return the error of reading, which is that of mapping too."""
    refusals = set()
    for read in (read_file, map_file):
        with pytest.raises(AdapterFormatError) as caught:
            read(directory, name, max_bytes)
        refusals.add((caught.value.message, caught.value.reason, caught.value.field))
    ((_, reason, field),) = refusals
    return reason, field


@pytest.mark.parametrize("read", [read_file, map_file])
@pytest.mark.parametrize("num_bytes", [0, 1, 100])
def test_a_file_is_read_whole(read: FileReader, num_bytes: int, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"x" * num_bytes)
    assert bytes(read(tmp_path, CONFIG_FILE, 100)) == b"x" * num_bytes


def test_a_mapping_outlives_the_name_and_writes_to_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").write_bytes(b"x" * 100)
    os.link(tmp_path / "link", tmp_path / CONFIG_FILE)
    mapped = map_file(tmp_path, CONFIG_FILE, 100)
    assert isinstance(mapped, mmap.mmap)
    (tmp_path / CONFIG_FILE).unlink()
    mapped[0:1] = b"y"
    assert (mapped[:2], (tmp_path / "link").read_bytes()[:2]) == (b"yx", b"xx")


@pytest.mark.parametrize("read", [read_file, map_file])
def test_a_file_that_shrinks_meanwhile_is_refused(
    read: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"x" * 100)
    fstat = os.fstat

    def shrink_after(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(tmp_path / CONFIG_FILE, 50)
        return status

    monkeypatch.setattr(os, "fstat", shrink_after)
    with pytest.raises(AdapterFormatError) as caught:
        read(tmp_path, CONFIG_FILE, 100)
    assert caught.value.reason == "UNREADABLE_FILE"


def test_a_file_over_the_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"x" * 101)
    assert refusal_of_reading(tmp_path) == ("FILE_TOO_LARGE", CONFIG_FILE)


def test_a_missing_file_and_a_missing_directory_are_refused_by_name(tmp_path: Path) -> None:
    assert refusal_of_reading(tmp_path) == ("MISSING_FILE", CONFIG_FILE)
    assert refusal_of_reading(tmp_path / "nowhere") == ("MISSING_FILE", CONFIG_FILE)
    (tmp_path / "file").touch()
    assert refusal_of_reading(tmp_path / "file") == ("MISSING_FILE", CONFIG_FILE)


def test_a_symbolic_link_is_refused_even_to_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / CONFIG_FILE).symlink_to("other.json")
    assert refusal_of_reading(tmp_path) == ("SYMLINK_REFUSED", CONFIG_FILE)


def test_a_directory_and_a_fifo_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    os.mkfifo(tmp_path / TENSOR_FILE)
    assert refusal_of_reading(tmp_path) == ("NOT_A_REGULAR_FILE", CONFIG_FILE)
    assert refusal_of_reading(tmp_path, TENSOR_FILE) == ("NOT_A_REGULAR_FILE", TENSOR_FILE)


@pytest.mark.parametrize("name", PICKLE_FILES)
def test_a_pickle_instead_of_safetensors_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(AdapterFormatError) as caught:
        read_tensor_file(tmp_path)
    assert (caught.value.reason, caught.value.field) == ("PICKLE_REFUSED", name)


def test_a_pickle_beside_safetensors_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / PICKLE_FILES[0]).write_bytes(b"\x80\x02")
    (tmp_path / TENSOR_FILE).write_bytes(b"content")
    assert read_tensor_file(tmp_path) == b"content"


def test_an_enormous_tensor_file_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    with open(tmp_path / TENSOR_FILE, "wb") as file:
        file.truncate(MAX_TENSOR_FILE_BYTES + 1)  # sparse: it takes no disk
    with pytest.raises(AdapterFormatError) as caught:
        read_tensor_file(tmp_path)
    assert caught.value.reason == "FILE_TOO_LARGE"


def test_an_enormous_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(AdapterFormatError) as caught:
        read_json_file(tmp_path, CONFIG_FILE)
    assert caught.value.reason == "FILE_TOO_LARGE"


@pytest.mark.parametrize(
    ("content", "reason", "field"),
    [
        (b'{"r": 1, "r": 2}', "DUPLICATE_KEY", "adapter_config.r"),
        (b'{"p": {"a": 1, "b": 2, "a": 1}}', "DUPLICATE_KEY", "adapter_config.a"),
        (b"[]", "BAD_JSON", CONFIG_FILE),
        (b"", "BAD_JSON", CONFIG_FILE),
        (b"{} {}", "BAD_JSON", CONFIG_FILE),
        (b'{"r": Infinity}', "BAD_JSON", CONFIG_FILE),
        (b'{"r": NaN}', "BAD_JSON", CONFIG_FILE),
        ('{"r": 1}'.encode("utf-16"), "BAD_JSON", CONFIG_FILE),
        (b"\xef\xbb\xbf{}", "BAD_JSON", CONFIG_FILE),
        (b'{"r":' + b"[" * 100_000, "BAD_JSON", CONFIG_FILE),
    ],
)
def test_json_that_is_ambiguous_or_broken_is_refused(content: bytes, reason: str, field: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        parse_json_object(content, CONFIG_FILE)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_json_objects_are_parsed() -> None:
    assert parse_json_object(b'{"r": 1, "p": {"a": [1.5, null]}}', CONFIG_FILE) == {"r": 1, "p": {"a": [1.5, None]}}


def test_a_value_is_shown_short_however_long_or_deep_it_is() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(show("x" * 10_000)) < 200
    assert show(nested) == "something too deeply nested to show"
