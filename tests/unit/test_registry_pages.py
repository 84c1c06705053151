"""Page tokens: one that was given out is read back, and every other is refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_server.errors import InvalidArgumentError
from motley_server.registry.pages import decode_position, encode_position

SECRET = bytes(range(32))
LISTING = "things"
TOKEN = encode_position(SECRET, LISTING, ["acme", 7])
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_="


def is_refused(token: str) -> bool:
    try:
        decode_position(SECRET, LISTING, token)
    except InvalidArgumentError as error:
        return (error.reason, error.field) == ("BAD_PAGE_TOKEN", "page_token")
    return False


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=128) | st.integers(), max_size=3))
def test_a_position_is_read_back(position: list[str | int]) -> None:
    assert decode_position(SECRET, LISTING, encode_position(SECRET, LISTING, position)) == position


def test_no_token_is_the_beginning() -> None:
    assert decode_position(SECRET, LISTING, "") is None


def test_every_change_of_a_character_is_seen() -> None:
    changed = {TOKEN[:place] + other + TOKEN[place + 1 :] for place in range(len(TOKEN)) for other in ALPHABET} - {
        TOKEN
    }
    assert len(changed) == len(TOKEN) * (len(ALPHABET) - 1)
    assert all(map(is_refused, changed))


def test_a_token_cut_or_lengthened_is_refused() -> None:
    cut = [TOKEN[:end] for end in range(1, len(TOKEN))]
    longer = [TOKEN + "=", TOKEN + "A", TOKEN + "\n", " " + TOKEN, TOKEN * 2, TOKEN + "\x00", TOKEN + "é", "\udc80"]
    assert all(map(is_refused, cut + longer))


@given(st.text(min_size=1))
def test_any_text_is_refused(text: str) -> None:
    assert is_refused(text)


def test_a_position_without_its_signature_is_refused() -> None:
    payload = base64.urlsafe_b64decode(TOKEN)[16:]
    assert payload.startswith(b"[")
    for signature in (b"", bytes(16), bytes(32)):
        assert is_refused(base64.urlsafe_b64encode(signature + payload).decode())


def test_ten_million_characters_are_refused() -> None:
    assert is_refused("A" * 10_000_000)


@pytest.mark.parametrize(("secret", "listing"), [(bytes(32), LISTING), (SECRET, "others"), (SECRET, "thing")])
def test_another_registrys_or_lists_token_is_refused(secret: bytes, listing: str) -> None:
    assert is_refused(encode_position(secret, listing, ["acme", 7]))
