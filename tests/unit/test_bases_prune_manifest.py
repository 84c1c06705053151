"""The manifest of a pruned base: written, read again, bound to its weights, and refused by the field that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from architectures import build_checkpoint
from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.prune_manifest import (
    LayerKeep,
    PruneManifest,
    check_original,
    read_prune_manifest,
    write_prune_manifest,
)
from pruned_bases import make_manifest

ORIGINAL = f"sha256:{'a' * 64}"
OTHER = f"sha256:{'b' * 64}"
KEEPS = (None, LayerKeep((0, 3, 5), (1,)), LayerKeep((1,), (0, 2)), None)
MANIFEST = make_manifest(
    ORIGINAL,
    KEEPS,
    12_345,
    ratio=Fraction(3, 16),
    steps=2,
    multiple=64,
    rule="loram",
    criterion="param_first",
    selection="global_normalised",
    protected=(1, 1),
    calibration_sha256=OTHER,
    calibration_tokens=640,
    calibration_window=64,
    seed=7,
    recovery=OTHER,
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert write_prune_manifest(tmp_path, MANIFEST) == MANIFEST
    assert read_prune_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["prune_manifest.json"]


def test_beside_weights_it_takes_their_fingerprint(tmp_path: Path) -> None:
    checkpoint = build_checkpoint("llama", tmp_path)
    written = write_prune_manifest(checkpoint, replace(MANIFEST, pruned_fingerprint=OTHER))
    assert written == read_prune_manifest(checkpoint)
    assert written.pruned_fingerprint == fingerprint(checkpoint)


def test_two_manifests_have_one_digest_only_if_they_say_the_same(tmp_path: Path) -> None:
    write_prune_manifest(tmp_path, MANIFEST)
    assert read_prune_manifest(tmp_path).digest == MANIFEST.digest
    changes: list[dict[str, Any]] = [
        {"seed": 8}, {"ratio": Fraction(1, 4)}, {"steps": 1}, {"multiple": 1}, {"calibration_window": 32}, {"rule": "x"}
    ]  # fmt: skip
    assert len({MANIFEST.digest, *(replace(MANIFEST, **change).digest for change in changes)}) == 1 + len(changes)


def test_a_ratio_is_kept_exactly_and_readably(tmp_path: Path) -> None:
    write_prune_manifest(tmp_path, replace(MANIFEST, ratio=Fraction("0.65")))
    assert json.loads((tmp_path / "prune_manifest.json").read_text())["ratio"] == "13/20"
    assert read_prune_manifest(tmp_path).ratio == Fraction(13, 20)


def test_a_manifest_of_the_first_schema_is_refused_as_such_with_what_to_do(tmp_path: Path) -> None:
    write_prune_manifest(tmp_path, MANIFEST)
    path = tmp_path / "prune_manifest.json"
    added = ("ratio", "steps", "multiple", "rule", "calibration_window")
    stored = {name: value for name, value in json.loads(path.read_text()).items() if name not in added}
    path.write_text(json.dumps(stored | {"schema_version": 1}))
    with pytest.raises(UnreadableBaseError, match="prune the original again") as caught:
        read_prune_manifest(tmp_path)
    assert (caught.value.reason, caught.value.field) == ("PRUNE_MANIFEST", "prune_manifest.schema_version")


def test_a_manifest_is_used_with_its_own_original_alone() -> None:
    check_original(MANIFEST, ORIGINAL)
    with pytest.raises(UnreadableBaseError) as caught:
        check_original(MANIFEST, OTHER)
    assert (caught.value.reason, caught.value.field) == ("OTHER_ORIGINAL", "prune_manifest.original_fingerprint")
    assert ORIGINAL in caught.value.message
    assert OTHER in caught.value.message


def layer(ffn_channels: object = (0,), kv_heads: object = (0,)) -> dict[str, object]:
    return {"layers": [None, {"ffn_channels": ffn_channels, "kv_heads": kv_heads}, None, None]}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "of a later schema": ({"schema_version": 3}, "schema_version"),
    "of a schema that is true": ({"schema_version": True}, "schema_version"),
    "an original that is no digest": ({"original_fingerprint": "llama"}, "original_fingerprint"),
    "no list of layers": ({"layers": {}}, "layers"),
    "no layers": ({"layers": []}, "layers"),
    "a layer that is a word": ({"layers": ["whole"]}, "layers[0]"),
    "a layer without heads": ({"layers": [{"ffn_channels": [0]}]}, "layers[0]"),
    "a layer with more": ({"layers": [{"ffn_channels": [0], "kv_heads": [0], "heads": [0]}]}, "layers[0]"),
    "a layer without a channel left": (layer([]), "layers[1].ffn_channels"),
    "a layer without a head left": (layer([0], []), "layers[1].kv_heads"),
    "channels that fall": (layer([3, 2]), "layers[1].ffn_channels"),
    "a channel twice": (layer([3, 3]), "layers[1].ffn_channels"),
    "a channel below 0": (layer([-1]), "layers[1].ffn_channels"),
    "a channel beyond int32": (layer([2**31]), "layers[1].ffn_channels"),
    "a head that is no number": (layer([0], ["0"]), "layers[1].kv_heads"),
    "a head that is true": (layer([0], [True]), "layers[1].kv_heads"),
    "heads that are no list": (layer([0], 1), "layers[1].kv_heads"),
    "a criterion with blanks": ({"criterion": "the best"}, "criterion"),
    "a rule that is a number": ({"rule": 1}, "rule"),
    "a rule of two words": ({"rule": "llm pruner"}, "rule"),
    "an aggregation that is none": ({"aggregation": None}, "aggregation"),
    "a selection that is empty": ({"selection": ""}, "selection"),
    "one protected end": ({"protected": [1]}, "protected"),
    "an end below 0": ({"protected": [-1, 0]}, "protected"),
    "a protected layer that is pruned": ({"protected": [2, 1]}, "layers[1]"),
    "a protected layer at the end": ({"protected": [1, 2]}, "layers[2]"),
    "a text without tokens": ({"calibration_tokens": 0}, "calibration_tokens"),
    "tokens without a text": ({"calibration_sha256": None}, "calibration_tokens"),
    "tokens that are a fraction": ({"calibration_tokens": 640.0}, "calibration_tokens"),
    "a seed below 0": ({"seed": -1}, "seed"),
    "no parameters": ({"num_parameters": 0}, "num_parameters"),
    "a recovery that is no digest": ({"recovery": "alpaca"}, "recovery"),
    "weights that are no digest": ({"pruned_fingerprint": 5}, "pruned_fingerprint"),
    "a ratio that is a float": ({"ratio": 0.25}, "ratio"),
    "a ratio as decimals": ({"ratio": "0.25"}, "ratio"),
    "a ratio not in lowest terms": ({"ratio": "2/8"}, "ratio"),
    "a ratio over nothing": ({"ratio": "1/0"}, "ratio"),
    "a ratio of more than all": ({"ratio": "5/4"}, "ratio"),
    "a ratio without end": ({"ratio": f"1/{'3' * 30}"}, "ratio"),
    "no steps": ({"steps": 0}, "steps"),
    "steps that are true": ({"steps": True}, "steps"),
    "a multiple of nothing": ({"multiple": 0}, "multiple"),
    "a window below 0": ({"calibration_window": -64}, "calibration_window"),
    "no window": ({"calibration_window": 0}, "calibration_window"),
    "windows that do not make the tokens": ({"calibration_window": 63}, "calibration_window"),
    "a window without a text": ({"calibration_sha256": None, "calibration_tokens": 0}, "calibration_window"),
    "a field too many": ({"share": 0.25}, "share"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_refused_by_its_field(case: str, tmp_path: Path) -> None:
    changes, field = FAULTS[case]
    write_prune_manifest(tmp_path, MANIFEST)
    path = tmp_path / "prune_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert refusal(tmp_path) == ("PRUNE_MANIFEST", f"prune_manifest.{field}")


@pytest.mark.parametrize("field", list(PruneManifest.__dataclass_fields__))
def test_every_field_must_be_there(field: str, tmp_path: Path) -> None:
    write_prune_manifest(tmp_path, MANIFEST)
    path = tmp_path / "prune_manifest.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != field}))
    assert refusal(tmp_path) == ("PRUNE_MANIFEST", f"prune_manifest.{field}")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_what_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prune_manifest.json").write_text(text)
    assert refusal(tmp_path) == ("PRUNE_MANIFEST", "prune_manifest")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ("NO_PRUNE_MANIFEST", None)


def refusal(directory: Path) -> tuple[str, str | None]:
    with pytest.raises(UnreadableBaseError) as caught:
        read_prune_manifest(directory)
    return caught.value.reason, caught.value.field
