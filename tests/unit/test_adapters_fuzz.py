"""Whatever a stranger puts into an adapter's files, both doors say the same, and nothing but a typed error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from adapter_mutations import KINDS, Files, damaged_files, outcome, sound_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motley_adapters.formats import TENSOR_FILE

NUM_CASES = 800
NUM_SOAK_CASES = 60_000
FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_was_sound(kind: str, directory: Path) -> None:
    assert outcome(sound_files(kind), directory).startswith("sha256:")


def fuzz(directory: Path, num_cases: int) -> Counter[str]:
    """Pass so many damaged directories through both doors, and count what came of them."""
    outcomes: Counter[str] = Counter()

    @settings(FIXED, max_examples=num_cases)
    @given(st.data())
    def pass_one(data: st.DataObject) -> None:
        said = outcome(damaged_files(data), directory)
        outcomes["served" if said.startswith("sha256:") else said] += 1

    pass_one()
    return outcomes


def test_damaged_directories_are_refused_alike_with_a_reason_by_both_doors(directory: Path) -> None:
    outcomes = fuzz(directory, NUM_CASES)
    assert outcomes["served"] > NUM_CASES // 20, "the damage stops at the parsers"
    assert len(outcomes) > 25, "the damage meets few of the checks"


@pytest.mark.soak
def test_many_more_damaged_directories_are_refused_alike(directory: Path) -> None:
    assert fuzz(directory, NUM_SOAK_CASES).total() >= NUM_SOAK_CASES


@settings(FIXED, max_examples=300)
@given(content=st.binary(max_size=300))
def test_random_bytes_for_a_tensor_file_are_refused_by_both_doors(content: bytes, directory: Path) -> None:
    files: Files = {**sound_files("lora"), TENSOR_FILE: content}
    assert not outcome(files, directory).startswith("sha256:")
