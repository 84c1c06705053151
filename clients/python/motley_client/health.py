"""Whether a server serves, by the standard health service, for whatever looks after it.

Owns the one exception to what TLS trusts: a server on this very machine, to which the client would speak in the clear,
is asked by TLS if it speaks that, whatever certificate it shows; the names there seldom include a loopback address. So
no key goes with these calls. Runs on the caller's thread.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from motley_client.channel import credentials_of, options_of
from motley_client.endpoint import Endpoint
from motley_client.errors import from_rpc_error

_NAME_OVERRIDE = "grpc.ssl_target_name_override"
_LEAST_WAIT_SECONDS = 0.01


def is_serving(endpoint: Endpoint, timeout: float) -> bool:
    """Ask a server whether it serves.

    Units: `timeout` in seconds, for the whole.
    Raises: MotleyClientError; OSError or ValueError for a CA file that is none.
    """
    deadline = time.monotonic() + timeout
    credentials, options = credentials_of(endpoint), options_of(endpoint)
    if credentials is None and not endpoint.insecure and not endpoint.address.startswith("unix:"):
        certificate, name = _shown_certificate(endpoint.address, deadline)
        if certificate:
            credentials = grpc.ssl_channel_credentials(certificate.encode("ascii"))
            options = (*options, (_NAME_OVERRIDE, name))
    channel = (
        grpc.insecure_channel(endpoint.address, options)
        if credentials is None
        else grpc.secure_channel(endpoint.address, credentials, options)
    )
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_seconds_until(deadline))
        except grpc.RpcError as error:
            raise from_rpc_error(error, endpoint.address) from error
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _shown_certificate(address: str, deadline: float) -> tuple[str, str]:
    """Return the certificate that a server shows, in PEM, and a name it is for; none and "" if it speaks no TLS.

    Semantics: what else may be wrong (nobody answers, the certificate has expired) is left for the call to find.
    """
    certificate = ""
    anything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # ssl tells the names only of what it trusts
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        with _secured(address, anything, deadline) as connection:
            certificate = ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")
        trusting.load_verify_locations(cadata=certificate)
        with _secured(address, trusting, deadline) as connection:
            return certificate, _name_in(connection.getpeercert() or {})
    except OSError:
        return certificate, ""


def _secured(address: str, context: ssl.SSLContext, deadline: float) -> ssl.SSLSocket:
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])  # without it, a gRPC server breaks off and says so in its log
    with socket.create_connection((host.strip("[]"), int(port)), _seconds_until(deadline)) as plain:
        return context.wrap_socket(plain)  # and `plain` is empty from here on


def _name_in(certificate: dict[str, Any]) -> str:
    """Return a name that a certificate is for; a wildcard stands for itself."""
    alternatives = certificate.get("subjectAltName", ())
    names = [value for kind, value in alternatives if kind == "DNS"]
    names += [str(ipaddress.ip_address(value)) for kind, value in alternatives if kind == "IP Address"]
    names += [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    return names[0] if names else ""


def _seconds_until(deadline: float) -> float:
    return max(_LEAST_WAIT_SECONDS, deadline - time.monotonic())
