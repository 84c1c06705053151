"""How a client's channel is made: what gRPC is told, which calls are tried again, and what TLS trusts.

Owns everything that both clients' channels share. Knows nothing of requests and results. Each client opens its channel
by itself, on its own thread or loop.
"""

from __future__ import annotations

import json
import ssl

import grpc

from motley_client.endpoint import Endpoint

# Calls that change nothing and are cheap to ask again, and changes whose request id makes a repeat the same change.
# Generate is not among them: an answer that began must not begin anew behind the caller's back.
_RETRIED = {
    "motley.v1.InferenceService": ("Tokenize", "Detokenize"),
    "motley.v1.ServerService": ("GetServerInfo", "GetCapacity"),
    "motley.v1.TenantService": (
        *("GetTenant", "ListTenants", "ListKeys"),
        *("CreateTenant", "UpdateTenant", "DeleteTenant", "CreateKey", "RevokeKey"),
    ),
    # A pin twice is a pin. AbortUpload is not here: what was done already is NOT_FOUND to its repeat.
    "motley.v1.AdapterService": (
        *("GetUpload", "GetAdapter", "ListAdapters", "ListAdapterVersions", "PinAdapter", "UnpinAdapter"),
        *("SetAlias", "RollbackAlias", "ShareAdapter", "DeleteAdapterVersion"),
    ),
    "motley.v1.TrainingService": (
        *("GetDataset", "ListDatasets", "GetTrainingJob", "ListTrainingJobs", "GetTrainingCapabilities"),
        *("DeleteDataset", "CreateTrainingJob", "CancelTrainingJob"),
    ),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": service, "method": name} for service, names in _RETRIED.items() for name in names],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # 16 candidates with 20 log-probabilities a token pass gRPC's 4 MiB; how much is too much is the server's setting.
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),  # a dead peer is noticed in the middle of a long answer
    ("grpc.keepalive_timeout_ms", 10_000),
    # A transfer that was cut goes on after a tenth of a second; gRPC's own pause before it connects again is a second
    # at first and two minutes at most, and calls fail that long though the server is back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def options_of(endpoint: Endpoint) -> tuple[tuple[str, str | int], ...]:
    """Return what a channel is told; a proxy that the environment names is no way to this machine."""
    return (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if endpoint.is_local else _OPTIONS


def credentials_of(endpoint: Endpoint) -> grpc.ChannelCredentials | None:
    """Return what TLS needs, or None for a plain channel.

    Raises: OSError if the CA file cannot be read; ValueError if it holds no certificate, which gRPC would tell only as
    a server that cannot be reached.
    """
    if not endpoint.uses_tls:
        return None
    if endpoint.ca_file is None:
        return grpc.ssl_channel_credentials()
    roots = endpoint.ca_file.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=roots.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"the CA file {endpoint.ca_file} holds no certificate in PEM") from error
    return grpc.ssl_channel_credentials(roots)
