"""Names: the grammar of a reference, and what each form means to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.catalog import Catalog
from motley_server.registry.names import AdapterReference, parse_reference
from rpc_harness import Facts, digest_of, make_catalog


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("a", AdapterReference(None, "a", alias="default")),
        ("a@prod", AdapterReference(None, "a", alias="prod")),
        ("a@v3", AdapterReference(None, "a", alias="v3")),
        ("a@3", AdapterReference(None, "a", version=3)),
        (f"a@{digest_of('0')}", AdapterReference(None, "a", digest=digest_of("0"))),
        ("public/a.b_c-d@2", AdapterReference("public", "a.b_c-d", version=2)),
    ],
)
def test_each_form_is_read(text: str, reference: AdapterReference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "a@", "a@0", "a@03", "a@-1", "A", "a b", "a/b/c", "/a", "a/", "a@b@c", "a@sha256:12", "-a", ".a",
        f"a@{digest_of('g')}", "a@" + "1" * 30, "x" * 129, "a\n", "ä", "a@Prod",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_reference(text)


@given(st.text(max_size=40))
def test_no_text_breaks_the_grammar(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ValueError:
        return
    assert [reference.alias, reference.version, reference.digest].count(None) == 2


@pytest.mark.parametrize(
    ("text", "version", "letter"),
    [
        ("zeta", 2, "2"),
        ("zeta@default", 2, "2"),
        ("zeta@1", 1, "1"),
        ("local/zeta@1", 1, "1"),
        ("public/shared", 1, "5"),
    ],
)
def test_a_name_means_one_version(text: str, version: int, letter: str) -> None:
    found = make_catalog().resolve("local", text, field="f")
    assert (found.version, found.digest) == (version, digest_of(letter))


def test_a_digest_names_the_version_that_has_it() -> None:
    assert make_catalog().resolve("local", f"zeta@{digest_of('1')}", field="f").version == 1


@pytest.mark.parametrize("text", ["nobody", "zeta@3", "zeta@prod", "other/secret", "shared", f"zeta@{digest_of('3')}"])
def test_what_a_tenant_cannot_use_is_not_there(text: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        make_catalog().resolve("local", text, field="adapters[4].name")
    assert (caught.value.reason, caught.value.field) == ("ADAPTER_NOT_FOUND", "adapters[4].name")


def test_another_tenant_sees_its_own_and_the_public_ones() -> None:
    catalog = make_catalog()
    assert [one.name_for("other") for one in catalog.visible("other")] == ["public/shared", "secret"]
    assert catalog.resolve("other", "secret", field="f").digest == digest_of("6")


def test_a_malformed_name_is_the_callers_fault() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make_catalog().resolve("local", "a@@", field="f")
    assert (caught.value.reason, caught.value.field) == ("INVALID_ADAPTER_NAME", "f")


def test_versions_grow_by_one_and_the_default_follows() -> None:
    catalog = Catalog()
    for index in range(3):
        added = catalog.add("local", "a", Facts(digest_of(str(index))))
        assert added.version == index + 1
        assert catalog.resolve("local", "a", field="f") == added
    with pytest.raises(ValueError, match="no adapter's name"):
        catalog.add("local", "A", Facts(digest_of("1")))
