"""The server's configuration: one frozen value, resolved once from file, environment and flags, in rising order.

An unknown key is an error that names the nearest known one; so is a value of the wrong type or out of range. Nothing
else of the server reads a file or the environment for settings. Runs before anything is started.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from motley_bases.checkpoint import EMBEDDED_BASES

from motley_server.config_values import (
    Address,
    Origin,
    Parser,
    address,
    choice,
    database_url,
    directory,
    flag,
    integer,
    number,
    optional_address,
    optional_path,
)
from motley_server.registry.names import NAME_RULE, is_name

MIB = 2**20
DEFAULT_LISTEN = Address("127.0.0.1", 8470)
DEFAULT_METRICS = Address("127.0.0.1", 8471)
DEFAULT_DATA_DIR = Path("~/.local/share/motley")
ENVIRONMENT_PREFIX = "MOTLEY_"
CONFIG_FILE_VARIABLE = "MOTLEY_CONFIG"
SECTIONS = ("engine", "limits", "training", "tls")
# The client's own, and what Kubernetes puts into every container beside a Service called `motley`.
FOREIGN_VARIABLES = re.compile(r"MOTLEY_(SERVER|KEY|CONFIG|PORT|PORT_\d+_.+|SERVICE_(HOST|PORT)(_.+)?)")


class ConfigError(ValueError):
    """Say which key of the configuration is wrong, and why."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much the engine may hold and do at once."""

    kv_cache_bytes: int = 256 * MIB
    adapter_cache_bytes: int = 256 * MIB  # in host memory
    adapter_arena_bytes: int = 256 * MIB  # on the device
    max_running: int = 64  # sequences in a forward pass
    max_waiting: int = 256  # requests beyond those that can run
    token_budget: int = 512  # tokens in a forward pass
    block_size: int = 16  # tokens
    prefix_cache: bool = True
    reader_queue_events: int = 1024
    threads: int = 0  # of the forward pass; 0 leaves the choice to torch


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What a caller may ask for, and how long things may take."""

    max_new_tokens: int = 256  # where the caller names none; cut to the context
    max_prompt_bytes: int = MIB
    max_message_bytes: int = 16 * MIB
    health_stall_seconds: float = 3.0
    drain_seconds: float = 30.0
    collect_seconds: float = 300.0  # between two looks at what nobody wants any more


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Whether jobs are queued here, and within which bounds."""

    enabled: bool = True
    max_dataset_bytes: int = 256 * MIB
    max_dataset_bytes_total: int = 16 * 1024 * MIB  # of a tenant's datasets together
    lease_seconds: float = 30.0  # without a word from its worker
    max_job_seconds: float = 86400.0  # in workers' hands; 0 is no limit
    keep_jobs_days: float = 90.0  # from a job's end; 0 keeps them


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """What the server shows to prove who it is; both files or neither."""

    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that can be set about a server."""

    base: str = "tiny"  # an embedded base, or an absolute path
    dtype: str = "auto"
    quantize: str = "auto"  # as the checkpoint is stored
    listen: Address = DEFAULT_LISTEN
    metrics: Address | None = DEFAULT_METRICS
    data_dir: Path = DEFAULT_DATA_DIR
    database: str = ""  # a file in data_dir
    auth: bool = False
    insecure: bool = False
    require_declared_base: bool = False
    reflection: bool = True
    log_level: str = "info"
    engine: EngineConfig = field(default_factory=EngineConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    adapters: Mapping[str, Path] = field(default_factory=dict)

    @property
    def database_url(self) -> str:
        """Return where tenants and keys are kept."""
        return self.database or f"sqlite:///{self.data_dir / 'registry.sqlite3'}"


def _base(value: object, origin: Origin) -> object:
    return value if value in EMBEDDED_BASES else str(directory(value, origin))


PARSERS: Mapping[str, Parser] = MappingProxyType({
    "base": _base,
    "dtype": choice("auto", "float32", "bfloat16", "float16"),
    "quantize": choice("auto", "none", "nf4", "int8"),
    "listen": address,
    "metrics": optional_address,
    "data_dir": directory,
    "database": database_url,
    "auth": flag,
    "insecure": flag,
    "require_declared_base": flag,
    "reflection": flag,
    "log_level": choice("debug", "info", "warning", "error"),
    "engine.kv_cache_bytes": integer(1),
    "engine.adapter_cache_bytes": integer(0),
    "engine.adapter_arena_bytes": integer(0),
    "engine.max_running": integer(1, 65536),
    "engine.max_waiting": integer(0, 2**20),
    "engine.token_budget": integer(1, 2**20),
    "engine.block_size": integer(1, 1024),
    "engine.prefix_cache": flag,
    "engine.reader_queue_events": integer(1, 2**20),
    "engine.threads": integer(0, 1024),
    "limits.max_new_tokens": integer(1, 2**30),
    "limits.max_prompt_bytes": integer(1, 2**30),
    "limits.max_message_bytes": integer(1024, 2**31 - 1),
    "limits.health_stall_seconds": number(0.1, 3600),
    "limits.drain_seconds": number(0, 86400),
    "limits.collect_seconds": number(0.1, 86400),
    "training.enabled": flag,
    "training.max_dataset_bytes": integer(1, 2**40),
    "training.max_dataset_bytes_total": integer(1, 2**50),
    "training.lease_seconds": number(1, 3600),
    "training.max_job_seconds": number(0, 10**8),
    "training.keep_jobs_days": number(0, 36500),
    "tls.cert": optional_path,
    "tls.key": optional_path,
})  # fmt: skip


def resolve(
    environ: Mapping[str, str], flags: Mapping[str, object] | None = None, file: Path | None = None
) -> ServerConfig:
    """Resolve the configuration: defaults, then the file, then MOTLEY_* of `environ`, then `flags`.

    Semantics: `environ` spells `engine.max_running` MOTLEY_ENGINE_MAX_RUNNING, and adapters
    MOTLEY_ADAPTERS=NAME=DIR,NAME=DIR; without `file`, MOTLEY_CONFIG names one. `flags` has dotted keys; its `adapters`
    is a list of NAME=DIR. Adapters of all three are kept, by name. Paths become absolute: those of the file start from
    its directory.
    Raises: ConfigError.
    """
    values: dict[str, object] = {}
    adapters: dict[str, Path] = {}
    if file is None and environ.get(CONFIG_FILE_VARIABLE):
        file = Path(environ[CONFIG_FILE_VARIABLE])
    for key, value, origin in (
        *_from_file(file), *_from_environment(environ), *_from_flags(flags or {}),
    ):  # fmt: skip
        if key == "adapters":
            adapters |= _parse_adapters(value, origin)
        else:
            values[key] = _parse(key, value, origin)
    if "data_dir" not in values:
        values["data_dir"] = _parse("data_dir", str(DEFAULT_DATA_DIR), Origin("the default", True, Path.cwd()))
    return _check(_build(values, adapters))


def render(config: ServerConfig) -> str:
    """Write a configuration as TOML that resolves to itself."""
    sections: dict[str, list[str]] = {"": [], **{section: [] for section in SECTIONS}}
    for key in PARSERS:
        section, _, name = key.rpartition(".")
        holder = getattr(config, section) if section else config
        sections[section].append(f"{name} = {_toml(getattr(holder, name))}")
    sections["adapters"] = [f"{_toml(name)} = {_toml(path)}" for name, path in sorted(config.adapters.items())]
    return "\n".join(
        line for section, lines in sections.items() for line in ([f"\n[{section}]"] if section else []) + lines
    ) + "\n"  # fmt: skip


Setting = tuple[str, object, Origin]


def _from_file(file: Path | None) -> Iterator[Setting]:
    if file is None:
        return
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", f"{file} cannot be read: {error}") from error
    origin = Origin(str(file), is_text=False, directory=file.absolute().parent)
    yield from ((key, value, origin) for key, value in _flatten(table))


def _flatten(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        # An empty table below any other name is a value that no key takes, or a name that does not exist.
        if isinstance(value, dict) and prefix + key != "adapters" and (value or prefix + key in SECTIONS):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _from_environment(environ: Mapping[str, str]) -> Iterator[Setting]:
    known = {_variable(key): key for key in [*PARSERS, "adapters"]}
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or FOREIGN_VARIABLES.fullmatch(variable):
            continue
        if variable not in known:
            raise _unknown(variable, known)
        origin = Origin(variable, is_text=True, directory=Path.cwd())
        key = known[variable]
        yield key, [item for item in value.split(",") if item] if key == "adapters" else value, origin


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _from_flags(flags: Mapping[str, object]) -> Iterator[Setting]:
    for key, value in flags.items():
        # The flag for adapters gives one at a time.
        name = "adapter" if key == "adapters" else key.replace("_", "-").replace(".", "-")
        yield key, value, Origin(f"--{name}", is_text=True, directory=Path.cwd())


def _parse(key: str, value: object, origin: Origin) -> object:
    if key not in PARSERS:
        raise _unknown(key, [*PARSERS, "adapters", *(SECTIONS if value == {} else ())])
    try:
        return PARSERS[key](value, origin)
    except ValueError as error:
        raise ConfigError(key, f"{error} (from {origin.label})") from error


def _unknown(key: str, known: Iterable[str]) -> ConfigError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return ConfigError(key, f"there is no such key; the nearest is {nearest}")


def _parse_adapters(value: object, origin: Origin) -> dict[str, Path]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and origin.is_text:
        pairs = [_split_pair(str(item), origin) for item in value]
    else:
        raise ConfigError("adapters", f"{value!r} is not a table of names and directories (from {origin.label})")
    parsed: dict[str, Path] = {}
    for name, path in pairs:
        key = f"adapters.{name}"
        if not is_name(name):
            raise ConfigError(key, f"{name!r} is no adapter name: {NAME_RULE} (from {origin.label})")
        if name in parsed:
            raise ConfigError(key, f"named twice (from {origin.label})")
        try:
            parsed[name] = Path(str(directory(path, origin)))
        except ValueError as error:
            raise ConfigError(key, f"{error} (from {origin.label})") from error
    return parsed


def _split_pair(text: str, origin: Origin) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise ConfigError("adapters", f"{text!r} is not NAME=DIR (from {origin.label})")
    return name, path


def _build(values: Mapping[str, object], adapters: Mapping[str, Path]) -> ServerConfig:
    nested: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in SECTIONS}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        nested[section][name] = value
    top: dict[str, Any] = nested[""] | {
        "engine": EngineConfig(**nested["engine"]),
        "limits": LimitsConfig(**nested["limits"]),
        "training": TrainingConfig(**nested["training"]),
        "tls": TlsConfig(**nested["tls"]),
        "adapters": MappingProxyType(dict(adapters)),
    }
    return ServerConfig(**top)


def _check(config: ServerConfig) -> ServerConfig:
    _check_exposure(config)
    if config.limits.max_prompt_bytes > config.limits.max_message_bytes:
        raise ConfigError("limits.max_prompt_bytes", "a prompt larger than limits.max_message_bytes could never arrive")
    if config.engine.token_budget < config.engine.max_running:
        raise ConfigError("engine.token_budget", "a forward pass must have room for a token of all engine.max_running")
    return config


def _check_exposure(config: ServerConfig) -> None:
    if (config.tls.cert is None) is not (config.tls.key is None):
        missing, given = ("tls.cert", "tls.key") if config.tls.cert is None else ("tls.key", "tls.cert")
        raise ConfigError(missing, f"not set, though {given} is; a certificate and its key go together")
    if config.listen.is_loopback or config.insecure or (config.auth and config.tls.cert is not None):
        return
    wanted = {"auth = true": config.auth, "tls.cert with tls.key": config.tls.cert is not None}
    missing = " and ".join(name for name, is_set in wanted.items() if not is_set)
    raise ConfigError(
        "listen",
        f"{config.listen} can be reached from other machines, and that takes {missing}; otherwise listen on 127.0.0.1, "
        "or set insecure = true (MOTLEY_INSECURE=true) to go without",
    )


def _toml(value: object) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
