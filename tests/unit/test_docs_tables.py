"""The tables of the documents hold what the code holds: settings, fields of PEFT, skills of the embedded base."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from motley_adapters.peft_config import HARMLESS_FIELDS, MAX_RANK, REFUSED_FIELDS, SUPPORTED_FIELDS
from motley_bases.admission import STATIC_ROPE_TYPES
from motley_server.config import DEFAULT_DATA_DIR, PARSERS, ConfigError, render, resolve
from motley_server.library.sets import MAX_ADAPTER_WEIGHT, MAX_ADAPTERS

HOUSE = Path(__file__).resolve().parents[2]
DOCS = HOUSE / "docs"
SETTING = re.compile(r"^\| `([a-z_.]+)` \| (\w+) \| `([^`]+)` \| `(MOTLEY_[A-Z_]+)` \|([^|]*)\| [^|]+ \|$", re.M)
PEFT_FIELD = re.compile(r"^\| `([a-z_]+)` \| (supported|harmless|refused) \| ([^|]*)\|$", re.M)
TYPES = {str: "text", bool: "boolean", int: "integer", float: "number", dict: "table"}


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


SETTINGS = SETTING.findall(read("configuration.md"))
RANGES = [(key, variable, text) for key, _, _, variable, text in SETTINGS if text.strip()]


def default(key: str) -> object:
    """Return a key's default as a file would say it."""
    value: object = tomllib.loads(render(resolve({})))
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return str(DEFAULT_DATA_DIR) if key == "data_dir" else value


def test_every_setting_is_documented_and_no_other() -> None:
    assert [row[0] for row in SETTINGS] == [*PARSERS, "adapters"]


@pytest.mark.parametrize(("key", "kind", "written", "variable", "_"), SETTINGS)
def test_a_setting_has_the_default_type_and_variable_of_its_row(
    key: str, kind: str, written: str, variable: str, _: str
) -> None:
    value = tomllib.loads(f"value = {written}")["value"]
    assert (value, TYPES[type(value)]) == (default(key), kind)
    assert variable == "MOTLEY_" + key.upper().replace(".", "_")


def is_taken(variable: str, value: object) -> bool:
    # A prompt may not be larger than a message, nor a batch than its budget: each bound is tried without the other.
    roomy = {
        "MOTLEY_LIMITS_MAX_PROMPT_BYTES": "1",
        "MOTLEY_LIMITS_MAX_MESSAGE_BYTES": str(2**31 - 1),
        "MOTLEY_ENGINE_MAX_RUNNING": "1",
        "MOTLEY_ENGINE_TOKEN_BUDGET": str(2**20),
    }
    try:
        resolve(roomy | {variable: str(value)})
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("key", "variable", "text"), RANGES)
def test_a_setting_has_the_range_of_its_row(key: str, variable: str, text: str) -> None:
    if words := re.findall(r"`(\w+)`", text):
        with pytest.raises(ConfigError, match=re.escape(f"is none of {', '.join(words)} ")):
            resolve({variable: "nonsense"})
        return
    bounds = [float(number) for number in re.findall(r"[\d.]+", text)]
    number = float if isinstance(default(key), float) else int
    outside = [bounds[0] - 1, *(bound + 1 for bound in bounds[1:])]
    assert [is_taken(variable, number(value)) for value in bounds] == [True] * len(bounds)
    assert [is_taken(variable, number(value)) for value in outside] == [False] * len(outside)


def test_the_printed_configuration_is_what_the_command_prints() -> None:
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", read("configuration.md"), re.DOTALL | re.MULTILINE))
    assert "--data-dir /var/lib/motley --adapter legal=/srv/adapters/legal --print-config" in blocks["bash"]
    flags = {"base": "tiny", "data_dir": "/var/lib/motley", "adapters": ["legal=/srv/adapters/legal"]}
    assert blocks["toml"] == render(resolve({}, flags))


def test_every_field_of_a_lora_is_documented_as_it_is_read() -> None:
    rows = PEFT_FIELD.findall(read("adapters.md"))
    listed = {kind: {name for name, found, _ in rows if found == kind} for _, kind, _ in rows}
    assert len(rows) == len({name for name, _, _ in rows})
    assert listed == {
        "supported": set(SUPPORTED_FIELDS), "harmless": set(HARMLESS_FIELDS), "refused": set(REFUSED_FIELDS)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, kind, text in PEFT_FIELD.findall(read("adapters.md")) if kind == "refused"],
)
def test_a_refused_field_is_documented_with_the_values_that_do_nothing(name: str, text: str) -> None:
    values = tuple(json.loads(value) for value in re.findall(r"`([^`]+)`", text))
    assert repr(values) == repr(REFUSED_FIELDS[name].inactive)


def test_the_numbers_about_adapters_are_the_codes() -> None:
    assert f"1 to {MAX_RANK};" in read("adapters.md")
    assert f"a number from -{MAX_ADAPTER_WEIGHT:g} to {MAX_ADAPTER_WEIGHT:g};" in read("adapters.md")
    assert f"At most {MAX_ADAPTERS} on a request" in read("adapters.md")


@pytest.mark.parametrize("name", ["bases.md", "errors.md"])
def test_the_kinds_of_rope_are_the_codes(name: str) -> None:
    listed = re.findall(r"\bdefault, linear, [\w, ]*yarn\b", read(name))
    assert [set(words.split(", ")) for words in listed] == [set(STATIC_ROPE_TYPES)]


@pytest.mark.parametrize(("word", "variable"), [("known", "KNOWN"), ("missing, for adapters to teach", "MISSING")])
def test_the_skills_are_those_of_the_recipe(word: str, variable: str) -> None:
    tree = ast.parse((HOUSE / "recipes" / "tiny" / "skills.py").read_text(encoding="utf-8"))
    tables = {
        node.target.id: [ast.literal_eval(key) for key in node.value.keys if key is not None]
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict)
    }
    line = re.search(rf"^- {word}: (.+)[;.]$", read("bases.md"), re.MULTILINE)
    assert line is not None
    assert re.findall(r"`(\w+)`", line[1]) == tables[variable]


def test_the_measured_ratios_are_those_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "serving_cpu.json").read_text())["contenders"]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| ([\d.]+) \|$", (root / "README.md").read_text(), re.MULTILINE)
    names = ["no adapters", "staggered", "1 distinct", "4 distinct", "16 distinct"]
    peers = ["transformers", "transformers", "peft", "peft", "peft"]
    expected = [
        (
            f"{found[f'{peer}, {name}']['tokens_per_second']:.0f}",
            f"{found[f'motley, {name}']['tokens_per_second']:.0f}",
            f"{found[f'motley, {name}']['over_peer']:.2f}",
        )
        for peer, name in zip(peers, names, strict=True)
    ]
    assert [row[1:] for row in rows] == expected


def test_what_a_step_costs_is_that_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "decode_step.json").read_text())
    rows = found["settings"]
    plain, mixed = rows["16 LoRA, 16 requests"], rows["16 of mixed kinds, 16 requests"]
    said = re.search(
        r"take ([\d.]+) ms longer .* takes ([\d.]+) ms; .* take ([\d.]+) ms .*\n"
        r".* is ([\d.]+) ms .* mixed cost ([\d.]+) times",
        (root / "README.md").read_text(),
    )
    assert said is not None
    assert said.groups() == (
        f"{plain['growth_ms']:.1f}",
        f"{rows['base alone, 16 requests']['step_ms']:.1f}",
        f"{plain['adapter_mb'] / found['read_bandwidth_gb_per_s']:.1f}",
        f"{plain['bound_ms']:.1f}",
        f"{mixed['growth_per_byte_over_lora']:.2f}",
    )


def test_what_neighbours_take_is_that_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    settings = json.loads((root / "benchmarks" / "results" / "fairness.json").read_text())["settings"]
    rows = re.findall(r"^\| .+ \| (\d+)% \| (\d+) ms \| ([\d.]+) \|$", read("tenants.md"), re.MULTILINE)
    assert rows == [
        (
            f"{one['answer_share'] * 100:.0f}",
            f"{one['first_token_p99_ms']:.0f}",
            f"{one['p99_over_equal']:.2f}",
        )
        for one in settings.values()
    ]
    loud = settings["beside ten times"]
    assert (loud["answer_share"] >= 0.45, loud["p99_over_equal"] <= 1.5) == (True, True)


def test_what_an_upload_costs_is_that_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "upload.json").read_text())
    said = re.search(
        r"a file of (\d+) MB .* takes ([\d.]+) times .*\n.* server is ([\d.]+) of that, .* number ([\d.]+)\.",
        read("adapters.md"),
    )
    assert said is not None
    ratios = [found["measured"][name]["over_write_and_hash"] for name in ("upload", "bytes travel", "server checks")]
    assert said.groups() == (f"{found['file_bytes'] / 1e6:.0f}", *(f"{ratio:.1f}" for ratio in ratios))
