"""The client stays light, and what it exports is what it says it exports."""

from __future__ import annotations

import inspect
import subprocess
import sys

import motley_client
import pytest


def test_the_client_and_its_command_line_import_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "transformers", "motley_server", "motley_adapters", "motley_bases", "motley_kernels"}
    code = "import sys, motley_client.cli, motley_client.demo; print(*{name.partition('.')[0] for name in sys.modules})"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert heavy.isdisjoint(found.stdout.split())
    assert "motley_client" in found.stdout.split()


def test_the_command_line_loads_no_grpc_before_it_makes_a_call() -> None:
    code = "import sys, motley_client.cli; print('grpc' in sys.modules)"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(motley_client, name)


def test_every_exported_name_exists_and_every_error_is_exported() -> None:
    assert motley_client.__all__ == sorted(motley_client.__all__)
    assert all(hasattr(motley_client, name) for name in motley_client.__all__)
    errors = {kind.__name__ for kind in motley_client.MotleyClientError.__subclasses__()}
    assert errors <= set(motley_client.__all__)


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    blocking, awaiting = (
        {
            name: [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }
        for kind in (motley_client.Client, motley_client.AsyncClient)
    )

    assert blocking == awaiting
    wanted = {"generate", "create_tenant", "revoke_key", "set_alias", "upload_adapter", "download_adapter", "close"}
    wanted |= {"upload_dataset", "create_training_job", "watch_training_job", "training_capabilities"}
    assert wanted <= blocking.keys()
