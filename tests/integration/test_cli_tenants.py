"""`motley tenants` and `motley tenants keys` against a service in memory: what is sent, printed and asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from certificates import make_certificates
from fake_tenant_service import FakeTenantService, refusal, serving_tenants
from motley.v1 import tenant_pb2
from motley_client.cli import app
from typer.testing import CliRunner, Result

QUOTA_FLAGS = {
    "--adapters": 5,
    "--adapter-bytes": 2**40,
    "--requests-in-flight": 0,
    "--requests-per-minute": 60,
    "--tokens-per-minute": 100_000,
    "--training-jobs": 1,
    "--weight": 0.5,
}
QUOTA = {flag.removeprefix("--").replace("-", "_"): value for flag, value in QUOTA_FLAGS.items()}
EVERY_QUOTA = [word for flag, value in QUOTA_FLAGS.items() for word in (flag, str(value))]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTenantService]:
    """Serve tenants at the address that the environment names, and hide this machine's settings."""
    fake = FakeTenantService()
    with serving_tenants(fake) as address:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


def tenants(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["tenants", *arguments], input=typed)


def told(*arguments: str) -> str:
    """Return what a command prints that has nothing to complain about."""
    result = tenants(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_create_sends_every_quota_and_shows_the_tenant(fake: FakeTenantService) -> None:
    printed = told("create", "acme", "--display-name", "Acme & Sons", *EVERY_QUOTA)

    sent = fake.calls[0][1]
    assert (sent.id, sent.display_name) == ("acme", "Acme & Sons")
    assert {field.name: value for field, value in sent.quota.ListFields()} == QUOTA
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert rows == {
        "id": "acme",
        "display_name": "Acme & Sons",
        "create_time": "2027-01-15T08:00:01Z",
        "etag": "etag-1",
        **{name: str(value) for name, value in QUOTA.items()},
    }


def test_a_limit_that_is_not_named_is_not_sent_and_shown_as_none(fake: FakeTenantService) -> None:
    printed = told("create", "acme")

    assert fake.calls[0][1].quota.ListFields() == []
    assert re.search(r"^tokens_per_minute +no limit$", printed, re.MULTILINE)
    assert re.search(r"^weight +1\.0$", printed, re.MULTILINE)


def test_show_and_list_print_json_with_exactly_these_keys() -> None:
    told("create", "acme", "--display-name", "Acme", "--adapters", "5")
    told("create", "bolt")
    told("create", "cord")

    shown = json.loads(told("show", "acme", "--json"))
    assert shown == {
        "id": "acme",
        "display_name": "Acme",
        "quota": {**dict.fromkeys(QUOTA), "adapters": 5, "weight": 1.0},
        "create_time": "2027-01-15T08:00:01Z",
        "etag": "etag-1",
    }
    listed = json.loads(told("list", "--json"))
    assert [one["id"] for one in listed["tenants"]] == ["acme", "bolt", "cord"]
    assert listed["tenants"][0] == shown


def test_show_and_list_print_the_same_for_people() -> None:
    told("create", "acme", "--display-name", "Acme", "--adapters", "5")
    told("create", "a-tenant-with-a-long-name")

    assert told("show", "acme").splitlines()[0].split() == ["id", "acme"]
    assert told("list").splitlines() == [
        "id                         display name  created               quota",
        "a-tenant-with-a-long-name                2027-01-15T08:00:02Z  weight=1.0",
        "acme                       Acme          2027-01-15T08:00:01Z  adapters=5 weight=1.0",
    ]


def test_update_changes_what_is_named_and_leaves_the_rest(fake: FakeTenantService) -> None:
    told("create", "acme", "--display-name", "Acme", "--adapters", "5")
    told("update", "acme", "--requests-per-minute", "60", "--etag", "etag-1")

    sent = fake.calls[-1][1]
    assert not sent.HasField("display_name")
    assert [(field.name, value) for field, value in sent.quota.ListFields()] == [("requests_per_minute", 60)]
    shown = json.loads(told("show", "acme", "--json"))
    assert (shown["display_name"], shown["quota"]["adapters"], shown["quota"]["requests_per_minute"]) == ("Acme", 5, 60)

    stale = tenants("update", "acme", "--adapters", "6", "--etag", "etag-1")
    assert (stale.exit_code, stale.stderr) == (1, "error: ETAG_MISMATCH it is (ETAG_MISMATCH, field etag)\n")


@pytest.mark.parametrize("spelling", [("tokens-per-minute", "adapter-bytes"), ("tokens_per_minute", "adapter_bytes")])
def test_update_lifts_the_limits_that_are_named(fake: FakeTenantService, spelling: tuple[str, str]) -> None:
    told("create", "acme", *EVERY_QUOTA)
    told("update", "acme", "--lift", spelling[0], "--lift", spelling[1], "--adapters", "9")

    assert list(fake.calls[-1][1].lift) == ["tokens_per_minute", "adapter_bytes"]
    quota = json.loads(told("show", "acme", "--json"))["quota"]
    assert quota == QUOTA | {"tokens_per_minute": None, "adapter_bytes": None, "adapters": 9}


def test_lifting_what_is_no_quota_is_wrong_usage_and_names_those_that_are(fake: FakeTenantService) -> None:
    result = tenants("update", "acme", "--lift", "tokens")

    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert "'tokens' is no quota" in result.stderr
    assert "tokens-per-minute" in result.stderr


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_delete_asks_first_and_takes_no_for_an_answer(fake: FakeTenantService, typed: str) -> None:
    told("create", "acme")
    result = tenants("delete", "acme", typed=typed)

    assert result.exit_code == 1
    assert "Delete tenant acme?" in result.stderr
    assert "deleted" not in result.stdout
    assert [name for name, _ in fake.calls] == ["CreateTenant"]


@pytest.mark.parametrize(("flags", "typed"), [([], "y\n"), (["--yes"], None), (["-y"], None)])
def test_delete_goes_on_after_a_yes(fake: FakeTenantService, flags: list[str], typed: str | None) -> None:
    told("create", "acme")
    result = tenants("delete", "acme", *flags, typed=typed)

    assert result.exit_code == 0
    assert result.stdout.endswith("deleted tenant acme\n")
    assert ("Delete tenant acme?" in result.stderr) is not bool(flags)
    assert fake.tenants == {}


def test_a_new_keys_secret_stands_alone_on_stdout_and_is_said_to_be_shown_once() -> None:
    told("create", "acme")
    result = tenants("keys", "create", "acme", "--role", "publisher")

    assert (result.exit_code, result.stdout) == (0, "mk_k0_hush\n")
    assert result.stderr == (
        "key k0 of tenant acme, role publisher, works until it is revoked\n"
        "keep its secret now: nobody can show it again\n"
    )
    assert "hush" not in told("keys", "list", "acme") + told("keys", "list", "acme", "--json")


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("90m", timedelta(minutes=90)),
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("8w", timedelta(weeks=8)),
    ],
)
def test_a_key_expires_as_far_ahead_as_was_said(fake: FakeTenantService, text: str, ahead: timedelta) -> None:
    told("create", "acme")
    before = datetime.now(UTC)
    made = json.loads(told("keys", "create", "acme", "--expires", text, "--json"))
    after = datetime.now(UTC)

    sent = fake.calls[-1][1]
    assert before + ahead <= sent.expire_time.ToDatetime(UTC) <= after + ahead
    assert sent.role == tenant_pb2.ROLE_USER
    assert made["secret"] == "mk_k0_hush"
    assert made["key"]["expire_time"] == sent.expire_time.ToDatetime(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_keys_are_listed_and_revoked() -> None:
    told("create", "acme")
    for role in ("user", "worker", "admin"):
        tenants("keys", "create", "acme", "--role", role)
    assert told("keys", "revoke", "k1") == "revoked key k1 of tenant acme\n"

    listed = json.loads(told("keys", "list", "acme", "--json"))["keys"]
    assert [(one["id"], one["role"], one["revoke_time"]) for one in listed] == [
        ("k0", "user", None),
        ("k1", "worker", "2027-01-15T08:00:05Z"),
        ("k2", "admin", None),
    ]
    assert set(listed[0]) == {"id", "tenant_id", "role", "create_time", "expire_time", "revoke_time"}
    assert told("keys", "list", "acme").splitlines()[:2] == [
        "id  role    created               expires  revoked",
        "k0  user    2027-01-15T08:00:02Z",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "acme", "--adapters", "many"],
        ["update", "acme"],
        ["update", "acme", "--etag", "etag-1"],
        ["delete"],
        ["list", "--no-such-flag"],
        ["keys", "create", "acme", "--role", "king"],
        *(["keys", "create", "acme", "--expires", text] for text in ("0d", "30", "-1d", "1y", "99999999d", "999999w")),
        ["keys", "revoke"],
        ["keys", "no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_sends_nothing(fake: FakeTenantService, arguments: list[str]) -> None:
    result = tenants(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr
    assert fake.calls == []


COMMANDS = [
    ["create", "acme"],
    ["list"],
    ["show", "acme"],
    ["update", "acme", "--adapters", "1"],
    ["delete", "acme", "--yes"],
    ["keys", "create", "acme"],
    ["keys", "list", "acme"],
    ["keys", "revoke", "k0"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_sends_the_key_and_tells_a_refusal_in_one_line(
    fake: FakeTenantService, command: list[str]
) -> None:
    fake.refusals.append(refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_LACKING"))
    result = tenants(*command, "--key", "mk_a_b")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: ROLE_LACKING it is (ROLE_LACKING)\n"
    assert fake.credentials == ["Bearer mk_a_b"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_goes_by_tls_where_a_ca_file_says_so(command: list[str], tmp_path: Path) -> None:
    fake, certificates = FakeTenantService(), make_certificates(tmp_path)
    fake.tenants["acme"] = tenant_pb2.Tenant(id="acme", etag="etag-1")
    fake.keys["k0"] = tenant_pb2.Key(id="k0", tenant_id="acme")
    if command[0] == "create":
        fake.tenants.clear()
    with serving_tenants(fake, certificates) as address:
        result = tenants(*command, "--server", address, "--ca-file", str(certificates.authority))

    assert (result.exit_code, len(fake.calls)) == (0, 1)


def test_a_ca_file_without_a_certificate_is_wrong_usage(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()
    result = tenants("list", "--ca-file", str(ca_file))

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: the CA file {ca_file} holds no certificate in PEM (BAD_SETTING, field ca_file)\n"


def test_help_loads_no_grpc() -> None:
    code = (
        "import sys; from motley_client.cli import app\n"
        "try: app(['tenants', 'keys', 'create', '--help'])\n"
        "except SystemExit: print('grpc' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.splitlines()[-1] == "False"
    assert "--expires" in found.stdout
