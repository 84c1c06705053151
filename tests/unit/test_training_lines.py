"""The check of a dataset's lines: what is taken, and what is refused by the number of its line."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.errors import InvalidArgumentError
from motley_server.registry.dataset_records import DatasetFormat
from motley_server.training.lines import MAX_LINE_BYTES, Lines, check_lines

COMPLETION = '{"prompt": "2 + 2 = ", "completion": "4"}'
TEXT = '{"text": "once upon a time"}'
CHAT = '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}]}'


def check(folder: Path, data: bytes | str) -> Lines:
    path = folder / "data.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return check_lines(path)


def refused(folder: Path, data: bytes | str) -> tuple[str, str | None]:
    with pytest.raises(InvalidArgumentError) as caught:
        check(folder, data)
    assert len(caught.value.message) < 400
    return caught.value.reason, caught.value.field


def turns(*pairs: tuple[object, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


@pytest.mark.parametrize(
    ("line", "format"),
    [(COMPLETION, DatasetFormat.COMPLETION), (CHAT, DatasetFormat.CHAT), (TEXT, DatasetFormat.TEXT)],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_each_shape_is_told_with_either_end_and_with_none_at_the_last(
    tmp_path: Path, line: str, format: DatasetFormat, end: str, is_closed: bool
) -> None:
    data = end.join([line] * 3) + end * is_closed
    assert check(tmp_path, data) == Lines(format, 3)


def test_what_may_be_empty_or_odd_is_taken(tmp_path: Path) -> None:
    odd = json.dumps({"prompt": "", "completion": "\u2028\x85\r\n\t\U0001f642 \\"}, ensure_ascii=False)
    assert check(tmp_path, f"{odd}\n\t{odd} \n").num_samples == 2
    several = turns(("system", ""), ("user", "a"), ("assistant", "b"), ("user", ""), ("assistant", "c"))
    assert check(tmp_path, f"{several}\n{CHAT}").format is DatasetFormat.CHAT


def test_a_line_of_just_the_bound_is_taken_and_one_of_a_byte_more_is_not(tmp_path: Path) -> None:
    room = MAX_LINE_BYTES - len('{"text": ""}')
    longest = f'{{"text": "{"x" * room}"}}'
    assert check(tmp_path, f"{TEXT}\r\n{longest}\r\n") == Lines(DatasetFormat.TEXT, 2)
    for end in ("", "\n", "\r\n"):
        assert refused(tmp_path, f"{TEXT}\n{longest} {end}") == ("LINE_TOO_LONG", "line 2")


BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "blank": ("", "LINE_NOT_JSON"),
    "spaces": (" \t", "LINE_NOT_JSON"),
    "words": ("hello there", "LINE_NOT_JSON"),
    "cut off": (TEXT[:-1], "LINE_NOT_JSON"),
    "two on a line": (TEXT + TEXT, "LINE_NOT_JSON"),
    "single quotes": ("{'text': 'a'}", "LINE_NOT_JSON"),
    "a trailing comma": ('{"text": "a",}', "LINE_NOT_JSON"),
    "a control character": ('{"text": "a\x01"}', "LINE_NOT_JSON"),
    "a byte order mark": ("\ufeff" + TEXT, "LINE_NOT_JSON"),
    "NaN": ('{"text": NaN}', "LINE_NOT_JSON"),
    "infinity": ('{"text": -Infinity}', "LINE_NOT_JSON"),
    "a number of too many digits": (f'{{"text": {"9" * 5000}}}', "LINE_NOT_JSON"),
    "too deep": (f'{{"text": {"[" * 100_000}', "LINE_NOT_JSON"),
    "a key twice": ('{"text": "a", "text": "b"}', "LINE_NOT_JSON"),
    "a key twice within": ('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "LINE_NOT_JSON"),
    "Latin-1": (b'{"text": "caf\xe9"}', "LINE_NOT_UTF8"),
    "an overlong encoding": (b'{"text": "\xc0\x80"}', "LINE_NOT_UTF8"),
    "half of a pair": ('{"text": "a\\ud83d"}', "LINE_NOT_UTF8"),
    "half of a pair in a turn": (turns(("assistant", "\udc00")), "LINE_NOT_UTF8"),
    "a list": ('["text"]', "UNKNOWN_SAMPLE_SHAPE"),
    "a text": ('"text"', "UNKNOWN_SAMPLE_SHAPE"),
    "null": ("null", "UNKNOWN_SAMPLE_SHAPE"),
    "an empty object": ("{}", "UNKNOWN_SAMPLE_SHAPE"),
    "a prompt alone": ('{"prompt": "a"}', "UNKNOWN_SAMPLE_SHAPE"),
    "one key more": ('{"text": "a", "id": 1}', "UNKNOWN_SAMPLE_SHAPE"),
    "two shapes": ('{"prompt": "a", "completion": "b", "text": "c"}', "UNKNOWN_SAMPLE_SHAPE"),
    "other words": ('{"instruction": "a", "output": "b"}', "UNKNOWN_SAMPLE_SHAPE"),
    "keys that are no text": ('{"\\ud800": 1}', "UNKNOWN_SAMPLE_SHAPE"),
    "a long key": (json.dumps({"k" * 100_000: 1}), "UNKNOWN_SAMPLE_SHAPE"),
    "a turn with a name": ('{"messages": [{"role": "user", "content": "", "name": ""}]}', "UNKNOWN_SAMPLE_SHAPE"),
    "a turn without a role": ('{"messages": [{"content": "a"}]}', "UNKNOWN_SAMPLE_SHAPE"),
    "a number as text": ('{"text": 3}', "WRONG_SAMPLE_TYPE"),
    "a number as prompt": ('{"prompt": 1e999, "completion": "a"}', "WRONG_SAMPLE_TYPE"),
    "no completion": ('{"prompt": "a", "completion": null}', "WRONG_SAMPLE_TYPE"),
    "messages as a text": ('{"messages": "hello"}', "WRONG_SAMPLE_TYPE"),
    "a turn as a text": ('{"messages": ["hello"]}', "WRONG_SAMPLE_TYPE"),
    "a role of true": (turns((True, "a")), "WRONG_SAMPLE_TYPE"),
    "content in parts": (turns(("assistant", [{"type": "text"}])), "WRONG_SAMPLE_TYPE"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', "EMPTY_SAMPLE"),
    "an empty text": ('{"text": ""}', "EMPTY_SAMPLE"),
    "no turns": ('{"messages": []}', "EMPTY_SAMPLE"),
    "nobody answers": (turns(("user", "a"), ("system", "b")), "EMPTY_SAMPLE"),
    "an empty answer": (turns(("user", "a"), ("assistant", "")), "EMPTY_SAMPLE"),
    "an empty answer among others": (turns(("assistant", ""), ("assistant", "b")), "EMPTY_SAMPLE"),
    "an empty role": (turns(("", "a"), ("assistant", "b")), "EMPTY_SAMPLE"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("number", [1, 17])
def test_a_bad_line_is_refused_by_its_number_wherever_it_stands(tmp_path: Path, name: str, number: int) -> None:
    line, reason = BAD_LINES[name]
    data = line.encode(errors="surrogatepass") if isinstance(line, str) else line
    good = (CHAT if b"messages" in data else COMPLETION if b"prompt" in data else TEXT).encode() + b"\n"
    assert refused(tmp_path, good * (number - 1) + data + b"\n" + good * 3) == (reason, f"line {number}")


def test_lines_of_several_shapes_are_refused_at_the_first_of_another(tmp_path: Path) -> None:
    assert refused(tmp_path, f"{TEXT}\n{TEXT}\n{COMPLETION}\n") == ("MIXED_SAMPLE_SHAPES", "line 3")


def test_no_line_and_one_line_are_too_few(tmp_path: Path) -> None:
    assert refused(tmp_path, "") == ("EMPTY_DATASET", "line 1")
    assert refused(tmp_path, TEXT) == ("TOO_FEW_SAMPLES", "line 1")
    assert refused(tmp_path, "\n") == ("LINE_NOT_JSON", "line 1")


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(max_size=60), place=st.integers(0, 2))
def test_junk_is_refused_or_is_what_python_reads_there(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, place: int
) -> None:
    lines = [TEXT.encode()] * 3
    lines.insert(place, junk)
    data = b"\n".join(lines)
    folder = tmp_path_factory.getbasetemp()
    try:
        found = check(folder, data)
    except InvalidArgumentError:
        return
    read = [json.loads(line) for line in data.split(b"\n") if line]
    assert found == Lines(DatasetFormat.TEXT, len(read))
    assert all(list(sample) == ["text"] and sample["text"] for sample in read)


def test_one_line_at_a_time_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"text": "{"x" * 4000}"}}\n' for _ in range(2000))
    tracemalloc.start()
    try:
        assert check_lines(path).num_samples == 2000
        assert tracemalloc.get_traced_memory()[1] < 1 << 19  # of 8 MB
    finally:
        tracemalloc.stop()


def test_a_line_of_very_many_keys_takes_no_longer_than_its_length(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{number}": 0' for number in range(50_000))
    began = time.process_time()
    assert refused(tmp_path, f'{TEXT}\n{{{keys}, "k49999": 1}}\n') == ("LINE_NOT_JSON", "line 2")
    assert refused(tmp_path, f"{TEXT}\n{{{keys}}}\n") == ("UNKNOWN_SAMPLE_SHAPE", "line 2")
    assert time.process_time() - began < 2  # of hundredths; one look at all the others for each takes half a minute
