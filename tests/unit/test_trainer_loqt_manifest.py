"""The manifest of a base that LoQT has made: read whole, or refused by the field that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from motley_bases.errors import UnreadableBaseError
from motley_trainer.files.loqt_manifest import MANIFEST_FILE, LoqtManifest, read_loqt_manifest
from motley_trainer.job.made_base import chain_of, read_trained_base

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
MERGES = [{"step": 2, "digest": C}]
GOOD: dict[str, Any] = {
    "schema_version": 1, "fingerprint": C, "original_fingerprint": B, "chain": [A, B], "merges": MERGES,
}  # fmt: skip


def written(directory: Path, content: object) -> Path:
    (directory / MANIFEST_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_what_is_said_is_read_and_more_is_for_people(tmp_path: Path) -> None:
    assert read_loqt_manifest(tmp_path) is None
    found = read_loqt_manifest(written(tmp_path, {**GOOD, "seed": 3}))
    assert found == LoqtManifest(C, B, (A, B), 1)
    assert chain_of(tmp_path, C) == (A, B, C)
    assert chain_of(tmp_path, A) == (A,)  # whose manifest it is not
    scratch = {**GOOD, "original_fingerprint": None, "chain": []}
    assert read_loqt_manifest(written(tmp_path, scratch)) == LoqtManifest(C, None, (), 1)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("", ""), ("{", ""), ("\x00", ""), ("[]", ""), ("null", ""), ("3", ""), ("[" * 100_000, ""),
        ({}, "schema_version"),
        ({**GOOD, "schema_version": 2}, "schema_version"),
        ({**GOOD, "schema_version": True}, "schema_version"),
        *(({name: value for name, value in GOOD.items() if name != gone}, gone) for gone in GOOD),
        ({**GOOD, "fingerprint": None}, "fingerprint"),
        ({**GOOD, "fingerprint": C[:-1]}, "fingerprint"),
        ({**GOOD, "original_fingerprint": [B]}, "original_fingerprint"),
        ({**GOOD, "chain": B}, "chain"),
        ({**GOOD, "chain": [{}, B]}, "chain"),
        ({**GOOD, "chain": [B, A]}, "chain"),
        ({**GOOD, "chain": []}, "chain"),
        ({**GOOD, "original_fingerprint": None}, "chain"),
        ({**GOOD, "merges": 3}, "merges"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused_by_its_field(tmp_path: Path, content: object, field: str) -> None:
    written(tmp_path, content)
    for read in (read_loqt_manifest, read_trained_base, lambda directory: chain_of(directory, C)):
        with pytest.raises(UnreadableBaseError) as refused:
            read(tmp_path)
        path = f"loqt_manifest.{field}" if field else "loqt_manifest"
        assert (refused.value.reason, refused.value.field) == ("LOQT_MANIFEST", path)
        assert len(refused.value.message) < 300


def test_a_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).mkdir()
    with pytest.raises(UnreadableBaseError, match="cannot be read") as refused:
        read_loqt_manifest(tmp_path)
    assert (refused.value.reason, refused.value.field) == ("LOQT_MANIFEST", "loqt_manifest")
