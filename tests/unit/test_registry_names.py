"""Names: the grammar of a reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_server.registry.names import AdapterReference, parse_reference
from paper_library import digest_of


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
