"""A key never travels in the clear but to this machine, and TLS trusts the CA file that is given and no other."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from certificates import Certificates, make_certificates
from fake_tenant_service import FakeTenantService, serving_tenants
from motley_client import Client, MotleyClientError, UnavailableError
from motley_client.endpoint import Endpoint

KEY = "mk_id_hush"
LOCAL = ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.3.4.5:1", "unix:/run/x.sock"]
ELSEWHERE = [
    "10.0.0.1:1", "0.0.0.0:1", "[::]:1", "[::ffff:10.0.0.1]:1", "localhost.example:1", "127.0.0.1.example:1",
    "2130706433:1", "dns:///127.0.0.1:1", "ipv4:///10.0.0.1:1", "unix-abstract:///x:1",
]  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("address", ELSEWHERE)
def test_only_insecure_sends_a_key_in_the_clear_to_another_machine(address: str) -> None:
    assert Endpoint(address, KEY).uses_tls
    assert not Endpoint(address, KEY, insecure=True).uses_tls


@pytest.mark.parametrize("address", LOCAL)
def test_this_machine_gets_the_key_in_the_clear(address: str) -> None:
    assert not Endpoint(address, KEY).uses_tls


def heard_from(client_of: str, *, insecure: bool) -> bytes:
    """Return what a client with a key says first to a listener that never answers by TLS."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def listen() -> None:
            listener.settimeout(10)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(0.5)
                if insecure:
                    peer.sendall(bytes.fromhex("000000040000000000"))  # empty HTTP/2 settings: go on
                try:
                    while chunk := peer.recv(65536):
                        heard.extend(chunk)
                except TimeoutError:
                    return

        thread = threading.Thread(target=listen)
        thread.start()
        client = Client(f"{client_of}:{port}", KEY, timeout=1, insecure=insecure)
        with client, pytest.raises(MotleyClientError):
            client.get_tenant("acme")
        thread.join()
    return bytes(heard)


def test_a_listener_that_is_not_plainly_this_machine_hears_no_key() -> None:
    # The same listener, named so that it might be anywhere: the first bytes are a TLS handshake.
    assert heard_from("dns:///127.0.0.1", insecure=False).startswith(b"\x16\x03")
    assert KEY.encode() in heard_from("dns:///127.0.0.1", insecure=True), "the ear is deaf"


def test_a_server_that_the_ca_file_vouches_for_gets_the_key(certificates: Certificates) -> None:
    fake = FakeTenantService()
    with serving_tenants(fake, certificates) as address, Client(address, KEY, ca_file=certificates.authority) as client:
        assert client.create_tenant("acme").id == "acme"

    assert fake.credentials == [f"Bearer {KEY}"]


def test_a_server_that_nobody_vouches_for_gets_nothing(certificates: Certificates, tmp_path: Path) -> None:
    fake, other = FakeTenantService(), make_certificates(tmp_path)
    with serving_tenants(fake, certificates) as address:
        client = Client(address, KEY, ca_file=other.authority, timeout=5)
        with client, pytest.raises(UnavailableError) as caught:
            client.get_tenant("acme")

    assert caught.value.is_unreachable
    assert fake.calls == []


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "é"]
)
def test_a_ca_file_without_a_certificate_is_named(tmp_path: Path, text: str) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text(text)

    with pytest.raises(ValueError, match=r"ca\.pem holds no certificate"):
        Client("motley.example:1", KEY, ca_file=ca_file)
