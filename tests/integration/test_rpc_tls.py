"""TLS by files: who trusts the authority is served, nobody else is, and bad files are told apart at start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from certificates import Certificates, make_certificates
from cryptography.hazmat.primitives import serialization
from motley.v1 import server_pb2, server_pb2_grpc
from motley_server.asked import Role
from motley_server.tls import TlsError, read_tls
from rpc_harness import serving


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


async def ask(channel: grpc.aio.Channel, text: str) -> server_pb2.GetServerInfoResponse:
    stub = server_pb2_grpc.ServerServiceStub(channel)
    metadata = (("authorization", f"Bearer {text}"),)
    return await stub.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=metadata, timeout=5)


def test_a_key_opens_the_server_over_tls_and_nothing_does_without(certificates: Certificates, tmp_path: Path) -> None:
    async def scenario() -> None:
        tls = read_tls(certificates.server, certificates.server_key)
        stranger = make_certificates(tmp_path).authority.read_bytes()
        async with serving(auth=True, tls=tls) as shell:
            _, text = await shell.registry.database.run(shell.registry.keys.create, "local", Role.USER)
            address = f"127.0.0.1:{shell.port}"
            trusted = grpc.ssl_channel_credentials(certificates.authority.read_bytes())
            async with grpc.aio.secure_channel(address, trusted) as channel:
                assert (await ask(channel, text)).base_model == "paper"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel, text + "x")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(stranger)) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel, text)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(shell.channel, text)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def encrypted(certificates: Certificates, folder: Path) -> tuple[Path, Path]:
    key = serialization.load_pem_private_key(certificates.server_key.read_bytes(), password=None)
    path = folder / "encrypted.key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )  # fmt: skip
    return certificates.server, path


def test_a_pair_that_is_none_is_refused_before_anybody_connects(certificates: Certificates, tmp_path: Path) -> None:
    other = make_certificates(tmp_path)
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\xff\x00 no PEM")
    for certificate, key in (
        (certificates.server, other.server_key),
        (garbage, certificates.server_key),
        (certificates.server, garbage),
        (certificates.server_key, certificates.server),
        encrypted(certificates, tmp_path),
    ):
        with pytest.raises(TlsError, match=r"^tls.cert .* and tls.key .* are no pair") as caught:
            read_tls(certificate, key)
        assert str(key) in str(caught.value)
    with pytest.raises(TlsError, match=r"^tls.key: .*none.key cannot be read: No such file"):
        read_tls(certificates.server, tmp_path / "none.key")


def test_a_pair_that_was_read_shows_no_secret(certificates: Certificates) -> None:
    assert repr(read_tls(certificates.server, certificates.server_key)) == "TlsFiles(...)"
