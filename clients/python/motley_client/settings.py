"""Where the command line finds its server and key when no flag says so.

Owns the config file: where it lies, what may stand in it. Flags and environment variables come first and are the
command line's own. Reads the environment only when asked.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from motley_client.endpoint import DEFAULT_ADDRESS, Endpoint

BAD_SETTING = "BAD_SETTING"


class SettingsError(Exception):
    """Say what is wrong with the file, the environment or the flags that choose a server."""

    reason = BAD_SETTING

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


@dataclass(frozen=True, slots=True)
class Settings:
    """What chooses a server; None is what nobody has said."""

    server: str | None = None
    key: str | None = None
    ca_file: str | None = None
    insecure: bool | None = None


def config_path(environ: Mapping[str, str]) -> Path:
    """Return where the config file lies, whether or not it exists."""
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".config")
    return Path(home) / "motley" / "config.toml"


def read_file(path: Path) -> Settings:
    """Read a config file; one that does not exist says nothing.

    Raises: SettingsError for a file that cannot be read or parsed, an unknown key, or a value of another type.
    """
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    known = [field.name for field in fields(Settings)]
    for name, value in table.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{path}: unknown key, the nearest is {nearest!r}", field=name)
        if not isinstance(value, bool if name == "insecure" else str):
            raise SettingsError(f"{path}: not {'true or false' if name == 'insecure' else 'a string'}", field=name)
    return Settings(**table)


def endpoint(said: Settings, environ: Mapping[str, str]) -> Endpoint:
    """Fill what flags and environment variables left open from the config file, and the rest by default.

    Semantics: a filed `key` and `insecure` are for the filed server; another one that was said gets neither. How a
    server is trusted is one choice: a said CA file sets a filed `insecure` aside, and the reverse.
    Raises: SettingsError for whatever makes no endpoint.
    """
    filed = read_file(config_path(environ))
    if said.server and filed.server and said.server != filed.server:
        filed = replace(filed, key=None, insecure=None)
    ca_file = said.ca_file if said.ca_file is not None or said.insecure else filed.ca_file
    insecure = said.insecure if said.insecure is not None or said.ca_file is not None else filed.insecure
    try:
        return Endpoint(
            address=said.server or filed.server or DEFAULT_ADDRESS,
            key=said.key if said.key is not None else filed.key,
            ca_file=None if ca_file is None else Path(ca_file).expanduser(),
            insecure=bool(insecure),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
