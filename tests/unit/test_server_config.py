"""Configuration: precedence, types and ranges by key, unknown keys, and a printout that resolves to itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_server.config import PARSERS, ConfigError, ServerConfig, render, resolve
from motley_server.config_values import Address


def write(directory: Path, text: str) -> Path:
    file = directory / "motley.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_nothing_set_is_the_defaults() -> None:
    config = resolve({})
    assert dataclasses.replace(config, data_dir=ServerConfig().data_dir) == ServerConfig()
    assert (str(config.listen), str(config.metrics)) == ("127.0.0.1:8470", "127.0.0.1:8471")
    assert config.data_dir.is_absolute()


def test_every_field_has_a_parser_and_the_reverse() -> None:
    config = ServerConfig()
    fields = {field.name for field in dataclasses.fields(config)} - {"engine", "limits", "training", "tls", "adapters"}
    fields |= {f"engine.{field.name}" for field in dataclasses.fields(config.engine)}
    fields |= {f"limits.{field.name}" for field in dataclasses.fields(config.limits)}
    fields |= {f"training.{field.name}" for field in dataclasses.fields(config.training)}
    fields |= {f"tls.{field.name}" for field in dataclasses.fields(config.tls)}
    assert fields == set(PARSERS)


def test_flags_override_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path, 'dtype = "float32"\nlisten = "127.0.0.1:1"\nlog_level = "debug"\n[engine]\nmax_running = 7\n'
    )
    environ = {"MOTLEY_LISTEN": "127.0.0.1:2", "MOTLEY_LOG_LEVEL": "error", "MOTLEY_ENGINE_BLOCK_SIZE": "32"}
    config = resolve(environ, {"listen": "127.0.0.1:3"}, file)
    assert (config.dtype, config.log_level, str(config.listen)) == ("float32", "error", "127.0.0.1:3")
    assert (config.engine.max_running, config.engine.block_size) == (7, 32)


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[limits]\ndrain_seconds = 2\n")
    assert resolve({"MOTLEY_CONFIG": str(file)}).limits.drain_seconds == 2.0


def test_adapters_of_all_origins_are_kept_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, '[adapters]\none = "here/one"\ntwo = "/abs/two"\n')
    environ = {"MOTLEY_ADAPTERS": "two=/env/two,three=/env/three"}
    config = resolve(environ, {"adapters": ["three=/flag/three", "v1.2_x=/a=b"]}, file)
    assert dict(config.adapters) == {
        "one": tmp_path / "here/one",
        "two": Path("/env/two"),
        "three": Path("/flag/three"),
        "v1.2_x": Path("/a=b"),
    }


def test_paths_of_the_file_start_from_its_directory(tmp_path: Path) -> None:
    config = resolve({}, file=write(tmp_path, 'base = "checkpoint"\ndata_dir = "data"\n'))
    assert (config.base, config.data_dir) == (str(tmp_path / "checkpoint"), tmp_path / "data")
    assert resolve({}, {"base": "tiny"}).base == "tiny"
    assert resolve({}, {"base": "./tiny"}).base == str(Path.cwd() / "tiny")


BAD_FILES = {
    'bas = "tiny"': ("bas", "the nearest is base"),
    "[engine]\nmax_runing = 3": ("engine.max_runing", "the nearest is engine.max_running"),
    "[engin]\nblock_size = 3": ("engin.block_size", "the nearest is engine.block_size"),
    "[bogus]": ("bogus", "there is no such key; the nearest is "),
    "[limit]": ("limit", "the nearest is limits"),
    "[engine.threds]": ("engine.threds", "the nearest is engine.threads"),
    "[base]": ("base", "{} is not a text"),
    "[engine]\nthreads = {}": ("engine.threads", "{} is not an integer"),
    "base = 3": ("base", "3 is not a text"),
    'dtype = "int8"': ("dtype", "none of auto, float32, bfloat16, float16"),
    'listen = "8470"': ("listen", "not HOST:PORT"),
    'listen = "127.0.0.1:70000"': ("listen", "not HOST:PORT"),
    'listen = "::1:80"': ("listen", "brackets"),
    'listen = "0.0.0.0:8470"': ("listen", "insecure"),
    'listen = "example.org:8470"': ("listen", "that takes auth = true and tls.cert with tls.key"),
    'listen = "0.0.0.0:1"\nauth = true': ("listen", "that takes tls.cert with tls.key;"),
    'listen = "0.0.0.0:1"\n[tls]\ncert = "c"\nkey = "k"': ("listen", "that takes auth = true;"),
    '[tls]\ncert = "c"': ("tls.key", "not set, though tls.cert is"),
    '[tls]\nkey = "k"': ("tls.cert", "not set, though tls.key is"),
    "[tls]\ncert = 3": ("tls.cert", "3 is not a text"),
    'database = "mysql://user:word@host/x"': ("database", "neither sqlite:"),
    'database = "sqlite:///relative"': ("database", "neither sqlite:"),
    '[engine]\nblock_size = "16"': ("engine.block_size", "'16' is not an integer"),
    "[engine]\nblock_size = 16.0": ("engine.block_size", "16.0 is not an integer"),
    "[engine]\nblock_size = true": ("engine.block_size", "True is not an integer"),
    "[engine]\nblock_size = 0": ("engine.block_size", "0 is not within 1"),
    "[engine]\nprefix_cache = 1": ("engine.prefix_cache", "neither true nor false"),
    "[limits]\ndrain_seconds = nan": ("limits.drain_seconds", "not a finite number"),
    "[limits]\ndrain_seconds = -1": ("limits.drain_seconds", "not within"),
    "[limits]\nmax_message_bytes = 2000": ("limits.max_prompt_bytes", "could never arrive"),
    "[engine]\ntoken_budget = 63": ("engine.token_budget", "room for a token of all"),
    'adapters = "x=/y"': ("adapters", "not a table"),
    '[adapters]\nBad = "/y"': ("adapters.Bad", "no adapter name"),
    "[adapters]\nx = 3": ("adapters.x", "3 is not a text"),
    "base = ": ("config", "cannot be read"),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_refused_by_key(text: str, tmp_path: Path) -> None:
    key, words = BAD_FILES[text]
    with pytest.raises(ConfigError, match=r".") as caught:
        resolve({}, file=write(tmp_path, text))
    assert caught.value.key == key
    assert words in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve({}, file=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("environ", "key", "words"),
    [
        ({"MOTLEY_LISTN": "x"}, "MOTLEY_LISTN", "the nearest is MOTLEY_LISTEN"),
        ({"MOTLEY_ENGINE_THREADS": "two"}, "engine.threads", "MOTLEY_ENGINE_THREADS"),
        ({"MOTLEY_INSECURE": "maybe"}, "insecure", "neither true nor false"),
        ({"MOTLEY_ADAPTERS": "nodir"}, "adapters", "not NAME=DIR"),
        ({"MOTLEY_ADAPTERS": "a=/x,a=/y"}, "adapters.a", "named twice"),
    ],
)
def test_a_bad_environment_is_refused_by_key(environ: dict[str, str], key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(environ)
    assert caught.value.key == key


def test_empty_sections_that_exist_change_nothing(tmp_path: Path) -> None:
    assert resolve({}, file=write(tmp_path, "[engine]\n[limits]\n[adapters]\n")) == resolve({})


@pytest.mark.parametrize("given", ["nodir", "Bad=/x", "a="])
def test_a_bad_flag_is_refused_by_the_flags_name(given: str) -> None:
    with pytest.raises(ConfigError, match=r"\(from --adapter\)$"):
        resolve({}, {"adapters": [given]})
    with pytest.raises(ConfigError, match=r"\(from --data-dir\)$"):
        resolve({}, {"data_dir": ""})


def test_variables_of_the_client_and_of_kubernetes_are_not_ours() -> None:
    foreign = {
        "MOTLEY_SERVER": "x", "MOTLEY_KEY": "x", "MOTLEY_PORT": "tcp://10.0.0.1:8470", "MOTLEY_SERVICE_HOST": "x",
        "MOTLEY_SERVICE_PORT_GRPC": "1", "MOTLEY_PORT_8470_TCP_ADDR": "x", "OTHER": "x",
    }  # fmt: skip
    assert resolve(foreign) == resolve({})


def test_keys_and_tls_together_open_other_addresses(tmp_path: Path) -> None:
    text = 'listen = "0.0.0.0:1"\nauth = true\n[tls]\ncert = "tls/server.pem"\nkey = "/etc/server.key"\n'
    config = resolve({}, file=write(tmp_path, text))
    assert (config.tls.cert, config.tls.key) == (tmp_path / "tls/server.pem", Path("/etc/server.key"))
    assert not config.insecure


def test_tls_is_taken_back_by_an_empty_text() -> None:
    environ = {"MOTLEY_TLS_CERT": "/c", "MOTLEY_TLS_KEY": "/k"}
    assert str(resolve(environ).tls.cert) == "/c"
    assert resolve(environ, {"tls.cert": "", "tls.key": ""}).tls.cert is None


def test_the_registry_is_a_file_in_the_data_directory_unless_named() -> None:
    assert resolve({}, {"data_dir": "/var/lib/motley"}).database_url == "sqlite:////var/lib/motley/registry.sqlite3"
    url = "postgresql://motley@db.example/motley"
    assert resolve({"MOTLEY_DATABASE": url}).database_url == url


def test_a_refused_database_is_not_repeated_for_it_may_hold_a_password() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"MOTLEY_DATABASE": "postgres+odd://user:hush@host/x"})
    assert "hush" not in str(caught.value)


def test_insecure_opens_other_addresses() -> None:
    assert str(resolve({"MOTLEY_INSECURE": "true", "MOTLEY_LISTEN": "0.0.0.0:1"}).listen) == "0.0.0.0:1"


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:1", "[::1]:80", "127.8.9.1:65535"])
def test_loopback_needs_no_leave(text: str) -> None:
    assert str(resolve({}, {"listen": text}).listen) == text


def test_an_empty_metrics_address_switches_the_endpoint_off() -> None:
    assert resolve({"MOTLEY_METRICS": ""}).metrics is None


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(
    listen=st.sampled_from([Address("127.0.0.1", 0), Address("::1", 80), Address("localhost", 65535)]),
    metrics=st.none() | st.just(Address("0.0.0.0", 9)),
    directory=texts,
    names=st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True), texts, max_size=3),
    drain=st.floats(0, 86400),
    block_size=st.integers(1, 1024),
    prefix_cache=st.booleans(),
)
def test_the_printout_resolves_to_itself(
    tmp_path_factory: pytest.TempPathFactory,
    listen: Address,
    metrics: Address | None,
    directory: str,
    names: dict[str, str],
    drain: float,
    block_size: int,
    prefix_cache: bool,
) -> None:
    config = resolve({})
    config = dataclasses.replace(
        config,
        listen=listen,
        metrics=metrics,
        data_dir=Path("/") / directory.replace("/", '"\\'),
        adapters={name: Path("/") / path for name, path in names.items()},
        engine=dataclasses.replace(config.engine, block_size=block_size, prefix_cache=prefix_cache),
        limits=dataclasses.replace(config.limits, drain_seconds=drain),
    )
    file = write(tmp_path_factory.getbasetemp(), render(config))
    assert resolve({}, file=file) == config
