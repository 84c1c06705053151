"""Flags and environment before the file, the file before the default; and nothing odd in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from motley_client.settings import Settings, SettingsError, config_path, endpoint, read_file


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "motley").mkdir()
    return tmp_path


def write(home: Path, text: str) -> dict[str, str]:
    (home / "motley" / "config.toml").write_text(text)
    return {"XDG_CONFIG_HOME": str(home)}


def test_the_config_file_lies_where_xdg_says() -> None:
    assert config_path({"XDG_CONFIG_HOME": "/x", "HOME": "/home/a"}) == Path("/x/motley/config.toml")
    assert config_path({"HOME": "/home/a"}) == Path("/home/a/.config/motley/config.toml")
    assert config_path({"XDG_CONFIG_HOME": "", "HOME": "/home/a"}) == Path("/home/a/.config/motley/config.toml")


def test_no_file_means_the_default_server_without_a_key(home: Path) -> None:
    found = endpoint(Settings(), {"XDG_CONFIG_HOME": str(home)})

    assert (found.address, found.key, found.ca_file, found.insecure) == ("127.0.0.1:8470", None, None, False)


def test_the_file_fills_what_was_not_said(home: Path) -> None:
    environ = write(home, 'server = "filed:1"\nkey = "filed-key"\ninsecure = true\n')

    for said in (Settings(), Settings(server="filed:1"), Settings(server="")):
        found = endpoint(said, environ)
        assert (found.address, found.key, found.insecure) == ("filed:1", "filed-key", True)
    kept = endpoint(Settings(key="said-key"), environ)
    assert (kept.address, kept.key, kept.insecure) == ("filed:1", "said-key", True)


def test_another_server_gets_neither_the_filed_key_nor_its_way_without_tls(home: Path) -> None:
    environ = write(home, 'server = "filed:1"\nkey = "filed-key"\ninsecure = true\n')

    found = endpoint(Settings(server="said:2"), environ)
    assert (found.address, found.key, found.uses_tls) == ("said:2", None, True)

    keyed = endpoint(Settings(server="filed:2", key="said-key"), environ)
    assert (keyed.key, keyed.uses_tls) == ("said-key", True)

    plain = endpoint(Settings(server="said:2", insecure=True), environ)
    assert (plain.key, plain.uses_tls) == (None, False)


def test_another_server_is_trusted_by_the_filed_authority_alone(home: Path) -> None:
    environ = write(home, 'server = "filed:1"\nkey = "filed-key"\nca_file = "/filed.pem"\n')

    found = endpoint(Settings(server="127.0.0.1:2"), environ)

    assert (found.key, found.ca_file, found.uses_tls) == (None, Path("/filed.pem"), True)


def test_a_file_without_a_server_speaks_of_any(home: Path) -> None:
    environ = write(home, 'key = "filed-key"\ninsecure = true\n')

    found = endpoint(Settings(server="said:2"), environ)

    assert (found.address, found.key, found.insecure) == ("said:2", "filed-key", True)


def test_what_was_said_wins_over_the_file(home: Path) -> None:
    environ = write(home, 'server = "filed:1"\nkey = "filed-key"\nca_file = "/filed.pem"\n')

    found = endpoint(Settings("said:2", "said-key", "/said.pem", False), environ)

    assert (found.address, found.key, found.ca_file) == ("said:2", "said-key", Path("/said.pem"))


def test_what_is_said_of_tls_sets_the_opposite_in_the_file_aside(home: Path) -> None:
    trusting = endpoint(Settings(ca_file="/said.pem"), write(home, "insecure = true"))
    assert (trusting.ca_file, trusting.insecure) == (Path("/said.pem"), False)

    plain = endpoint(Settings(insecure=True), write(home, 'ca_file = "/filed.pem"'))
    assert (plain.ca_file, plain.insecure) == (None, True)

    kept = endpoint(Settings(insecure=False), write(home, 'ca_file = "/filed.pem"'))
    assert (kept.ca_file, kept.insecure) == (Path("/filed.pem"), False)


def test_a_file_that_says_both_is_refused(home: Path) -> None:
    with pytest.raises(SettingsError, match="choose one"):
        endpoint(Settings(), write(home, 'insecure = true\nca_file = "/filed.pem"'))


def test_an_unknown_key_is_refused_and_the_nearest_is_named(home: Path) -> None:
    environ = write(home, 'sever = "x:1"\n')

    with pytest.raises(SettingsError, match="'server'") as caught:
        endpoint(Settings(), environ)

    assert caught.value.field == "sever"


@pytest.mark.parametrize("text", ["server = 1", "insecure = 'yes'", "key = ", "server = 'x:1'\nserver = 'y:1'"])
def test_a_file_that_says_nothing_sound_is_refused_by_its_path(home: Path, text: str) -> None:
    environ = write(home, text)

    with pytest.raises(SettingsError, match=r"config\.toml"):
        read_file(config_path(environ))


def test_a_file_that_cannot_be_read_is_refused(home: Path) -> None:
    (home / "motley" / "config.toml").mkdir()

    with pytest.raises(SettingsError, match=r"config\.toml"):
        read_file(home / "motley" / "config.toml")


def test_an_address_that_is_none_is_refused(home: Path) -> None:
    with pytest.raises(SettingsError, match="HOST:PORT"):
        endpoint(Settings(server="nowhere"), {"XDG_CONFIG_HOME": str(home)})
