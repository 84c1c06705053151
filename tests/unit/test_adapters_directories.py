"""Directories give an adapter back from wherever it lies, and say when it lies nowhere any more."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from adapter_files import plain_tensors, tiny_spec, write
from motley_adapters.directories import AdapterDirectories
from motley_adapters.errors import AdapterFormatError, AdapterLoadError

EMPTY: frozenset[str] = frozenset()


def write_seeded(directory: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in plain_tensors().items()}
    return write(directory, tensors=tensors)


def refusal_of_loading(directories: AdapterDirectories, digest: str) -> str:
    with pytest.raises(AdapterLoadError) as caught:
        directories.load(digest)
    return caught.value.reason


def test_what_was_read_is_loaded_again_and_what_was_inspected_is_not_remembered(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    read = directories.read(write_seeded(tmp_path / "a", 1))
    inspection = directories.inspect(write_seeded(tmp_path / "b", 2))
    assert directories.load(read.spec.digest).spec == read.spec
    with pytest.raises(AdapterLoadError) as caught:
        directories.load(inspection.spec.digest)
    assert caught.value.reason == "ADAPTER_UNREADABLE"


def test_inspecting_a_place_that_is_known_takes_nothing_from_it(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    read = directories.read(write_seeded(tmp_path / "a", 1))
    directories.inspect(tmp_path / "a")
    assert directories.load(read.spec.digest).spec == read.spec


def test_what_is_refused_is_not_remembered(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    with pytest.raises(AdapterFormatError):
        directories.inspect(tmp_path)
    assert directories.forget(tmp_path) == EMPTY


def test_the_place_remembered_last_is_tried_first_and_the_others_after_it(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    first, second = write_seeded(tmp_path / "first", 1), write_seeded(tmp_path / "second", 1)
    digest = directories.read(first).spec.digest
    directories.remember(digest, second)
    write_seeded(first, 2)
    assert directories.load(digest).spec.digest == digest
    directories.remember(digest, first)  # first again, and holds another adapter now
    assert directories.load(digest).spec.digest == digest
    write_seeded(first, 1)
    shutil.rmtree(second)
    assert directories.load(digest).spec.digest == digest


def test_the_error_is_that_of_the_place_remembered_last(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    digest = directories.read(write_seeded(tmp_path / "a", 1)).spec.digest
    write_seeded(tmp_path / "a", 2)
    assert refusal_of_loading(directories, digest) == "ADAPTER_CHANGED"
    directories.remember(digest, tmp_path / "nowhere")
    assert refusal_of_loading(directories, digest) == "ADAPTER_UNREADABLE"


def test_an_unknown_digest_is_unreadable() -> None:
    assert refusal_of_loading(AdapterDirectories(tiny_spec()), "sha256:nobody") == "ADAPTER_UNREADABLE"


def test_forgetting_names_the_digests_that_lie_nowhere_any_more(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    here, there = write_seeded(tmp_path / "here", 1), write_seeded(tmp_path / "there", 1)
    digest = directories.read(here).spec.digest
    directories.remember(digest, there)
    directories.remember(digest, there)  # twice is once
    directories.remember("sha256:other", here)
    assert directories.forget(here) == {"sha256:other"}
    assert directories.load(digest).spec.digest == digest
    assert directories.forget(there) == {digest}
    assert directories.forget(there) == EMPTY
    assert refusal_of_loading(directories, digest) == "ADAPTER_UNREADABLE"


def test_threads_that_remember_load_and_forget_never_lose_what_stays(tmp_path: Path) -> None:
    directories = AdapterDirectories(tiny_spec())
    digest = directories.read(write_seeded(tmp_path / "stays", 1)).spec.digest
    errors: list[BaseException] = []

    def churn(thread: int) -> None:
        place = tmp_path / f"gone-{thread}"
        try:
            for _ in range(50):
                directories.remember(digest, place)
                assert directories.load(digest).spec.digest == digest
                assert directories.forget(place) == EMPTY
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert directories.forget(tmp_path / "stays") == {digest}
