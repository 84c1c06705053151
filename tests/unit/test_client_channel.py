"""Which addresses are taken, what is spoken there, and which calls are tried again."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import grpc
import pytest
from certificates import make_certificates
from motley.v1 import adapter_pb2, inference_pb2, server_pb2, tenant_pb2, training_pb2
from motley_client.channel import credentials_of, options_of
from motley_client.endpoint import Endpoint


@pytest.mark.parametrize("address", ["127.0.0.1:8470", "localhost:1", "[::1]:8470", "127.3.4.5:1", "unix:/run/x.sock"])
def test_this_machine_is_spoken_to_in_the_clear_and_past_proxies(address: str) -> None:
    endpoint = Endpoint(address)

    assert credentials_of(endpoint) is None
    assert dict(options_of(endpoint))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize("address", ["10.0.0.1:8470", "motley.example:443", "[2001:db8::1]:1", "dns:///motley:8470"])
def test_other_machines_are_spoken_to_by_tls_unless_asked_otherwise(address: str) -> None:
    assert credentials_of(Endpoint(address)) is not None
    assert credentials_of(Endpoint(address, insecure=True)) is None
    assert "grpc.enable_http_proxy" not in dict(options_of(Endpoint(address)))


def test_a_ca_file_means_tls_even_on_this_machine(tmp_path: Path) -> None:
    ca_file = make_certificates(tmp_path).authority

    assert credentials_of(Endpoint("127.0.0.1:1", ca_file=ca_file)) is not None
    with pytest.raises(FileNotFoundError):
        credentials_of(Endpoint("127.0.0.1:1", ca_file=tmp_path / "none.pem"))


@pytest.mark.parametrize("address", ["", "localhost", "host:", "host:99999", ":8470", "a b:1", "http//x"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Endpoint(address)


@pytest.mark.parametrize("key", ["", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_travel_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Endpoint("localhost:1", key)


def test_a_ca_file_contradicts_insecure() -> None:
    with pytest.raises(ValueError, match="choose one"):
        Endpoint("host:1", ca_file=Path("ca.pem"), insecure=True)


def test_a_key_travels_as_a_bearer_and_stays_out_of_the_repr() -> None:
    endpoint = Endpoint("localhost:1", "mk_id_secret")

    assert endpoint.metadata == (("authorization", "Bearer mk_id_secret"),)
    assert Endpoint("localhost:1").metadata == ()
    assert "secret" not in repr(endpoint)


def test_a_server_that_is_away_is_looked_for_again_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with grpc.insecure_channel(address, options_of(Endpoint(address))) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/motley.v1.ServerService/GetServerInfo"
            )
            waiting = call.future(b"", timeout=10, wait_for_ready=True)
            times = []
            for _ in range(3):
                listener.accept()[0].close()
                times.append(time.monotonic())
            waiting.cancel()

    assert times[2] - times[0] < 1.5, "gRPC's own pauses are a second, and then more"


def test_what_is_tried_again_changes_nothing_or_has_a_request_id() -> None:
    config = json.loads(str(dict(options_of(Endpoint("localhost:1")))["grpc.service_config"]))
    (method_config,) = config["methodConfig"]
    named = {(entry["service"], entry["method"]) for entry in method_config["name"]}
    services = [
        service
        for file in (adapter_pb2, inference_pb2, server_pb2, tenant_pb2, training_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    inputs = {
        (service.full_name, method.name): method.input_type.fields_by_name
        for service in services
        for method in service.methods
    }

    assert named <= inputs.keys()
    changing = {name for name in named if not name[1].startswith(("Get", "List", "Tokenize", "Detokenize"))}
    without_id = {name[1] for name in changing if "request_id" not in inputs[name]}
    assert without_id == {"PinAdapter", "UnpinAdapter"}, "to do them twice is to do them once"
    never = {"Generate", "GenerateStream", "Drain", "UploadAdapter", "DownloadAdapter", "AbortUpload"}
    never |= {"UploadDataset", "WatchTrainingJob"}  # which go on by themselves, and not from their beginning
    assert {method for _, method in named}.isdisjoint(never)
    assert method_config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
