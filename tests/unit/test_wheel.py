"""The distribution: what is in the wheel, and that every fact about it has one home."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel and list its files."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=HOUSE, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    assert path.name.startswith(f"motley-{PROJECT['version']}-")
    return set(zipfile.ZipFile(path).namelist())


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("server", "motley_server/**/*.py"),
        ("adapters", "motley_adapters/**/*.py"),
        ("kernels", "motley_kernels/**/*.py"),
        ("bases", "motley_bases/**/*.py"),
        ("clients/python", "motley_client/**/*.py"),
        ("protos", "motley/v1/*.proto"),
        ("protos", "motley/v1/*_pb2.py"),
        ("protos", "motley/v1/*.pyi"),
        ("bases", "motley_bases/assets/**/*.*"),
        ("adapters", "motley_adapters/assets/**/*.*"),
        ("server", "motley_server/py.typed"),
        ("clients/python", "motley_client/py.typed"),
    ],
)
def test_the_wheel_has_every_file_of(wheel: set[str], folder: str, pattern: str) -> None:
    expected = {str(path.relative_to(HOUSE / folder)) for path in (HOUSE / folder).glob(pattern) if path.is_file()}
    assert expected
    assert expected - wheel == set()


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    tops = {
        "motley_server",
        "motley_trainer",
        "motley_adapters",
        "motley_kernels",
        "motley_bases",
        "motley_client",
        "motley",
    }
    assert {path.split("/")[0] for path in wheel} == {*tops, f"motley-{PROJECT['version']}.dist-info"}
    assert not [path for path in wheel if "__pycache__" in path]


def test_the_installed_version_is_that_of_the_project_file() -> None:
    assert metadata.version("motley") == PROJECT["version"]


def test_the_changelog_opens_with_the_version() -> None:
    headings = [line for line in (HOUSE / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {PROJECT['version']}")


def test_every_entry_point_loads() -> None:
    points = [*metadata.entry_points(group="motley.commands"), *metadata.entry_points(group="console_scripts")]
    ours = [point for point in points if point.dist is not None and point.dist.name == "motley"]
    assert {point.name for point in ours} == {"motley", *PROJECT["entry-points"]["motley.commands"]}
    assert all(callable(point.load()) for point in ours)
