"""Certificates of a test's own making: an authority, and a server's certificate that it has signed."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Certificates:
    """Where the PEM files lie."""

    authority: Path
    server: Path
    server_key: Path


def make_certificates(
    folder: Path,
    host: str = "127.0.0.1",
    name: str = "localhost",
    *,
    lifetime: timedelta = timedelta(days=1),
    alternatives: Collection[str] = ("name", "host"),
) -> Certificates:
    """Write an authority's certificate, and a certificate for a name and an address with its key.

    Semantics: `alternatives` says which of the two are there beside the subject, which is the name.
    """
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _signed("an authority of the test", authority_key, "an authority of the test", authority_key, None)
    server = _signed(name, server_key, "an authority of the test", authority_key, host, lifetime, alternatives)
    written = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    written.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    written.server.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    written.server_key.write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return written


def _signed(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    host: str | None,
    lifetime: timedelta = timedelta(days=1),
    alternatives: Collection[str] = (),
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
    )
    if host is not None and alternatives:
        known = {"name": x509.DNSName(subject), "host": x509.IPAddress(ipaddress.ip_address(host))}
        names = [known[one] for one in alternatives]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
