"""`motley health` and the container's health check: in the clear, by TLS for whatever names, and nobody there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Certificates, make_certificates
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from motley_client.cli import app
from motley_server.tls import read_tls
from rpc_harness import serving
from typer.testing import CliRunner, Result

HOUSE = Path(__file__).resolve().parents[2]
ELSEWHERE = "10.9.8.7"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MOTLEY_SERVER", raising=False)


class SeeingHealth(health.HealthServicer):
    """Remember what calls carry."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata: list[dict[str, Any]] = []

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        return super().Check(request, context)


@contextmanager
def healthy(certificates: Certificates | None, status: Any = SERVING) -> Iterator[tuple[int, SeeingHealth]]:
    """Answer health checks on loopback, by TLS where there are certificates; yield the port."""
    server, servicer = grpc.server(ThreadPoolExecutor(max_workers=2)), SeeingHealth()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (certificates.server_key.read_bytes(), certificates.server.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield port, servicer
    finally:
        server.stop(grace=None).wait(timeout=10)


def motley_health(server: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["health", "--server", server, *flags])


def told(result: Result) -> tuple[int, str, str]:
    return result.exit_code, result.stdout, result.stderr


NAMES: dict[str, dict[str, Any] | None] = {
    "in the clear": None,
    "for this machine": {},
    "for another name": {"host": ELSEWHERE, "name": "motley.example"},
    "for a name of old": {"name": "motley.example", "alternatives": ()},
    "for an address alone": {"host": "2001:db8::1", "name": "motley.example", "alternatives": ("host",)},
    "for every name": {"host": ELSEWHERE, "name": "*.motley.example"},
}


@pytest.fixture(params=NAMES)
def certificates(request: pytest.FixtureRequest, tmp_path: Path) -> Certificates | None:
    names = NAMES[request.param]
    return None if names is None else make_certificates(tmp_path, **names)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_asked_as_it_speaks(certificates: Certificates | None, host: str) -> None:
    with healthy(certificates) as (port, servicer):
        assert told(motley_health(f"{host}:{port}")) == (0, "serving\n", "")
        servicer.set("", NOT_SERVING)
        assert told(motley_health(f"{host}:{port}")) == (1, "not serving\n", "")


def healthcheck() -> list[str]:
    (command,) = re.findall(
        r"^HEALTHCHECK [^\n]*\\\n\s+CMD (\[.*\])$", (HOUSE / "Dockerfile").read_text(), re.MULTILINE
    )
    words: list[str] = json.loads(command)
    return words


def check_container(listen: str) -> int:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PATH": path, "MOTLEY_LISTEN": listen}
    return subprocess.run(healthcheck(), env=environ, capture_output=True, timeout=60, check=False).returncode


def test_the_containers_health_check_holds_with_and_without_tls(tmp_path: Path) -> None:
    for certificates in (None, make_certificates(tmp_path, ELSEWHERE, "motley.example")):
        with healthy(certificates) as (port, servicer):
            assert check_container(f"0.0.0.0:{port}") == 0
            servicer.set("", NOT_SERVING)
            assert check_container(f"[::]:{port}") == 1
    assert check_container("0.0.0.0:1") == 1


def test_a_server_with_keys_and_tls_says_that_it_serves_and_that_it_drains(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ELSEWHERE, "motley.example")

    async def scenario() -> None:
        async with serving(auth=True, tls=read_tls(made.server, made.server_key)) as shell:
            address = f"127.0.0.1:{shell.port}"
            assert told(await asyncio.to_thread(motley_health, address)) == (0, "serving\n", "")
            await shell.engine.drain(0.0)
            assert told(await asyncio.to_thread(motley_health, address)) == (1, "not serving\n", "")

    asyncio.run(scenario())


def test_a_ca_file_is_held_to_even_on_this_machine(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    (tmp_path / "other").mkdir()
    other = make_certificates(tmp_path / "other")
    with healthy(made) as (port, _):
        for trusted in (made.authority, made.server):  # the certificate's own file, too
            assert told(motley_health(f"127.0.0.1:{port}", "--ca-file", str(trusted))) == (0, "serving\n", "")
        refused = motley_health(f"127.0.0.1:{port}", "--ca-file", str(other.authority))
        assert (refused.exit_code, refused.stdout) == (3, "")
        assert refused.stderr.startswith(f"error: no server answers at 127.0.0.1:{port}")


def test_insecure_speaks_in_the_clear_and_nothing_else(tmp_path: Path) -> None:
    for certificates, code in ((None, 0), (make_certificates(tmp_path), 3)):
        with healthy(certificates) as (port, _):
            assert motley_health(f"127.0.0.1:{port}", "--insecure").exit_code == code


def test_no_key_goes_with_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_KEY", "mk_a_b")
    (tmp_path / "motley").mkdir()
    (tmp_path / "motley" / "config.toml").write_text('key = "mk_c_d"\n')
    with healthy(make_certificates(tmp_path)) as (port, servicer):
        assert motley_health(f"127.0.0.1:{port}").exit_code == 0
    assert ["authorization" in sent for sent in servicer.metadata] == [False]


def test_a_certificate_that_has_expired_serves_nobody(tmp_path: Path) -> None:
    with healthy(make_certificates(tmp_path, lifetime=timedelta(hours=-1))) as (port, servicer):
        assert motley_health(f"127.0.0.1:{port}").exit_code == 3
    assert servicer.metadata == []


def test_a_server_that_takes_connections_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        result = motley_health(f"127.0.0.1:{listener.getsockname()[1]}", "--timeout", "0.3")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.endswith("(DEADLINE_EXCEEDED)\n")
        assert time.monotonic() - started < 5


def test_a_connection_cut_in_the_handshake_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def cut() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=cut)
        thread.start()
        result = motley_health(f"127.0.0.1:{listener.getsockname()[1]}", "--timeout", "2")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)
    assert (result.exit_code, result.stdout) == (3, "")


@pytest.mark.parametrize("flags", [["--ca-file", "/no/such.pem"], ["--timeout", "0"], ["--server", "nowhere"]])
def test_wrong_usage_is_exit_code_2(flags: list[str]) -> None:
    result = motley_health("127.0.0.1:1", *flags)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_nobody_there_is_exit_code_3() -> None:
    result = motley_health("127.0.0.1:1")

    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith("(UNREACHABLE)\n")
