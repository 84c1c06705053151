"""What an adapter declares binds it: to a kind, to a base, to its own content."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from adapter_files import FINGERPRINT, tiny_spec, write
from motley_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from motley_adapters.reader import read_adapter

OTHER = f"sha256:{'f' * 64}"
PLAIN: dict[str, Any] = {"schema_version": 1, "kind": "lora"}


def test_a_directory_without_a_manifest_declares_nothing(tmp_path: Path) -> None:
    spec = read_adapter(write(tmp_path), tiny_spec()).spec
    assert (spec.kind, spec.trained_on) == ("lora", "undeclared")


@pytest.mark.parametrize("declared", [{}, {"trained_on": "undeclared"}, {"serves_on": FINGERPRINT}, {"provenance": {}}])
def test_a_manifest_may_leave_the_base_undeclared(declared: dict[str, Any], tmp_path: Path) -> None:
    spec = read_adapter(write(tmp_path, manifest=PLAIN | declared), tiny_spec()).spec
    assert spec.trained_on == "undeclared"


def test_the_base_it_declares_is_recorded(tmp_path: Path) -> None:
    directory = write(tmp_path, manifest=PLAIN | {"trained_on": FINGERPRINT, "serves_on": FINGERPRINT})
    assert read_adapter(directory, tiny_spec()).spec.trained_on == FINGERPRINT


@pytest.mark.parametrize("name", ["trained_on", "serves_on"])
def test_another_base_is_refused_with_both_fingerprints(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, manifest=PLAIN | {name: OTHER})
    with pytest.raises(AdapterMismatchError, match=f"{OTHER}.*{FINGERPRINT}") as caught:
        read_adapter(directory, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("BASE_MISMATCH", f"motley_manifest.{name}")


def test_a_digest_that_holds_is_accepted_and_another_refused(tmp_path: Path) -> None:
    digest = read_adapter(write(tmp_path), tiny_spec()).spec.digest
    assert read_adapter(write(tmp_path, manifest=PLAIN | {"digest": digest}), tiny_spec()).spec.digest == digest
    write(tmp_path, manifest=PLAIN | {"digest": OTHER})
    with pytest.raises(AdapterFormatError, match=digest) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("DIGEST_MISMATCH", "motley_manifest.digest")


@pytest.mark.parametrize(
    ("fields", "reason", "name"),
    [
        ({"schema_version": 2}, "UNSUPPORTED_SCHEMA", "schema_version"),
        ({"schema_version": True}, "UNSUPPORTED_SCHEMA", "schema_version"),
        ({"schema_version": None}, "UNSUPPORTED_SCHEMA", "schema_version"),
        ({"kind": "dora"}, "UNSUPPORTED_KIND", "kind"),
        ({"kind": ["lora"]}, "INVALID_FIELD", "kind"),
        ({"kind": None}, "MISSING_FIELD", "kind"),
        ({"trainedon": OTHER}, "UNKNOWN_FIELD", "trainedon"),
        ({"trained_on": "my base"}, "INVALID_FIELD", "trained_on"),
        ({"trained_on": None}, "INVALID_FIELD", "trained_on"),
        ({"digest": "sha256:12"}, "INVALID_FIELD", "digest"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    fields: dict[str, Any], reason: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path, manifest=PLAIN | fields)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == (reason, f"motley_manifest.{name}")


def test_a_manifest_behind_a_link_is_refused_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "motley_manifest.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert caught.value.reason == "SYMLINK_REFUSED"


@pytest.mark.parametrize("kind", [AdapterError, AdapterFormatError, AdapterMismatchError])
def test_errors_survive_pickling(kind: type[AdapterError]) -> None:
    error = pickle.loads(pickle.dumps(kind("a sentence", reason="A_REASON", field="a.field")))
    assert type(error) is kind
    assert (str(error), error.message, error.reason, error.field) == ("a sentence", "a sentence", "A_REASON", "a.field")


def test_an_unknown_kind_is_named_before_what_stands_beside_it(tmp_path: Path) -> None:
    directory = write(tmp_path, manifest={"schema_version": 1, "kind": "dora", "s2ft": {}})
    with pytest.raises(AdapterFormatError, match="dora") as caught:
        read_adapter(directory, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("UNSUPPORTED_KIND", "motley_manifest.kind")
