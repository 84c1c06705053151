"""The rules of the house: every import contract can break, and no file or function outgrows its bounds."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((HOUSE / "pyproject.toml").read_text())
ROOTS: list[str] = SETTINGS["tool"]["hatch"]["build"]["dev-mode-dirs"]
CONTRACTS = {contract["id"]: contract["name"] for contract in SETTINGS["tool"]["importlinter"]["contracts"]}
GENERATED = "protos/"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


# --- imports ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """Lines to add to modules, by path from the root of the repository, and the one contract they break."""

    contract: str
    planted: dict[str, str]


TRAINER = "trainer/motley_trainer"
VIOLATIONS = {
    "kernels import bases": Violation("chain", {"kernels/motley_kernels/planted.py": "import motley_bases"}),
    "bases import adapters": Violation("chain", {"bases/motley_bases/planted.py": "import motley_adapters.errors"}),
    "adapters import the server": Violation(
        "chain", {"adapters/motley_adapters/planted.py": "from motley_server import errors"}
    ),
    "the server imports the trainer": Violation(
        "chain", {f"{TRAINER}/__init__.py": "", "server/motley_server/planted.py": "import motley_trainer"}
    ),
    "the trainer imports the server": Violation(
        "chain", {f"{TRAINER}/__init__.py": "from motley_server.errors import MotleyError"}
    ),
    "a worker imports a job": Violation("trainer", {f"{TRAINER}/worker/planted.py": "import motley_trainer.job.run"}),
    "a method imports a job": Violation("trainer", {f"{TRAINER}/methods/planted.py": "import motley_trainer.job.loop"}),
    "a module of the trainer lies beside the layers": Violation("trainer", {f"{TRAINER}/planted.py": ""}),
    "the trainer imports grpc": Violation("wire", {f"{TRAINER}/worker/planted.py": "import grpc"}),
    "the server imports the client": Violation(
        "server-without-client", {"server/motley_server/planted.py": "import motley_client"}
    ),
    "the client imports torch": Violation("light-client", {"clients/python/motley_client/planted.py": "import torch"}),
    "the client imports the server": Violation(
        "light-client", {"clients/python/motley_client/planted.py": "import motley_server.errors"}
    ),
    "the server imports grpc outside rpc": Violation("wire", {"server/motley_server/planted.py": "import grpc.aio"}),
    "the server imports protobuf outside rpc": Violation(
        "wire", {"server/motley_server/registry/planted.py": "from google.protobuf import message"}
    ),
    "the server imports generated code outside rpc": Violation(
        "wire", {"server/motley_server/planted.py": "from motley.v1 import inference_pb2"}
    ),
    "the server imports SQL outside the registry": Violation(
        "sql", {"server/motley_server/planted.py": "import sqlite3"}
    ),
    "the client imports SQL": Violation(
        "sql", {"clients/python/motley_client/planted.py": "from sqlalchemy import select"}
    ),
    "the registry imports torch": Violation(
        "bookkeeping-without-torch", {"server/motley_server/registry/planted.py": "from torch import Tensor"}
    ),
    "the scheduler reaches torch through a neighbour": Violation(
        "bookkeeping-without-torch",
        {
            "server/motley_server/engine/planted.py": "import torch",
            "server/motley_server/engine/scheduler.py": "from motley_server.engine import planted",
        },
    ),
    "the block pool imports torch": Violation(
        "bookkeeping-without-torch", {"server/motley_server/engine/block_pool.py": "import torch"}
    ),
    "kernels import grpc": Violation("bare-engine", {"kernels/motley_kernels/planted.py": "import grpc"}),
    "the engine reaches grpc through rpc": Violation(
        "bare-engine",
        {
            "server/motley_server/rpc/planted.py": "import grpc",
            "server/motley_server/engine/planted.py": "import motley_server.rpc.planted",
        },
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the Python files of every root, and the settings."""
    copy = tmp_path_factory.mktemp("house")
    for path in _python_files(ROOTS):
        target = copy / path.relative_to(HOUSE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(HOUSE / "pyproject.toml", copy / "pyproject.toml")
    return copy


def test_every_contract_is_kept(copy: Path) -> None:
    assert _broken_contracts(copy) == set()


@pytest.mark.parametrize("violation", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_planted_violation_breaks_its_contract_and_no_other(copy: Path, tmp_path: Path, violation: Violation) -> None:
    shutil.copytree(copy, tmp_path, dirs_exist_ok=True)
    for path, line in violation.planted.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        before = target.read_text() if target.exists() else ""
        target.write_text(f"{before}\n{line}\n")
    assert _broken_contracts(tmp_path) == {CONTRACTS[violation.contract]}


def test_every_contract_has_a_planted_violation() -> None:
    assert {violation.contract for violation in VIOLATIONS.values()} == set(CONTRACTS)


def test_the_client_imports_without_torch_and_the_server() -> None:
    modules = [_module_name(path) for path in _python_files(["clients/python"])]
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
heavy = {{"torch", "numpy", "transformers", "motley_server", "motley_adapters", "motley_bases", "motley_kernels"}}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def _broken_contracts(tree: Path) -> set[str]:
    roots = [str(tree / root) for root in ROOTS]
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo", "--config", "pyproject.toml"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)(?: \(.*\))?$", result.stdout, re.MULTILINE))
    assert set(verdicts) == set(CONTRACTS.values()), result.stdout + result.stderr
    return {name for name, verdict in verdicts.items() if verdict == "BROKEN"}


# --- files -----------------------------------------------------------------------------------------------------------


def _python_files(folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((HOUSE / folder).rglob("*.py")):
            if not str(path.relative_to(HOUSE)).startswith(GENERATED):
                yield path


def _module_name(path: Path) -> str:
    root = next(HOUSE / root for root in ROOTS if path.is_relative_to(HOUSE / root))
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


OWN_FILES = {
    str(path.relative_to(HOUSE)): path.read_text() for path in _python_files([*ROOTS, "recipes", "tests", "benchmarks"])
}


def complaints(source: str) -> list[str]:
    """List what the house does not allow in one file."""
    found = []
    if source.count("\n") > MAX_FILE_LINES:
        found.append(f"{source.count(chr(10))} lines")
    tree = ast.parse(source)
    if tree.body and ast.get_docstring(tree) is None:
        found.append("no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name} has {lines} lines")
        elif isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            found.append(f"line {node.lineno} swallows an exception")
    return found


@pytest.mark.parametrize("path", OWN_FILES)
def test_a_file_keeps_the_bounds_of_the_house(path: str) -> None:
    assert complaints(OWN_FILES[path]) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('"""Doc."""\n' + "x = 1\n" * 400, "401 lines"),
        ("x = 1\n", "no docstring"),
        ('"""Doc."""\ndef f():\n' + "    x = 1\n" * 60, "f has 61 lines"),
        ('"""Doc."""\ntry:\n    x = 1\nexcept ValueError:\n    pass\n', "line 4 swallows an exception"),
    ],
)
def test_each_bound_is_seen_when_crossed(source: str, complaint: str) -> None:
    assert complaints(source) == [complaint]


def test_no_root_is_a_package_itself() -> None:
    assert [root for root in ROOTS if (HOUSE / root / "__init__.py").exists()] == []


def test_no_module_is_called_utils_or_common() -> None:
    assert [path for path in OWN_FILES if Path(path).stem in {"utils", "util", "common", "helpers", "misc"}] == []


def test_every_root_is_named_wherever_roots_are_listed() -> None:
    packages = {path.name for root in ROOTS for path in (HOUSE / root).glob("motley_*") if path.is_dir()}
    tool = SETTINGS["tool"]
    wheel = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(path).name for path in wheel} == packages | {"motley"}
    assert {str(Path(path).parent) for path in wheel} == set(ROOTS)
    assert set(tool["mypy"]["packages"]) == packages
    assert set(tool["mypy"]["mypy_path"].split(":")) == set(ROOTS)
    assert set(tool["importlinter"]["root_packages"]) == packages
    assert f"ROOTS := {tool['mypy']['mypy_path']}\n" in (HOUSE / "Makefile").read_text()
    assert all((HOUSE / path / "py.typed").exists() for path in wheel if not path.startswith(GENERATED))


def test_every_package_folder_is_in_a_listed_root() -> None:
    packages = HOUSE.glob("*/motley_*/__init__.py")
    assert {path.parents[1].name for path in packages} == {root for root in ROOTS if "/" not in root} - {"protos"}
