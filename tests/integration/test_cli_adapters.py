"""`motley adapters` against a service in memory: what is sent, printed and asked, and what lies on disk afterwards."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import make_certificates
from fake_adapter_service import FakeAdapterService, serving_adapters
from fake_service import refusal
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2
from motley_client.cli import app
from typer.testing import CliRunner, Result

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors"}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeAdapterService]:
    """Serve adapters at the address that the environment names, and hide this machine's settings."""
    fake = FakeAdapterService()
    with serving_adapters(fake) as address:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make an adapter's directory."""
    made = tmp_path / "made"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    (made / "README.md").write_text("about it")
    return made


def adapters(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["adapters", *arguments], input=typed)


def told(*arguments: str) -> str:
    """Return what a command prints that has nothing to complain about."""
    result = adapters(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_push_sends_what_was_said_and_prints_the_version(fake: FakeAdapterService, folder: Path) -> None:
    words = ["--alias", "prod", "--alias", "new", "--label", "team=search", "--label", "note=a=b", "--kind", "s2ft"]
    printed = told("push", "legal", str(folder), *words)

    header = next(request for name, request in fake.calls if name == "UploadAdapter")
    assert (header.adapter_name, list(header.aliases)) == ("legal", ["prod", "new"])
    assert (dict(header.labels), header.kind) == ({"team": "search", "note": "a=b"}, adapter_pb2.ADAPTER_KIND_S2FT)
    assert printed == f"legal@1 {fake.versions['legal'][0].digest}\n"
    assert fake.files["legal", 1] == FILES


VERSION_KEYS = {
    "name", "version", "digest", "kind", "state", "size_bytes", "ranks", "device_bytes", "trained_on", "serves_on",
    "residency", "pinned", "labels", "create_time", "created_by",
}  # fmt: skip


def test_push_and_pull_print_the_version_as_json(folder: Path, tmp_path: Path) -> None:
    pushed = json.loads(told("push", "legal", str(folder), "--json"))
    assert pushed.keys() == VERSION_KEYS
    assert (pushed["version"], pushed["kind"], pushed["create_time"]) == (1, "lora", "2027-01-15T08:00:01Z")

    assert json.loads(told("pull", "legal", str(tmp_path / "back"), "--json")) == pushed


def test_progress_is_drawn_on_a_terminals_stderr_alone(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "motley_client", "adapters", "push", "legal", str(folder)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment, check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert "sending" in drawn
    assert done.stdout.startswith("legal@1 sha256:")
    assert done.stdout.count("\n") == 1


@pytest.fixture
def two_versions(fake: FakeAdapterService) -> FakeAdapterService:
    """Keep legal, with two versions and two aliases, and poems, with one of each."""
    for text in (b"first", b"second"):
        version = fake.add("legal", {"adapter_config.json": text}, {"team": "search"})
        version.digest = f"sha256:{text.decode()}"
    fake.add("poems", FILES).digest = "sha256:poems"
    for name, alias, number in (("legal", "default", 1), ("legal", "default", 2), ("legal", "prod", 1)):
        fake.point(name, alias, number)
    fake.point("poems", "default", 1)
    fake.shared["legal"] = (adapter_pb2.VISIBILITY_TENANTS, ["bolt", "cord"])
    fake.versions["legal"][1].pinned = True
    fake.versions["legal"][1].residency = adapter_pb2.ADAPTER_RESIDENCY_DEVICE
    return fake


@pytest.mark.usefixtures("two_versions")
def test_list_prints_a_line_for_each_adapter() -> None:
    assert told("list").splitlines() == [
        "owner  name   latest  kind  created               visibility  aliases",
        "acme   legal  2       lora  2027-01-15T08:00:02Z  tenants     default=2 prod=1",
        "acme   poems  1       lora  2027-01-15T08:00:03Z  private     default=1",
    ]
    assert [line.split()[1] for line in told("list", "--filter", "name=poems").splitlines()] == ["name", "poems"]


def test_list_of_nothing_is_a_heading_and_an_empty_list() -> None:
    assert len(told("list").splitlines()) == 1
    assert json.loads(told("list", "--json")) == {"adapters": []}


@pytest.mark.usefixtures("two_versions")
def test_show_prints_the_version_that_is_meant_the_aliases_and_all_versions() -> None:
    assert told("show", "legal@prod").splitlines() == [
        "name          legal",
        "owner         acme",
        "visibility    tenants",
        "shared with   bolt cord",
        "version       1",
        "digest        sha256:first",
        "kind          lora",
        "state         ready",
        "residency     disk",
        "size bytes    5",
        "device bytes  4096",
        "ranks         4 in 1 modules, 8 in 2 modules",
        "trained on    undeclared",
        "serves on     undeclared",
        "labels        team=search",
        "created       2027-01-15T08:00:01Z",
        "created by    k0",
        "",
        "alias    version  previous  etag",
        "default  2        1         etag-2",
        "prod     1                  etag-1",
        "",
        "version  kind  state  residency          size bytes  created               digest",
        "2        lora  ready  device     pinned  6           2027-01-15T08:00:02Z  sha256:second",
        "1        lora  ready  disk               5           2027-01-15T08:00:01Z  sha256:first",
    ]


@pytest.mark.usefixtures("two_versions")
def test_show_and_list_print_json_with_exactly_these_keys() -> None:
    shown = json.loads(told("show", "legal@prod", "--json"))

    assert shown.keys() == {"adapter", "version", "versions"}
    assert shown["version"].keys() == VERSION_KEYS
    assert [one["version"] for one in shown["versions"]] == [2, 1]
    assert shown["version"].pop("ranks") == {"layers.0.q_proj": 8, "layers.1.q_proj": 8, "layers.0.k_proj": 4}
    assert shown["versions"][1] == shown["version"], "lists do not tell ranks"
    assert shown["adapter"]["latest"].pop("ranks")
    assert shown["adapter"] == {
        "owner": "acme",
        "name": "legal",
        "aliases": [
            {"name": "default", "version": 2, "previous_version": 1, "etag": "etag-2"},
            {"name": "prod", "version": 1, "previous_version": None, "etag": "etag-1"},
        ],
        "latest": shown["versions"][0],
        "visibility": "tenants",
        "shared_with": ["bolt", "cord"],
    }
    listed = json.loads(told("list", "--json"))["adapters"]
    assert listed[0] == shown["adapter"]


def test_aliases_move_roll_back_and_go(two_versions: FakeAdapterService) -> None:
    assert told("alias", "legal", "prod", "2", "--etag", "etag-1") == (
        "legal@prod is version 2, before it 1, etag etag-2\n"
    )
    assert told("rollback", "legal", "--alias", "prod") == "legal@prod is version 1, before it 2, etag etag-3\n"
    assert told("rollback", "legal") == "legal@default is version 1, before it 2, etag etag-3\n"
    assert told("alias", "legal", "prod", "--remove") == "removed legal@prod\n"
    assert set(two_versions.aliases["legal"]) == {"default"}
    assert told("alias", "legal", "new", "2", "--etag", "") == "legal@new is version 2, etag etag-1\n"

    stale = adapters("alias", "legal", "default", "2", "--etag", "etag-1")
    assert (stale.exit_code, stale.stderr) == (1, "error: ETAG_MISMATCH it is (ETAG_MISMATCH, field etag)\n")


def test_sharing_says_with_whom(two_versions: FakeAdapterService) -> None:
    assert told("share", "legal", "--with", "bolt", "--with", "cord") == "legal is shared with bolt cord\n"
    sent = two_versions.calls[-1][1]
    assert (sent.visibility, list(sent.tenants)) == (adapter_pb2.VISIBILITY_TENANTS, ["bolt", "cord"])
    assert told("share", "legal", "--public") == "legal is shared with everybody\n"
    assert told("share", "legal", "--private") == "legal is shared with nobody\n"
    assert two_versions.calls[-1][1].visibility == adapter_pb2.VISIBILITY_PRIVATE


@pytest.mark.usefixtures("two_versions")
def test_pins_name_the_version_that_is_meant() -> None:
    assert told("pin", "legal@prod") == "pinned legal@1\n"
    assert told("unpin", "legal") == "unpinned legal@2\n"


def test_pull_writes_the_files_and_overwrites_when_told_to(two_versions: FakeAdapterService, tmp_path: Path) -> None:
    target = tmp_path / "back"
    assert told("pull", "poems", str(target)) == f"poems@1 sha256:poems is in {target}\n"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES

    again = adapters("pull", "legal", str(target))
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr == f"error: {target / 'adapter_config.json'}: File exists (FILE_TROUBLE)\n"
    told("pull", "legal@1", str(target), "--overwrite")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"adapter_config.json": b"first"}


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_rm_asks_first_and_takes_no_for_an_answer(two_versions: FakeAdapterService, typed: str) -> None:
    result = adapters("rm", "legal", "1", typed=typed)

    assert (result.exit_code, two_versions.calls) == (1, [])
    assert "Delete legal@1?" in result.stderr
    assert "deleted" not in result.stdout


def test_rm_deletes_after_a_yes_and_says_how_long_to_wait(two_versions: FakeAdapterService) -> None:
    result = adapters("rm", "legal", "1", typed="y\n")
    assert result.exit_code == 0
    assert result.stdout.endswith("deleted legal@1 and freed 5 bytes\n")

    told("rm", "legal", "2", "--yes", "--wait", "0.5", "--force")
    sent = two_versions.calls[-1][1]
    assert (sent.version, sent.timeout, sent.force) == (2, Duration(nanos=500_000_000), True)
    assert two_versions.versions["legal"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "legal"],
        ["push", "legal", "x", "--kind", "dora"],
        ["push", "legal", "x", "--label", "team"],
        ["push", "legal", "x", "--label", "=search"],
        ["alias", "legal", "prod"],
        ["alias", "legal", "prod", "0"],
        ["alias", "legal", "prod", "1", "--remove"],
        ["share", "legal"],
        ["share", "legal", "--public", "--private"],
        ["share", "legal", "--public", "--with", "bolt"],
        ["rm", "legal"],
        ["rm", "legal", "0", "--yes"],
        ["rm", "legal", "default", "--yes"],
        ["rm", "legal", "1", "--yes", "--wait", "-1"],
        ["pull", "legal"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_sends_nothing(fake: FakeAdapterService, arguments: list[str]) -> None:
    result = adapters(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr
    assert fake.calls == []


def test_a_directory_that_is_no_adapter_is_told_in_one_line(fake: FakeAdapterService, tmp_path: Path) -> None:
    result = adapters("push", "legal", str(tmp_path / "none"))

    assert (result.exit_code, result.stdout, fake.calls) == (1, "", [])
    assert result.stderr.endswith("(NO_ADAPTER_FILES, field directory)\n")
    assert result.stderr.count("\n") == 1


COMMANDS = [
    ["push", "legal", "FOLDER"],
    ["list"],
    ["show", "legal"],
    ["alias", "legal", "new", "1"],
    ["alias", "legal", "default", "--remove"],
    ["rollback", "legal"],
    ["share", "legal", "--public"],
    ["pin", "legal"],
    ["unpin", "legal"],
    ["pull", "legal", "TARGET"],
    ["rm", "legal", "1", "--yes"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_sends_the_key_and_tells_a_refusal_in_one_line(
    fake: FakeAdapterService, command: list[str], folder: Path, tmp_path: Path
) -> None:
    fake.refusals.append(refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_LACKING"))
    places = {"FOLDER": str(folder), "TARGET": str(tmp_path / "target")}
    result = adapters(*(places.get(word, word) for word in command), "--key", "mk_a_b")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: ROLE_LACKING it is (ROLE_LACKING)\n"
    assert fake.credentials == ["Bearer mk_a_b"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_goes_by_tls_where_a_ca_file_says_so(
    two_versions: FakeAdapterService, command: list[str], folder: Path, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    places = {"FOLDER": str(folder), "TARGET": str(tmp_path / "target")}
    words = [places.get(word, word) for word in command]
    with serving_adapters(two_versions, certificates) as address:
        result = adapters(*words, "--server", address, "--ca-file", str(certificates.authority))

    assert (result.exit_code, result.stderr) == (0, "")
    assert two_versions.calls


def test_help_loads_no_grpc() -> None:
    code = (
        "import sys; from motley_client.cli import app\n"
        "try: app(['adapters', 'push', '--help'])\n"
        "except SystemExit: print('grpc' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.splitlines()[-1] == "False"
    assert "--label" in found.stdout
