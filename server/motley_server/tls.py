"""The server's certificate and private key, read once at start and checked against each other."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


class TlsError(Exception):
    """Say which file keeps the server from speaking TLS, and why."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the files hold: the certificate with its chain, and its private key, both PEM."""

    certificate: bytes
    private_key: bytes

    def __repr__(self) -> str:
        return "TlsFiles(...)"  # it may end up in a log


def read_tls(certificate: Path, private_key: Path) -> TlsFiles:
    """Read both files.

    Raises: TlsError for files that cannot be read, are no PEM, are encrypted or do not belong together.
    """
    read = TlsFiles(_read("tls.cert", certificate), _read("tls.key", private_key))
    try:
        # The empty password keeps OpenSSL from asking for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, password=b"")
    except (ssl.SSLError, ValueError) as error:
        message = f"tls.cert {certificate} and tls.key {private_key} are no pair of PEM files without a password"
        raise TlsError(f"{message}: {error}") from error
    return read


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{key}: {path} cannot be read: {error.strerror}") from error
