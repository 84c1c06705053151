"""docs/errors.md lists exactly the reasons that the source can say, each under the code that it is sent with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import pytest
from motley_server.rpc.status import CODES

HOUSE = Path(__file__).resolve().parents[2]
DOCUMENT = HOUSE / "docs" / "errors.md"
SERVER_ROOTS = ("server/motley_server", "adapters/motley_adapters", "bases/motley_bases")
CLIENT_ROOTS = ("clients/python/motley_client",)
TRAINER_ROOTS = ("trainer/motley_trainer",)

# Every word in capitals is taken for a reason, however it is passed on, so that none can hide; these are not.
NO_REASONS = {
    "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "HF_HUB_OFFLINE", "MOTLEY_CONFIG",  # environment
    "FILE", "DIR",  # help
    "CASCADE", "OK",  # of SQL, of the audit
    "LORA", "CAUSAL_LM", "F32", "F16", "BF16", "I32", "SCB",  # in files
}  # fmt: skip
NO_TRAINER_REASONS = {
    "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE",  # environment
    "BASE", "DIR", "FILE", "LR", "NAME",  # help
    "F32",  # in files
    "KMGT",  # of sizes
    "UNSPECIFIED",  # of enums
    "SC_PAGE_SIZE",  # of the machine
    "RANK_TOO_LARGE", "NO_ANSWERS", "REQUEST_ID_REUSED", "UPLOAD_EXISTS", "LOQT_FILLS_ZEROS",  # the server's too
    "QUANTIZED_OTHERWISE", "OTHER_ORIGINAL", "OTHER_MANIFEST", "MODEL_CONSTRUCTION",  # of the bases too
}  # fmt: skip
NO_CLIENT_REASONS = {
    "GRPC_VERBOSITY", "ERROR", "MOTLEY_SERVER", "MOTLEY_KEY", "XDG_CONFIG_HOME", "HOME",  # environment
    "KEY", "FILE", "QUOTA", "ALIAS", "TENANT", "TERMS", "NAME", "ID",  # help
    "CHECKSUM_MISMATCH", "UPLOAD_NOT_FOUND", "DATASET_NOT_FOUND", "UPLOAD_OFFSET",  # the server's too
    "RST_STREAM",  # of HTTP/2
    "UNSPECIFIED",  # of enums
    "DNS",  # in certificates
    "GET",
} | {code.name for code in grpc.StatusCode}  # fmt: skip

WORD = re.compile(r"[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)*")
ROW = re.compile(r"^\| `([A-Z0-9_]+)` \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
CLIENT_SECTION = "Said by the client"
TRAINER_SECTIONS = ("Said by `motley base`", "Said by a training job", "Said by `motley worker`")
LOG_SECTION = "In the server's log alone"

# The other sections are headed by their gRPC code, alone or after a colon.
SECTION_OF_START_ERRORS = {
    "UnreadableBaseError": "The checkpoint cannot be read",
    "UnsupportedBaseError": "The checkpoint would be served wrongly",
    "DatabaseError": "the database",
    "BundleStoreError": "the data directory",
}


def sources(roots: Iterable[str]) -> Iterator[ast.Module]:
    for root in roots:
        yield from (ast.parse(path.read_text(encoding="utf-8")) for path in sorted((HOUSE / root).rglob("*.py")))


def words_in(roots: Iterable[str]) -> set[str]:
    constants = (node for tree in sources(roots) for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in constants if isinstance(node.value, str) and WORD.fullmatch(node.value)}


def raised() -> set[tuple[str, str]]:
    """Return (class, reason) of every error that is made with its reason written beside it."""
    found = set()
    for tree in sources(SERVER_ROOTS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                for keyword in node.keywords:
                    if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                        found.add((name, keyword.value.value))
    return found


def sections() -> dict[str, list[str]]:
    """Return the reasons of each section that has any, in the order of the document."""
    parts = re.split(r"^#{2,3} (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {title: [row[0] for row in ROW.findall(text)] for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: reasons for title, reasons in found.items() if reasons}


def documented() -> set[str]:
    return {
        reason
        for title, reasons in sections().items()
        if title not in (CLIENT_SECTION, *TRAINER_SECTIONS)
        for reason in reasons
    }


def test_every_reason_of_the_server_is_documented_and_no_other() -> None:
    assert documented() == words_in(SERVER_ROOTS) - NO_REASONS


def test_every_reason_of_the_trainer_is_documented_and_no_other() -> None:
    told = [reason for title in TRAINER_SECTIONS for reason in sections()[title]]
    assert sorted(told) == sorted(words_in(TRAINER_ROOTS) - NO_TRAINER_REASONS)


def test_every_reason_of_the_client_is_documented_and_no_other() -> None:
    assert set(sections()[CLIENT_SECTION]) == words_in(CLIENT_ROOTS) - NO_CLIENT_REASONS


def test_the_words_that_are_no_reasons_are_still_there() -> None:
    assert words_in(SERVER_ROOTS) >= NO_REASONS
    assert words_in(CLIENT_ROOTS) >= NO_CLIENT_REASONS - {code.name for code in grpc.StatusCode}


def test_a_reason_is_documented_once() -> None:
    reasons = [reason for listed in sections().values() for reason in listed]
    assert sorted(reasons) == sorted(set(reasons))


@pytest.mark.parametrize(("kind", "reason"), sorted(raised()))
def test_a_reason_stands_under_the_code_that_it_is_sent_with(kind: str, reason: str) -> None:
    codes = {error.__name__: code.name for error, code in CODES.items()}
    wanted = SECTION_OF_START_ERRORS.get(kind) or codes.get(kind) or LOG_SECTION
    titles = [title for title, reasons in sections().items() if reason in reasons]
    # Admission says DUPLICATE_ADAPTER before the adapters' own check could.
    if (kind, reason) == ("AdapterSetError", "DUPLICATE_ADAPTER"):
        wanted = "INVALID_ARGUMENT"
    assert [title.rpartition(": ")[2] for title in titles] == [wanted]


@pytest.mark.parametrize("name", ["adapters.md", "bases.md", "tenants.md"])
def test_a_reason_that_another_document_names_exists(name: str) -> None:
    words = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (DOCUMENT.parent / name).read_text(encoding="utf-8")))
    assert words & documented()
    assert words - documented() <= NO_REASONS | {"NAME", "MOTLEY_KEY"}
