"""The manifest of a pruned base: written, read again, bound to its weights, and refused by the field that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
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
    criterion="param_first",
    selection="global_normalised",
    protected=(1, 1),
    calibration_sha256=OTHER,
    calibration_tokens=640,
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
    assert replace(MANIFEST, seed=8).digest != MANIFEST.digest


def test_a_manifest_from_before_there_was_a_second_rule_says_the_first_and_keeps_its_digest(tmp_path: Path) -> None:
    write_prune_manifest(tmp_path, MANIFEST)
    assert "rule" not in json.loads((tmp_path / "prune_manifest.json").read_text())
    assert read_prune_manifest(tmp_path).rule == "llm-pruner"
    assert MANIFEST.digest == "sha256:5fadb0d32b0eeb4dce0d46e2b3a9035dd2b944f108aa0e35a7086f7e7f740e64"
    other = replace(MANIFEST, rule="loram")
    write_prune_manifest(tmp_path, other)
    assert read_prune_manifest(tmp_path) == other
    assert other.digest != MANIFEST.digest


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
    "of a later schema": ({"schema_version": 2}, "schema_version"),
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
    "a field too many": ({"ratio": 0.25}, "ratio"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_refused_by_its_field(case: str, tmp_path: Path) -> None:
    changes, field = FAULTS[case]
    write_prune_manifest(tmp_path, MANIFEST)
    path = tmp_path / "prune_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert refusal(tmp_path) == ("PRUNE_MANIFEST", f"prune_manifest.{field}")


@pytest.mark.parametrize("field", [name for name in PruneManifest.__dataclass_fields__ if name != "rule"])
def test_every_field_but_the_rule_must_be_there(field: str, tmp_path: Path) -> None:
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
