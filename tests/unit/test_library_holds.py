"""Holds: a version is emptied before it is deleted, and nobody takes hold of one that is going."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from motley_server.errors import AbortedError, DeadlineExceededError, FailedPreconditionError, MotleyError
from motley_server.library import holds as holds_module
from motley_server.library.holds import Check, Hold, Holds, key_of
from motley_server.registry.records import AdapterVersion

A_WHILE = 0.02  # seconds


def version(number: int = 1, owner: str = "acme") -> AdapterVersion:
    return AdapterVersion(
        owner, "legal", number, f"sha256:{number:064x}", "lora", "undeclared", "undeclared", {}, 10, 10,
        f"sha256:{number:064x}", (), {}, "", datetime(2026, 1, 1, tzinfo=UTC), False,
    )  # fmt: skip


def hold(holds: Holds, number: int = 1) -> Hold:
    made = holds.hold(version(number))
    assert made is not None
    return made


async def fine() -> None:
    """Find nothing wrong."""


async def delete(
    holds: Holds, seconds: float = 5.0, *, force: bool = False, fails: bool = False, check: Check = fine
) -> None:
    async with holds.emptied(version(), seconds, check, force=force):
        if fails:
            raise RuntimeError("the database was away")


def test_a_deletion_waits_for_the_last_of_its_holders_and_for_nobody_else() -> None:
    async def scenario() -> None:
        holds = Holds()
        first, second, other = hold(holds), hold(holds), hold(holds, 2)
        deleting = asyncio.create_task(delete(holds))
        await asyncio.sleep(A_WHILE)
        first.release()
        await asyncio.sleep(A_WHILE)
        assert not deleting.done()
        assert holds.hold(version()) is None
        assert holds.bundles() == {version(1).bundle, version(2).bundle}
        second.release()
        await asyncio.wait_for(deleting, 1)
        assert holds.bundles() == {version(2).bundle}
        assert holds.hold(version(owner="zeta")) is not None
        other.release()

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", [True, False], ids=["the block fails", "it is held too long"])
def test_a_deletion_that_comes_to_nothing_leaves_the_version_as_it_was(fails: bool) -> None:
    async def scenario() -> None:
        holds = Holds()
        held = None if fails else hold(holds)
        with pytest.raises(RuntimeError if fails else DeadlineExceededError):
            await delete(holds, A_WHILE, fails=fails)
        assert not holds.is_deleting(key_of(version()))
        hold(holds).release()
        if held is not None:
            held.release()
        await delete(holds)

    asyncio.run(scenario())


def test_force_revokes_those_who_hold_it_until_all_have_let_go() -> None:
    async def scenario() -> None:
        holds = Holds()
        told: list[MotleyError] = []
        willing, deaf = hold(holds), hold(holds)

        def let_go(error: MotleyError) -> None:
            told.append(error)
            asyncio.get_running_loop().call_soon(willing.release)
            willing.on_revoked = None

        willing.on_revoked = let_go
        deleting = asyncio.create_task(delete(holds, 0.0, force=True))
        await asyncio.sleep(A_WHILE)
        assert [error.reason for error in told] == ["ADAPTER_DELETED"]
        assert not deleting.done()
        deaf.release()
        await asyncio.wait_for(deleting, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("force", [True, False])
def test_an_alias_that_is_pointed_at_the_version_ends_the_waiting_and_nobody_is_revoked(
    force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds_module, "LOOK_AGAIN_SECONDS", A_WHILE)

    async def pointed_at() -> None:
        raise FailedPreconditionError("prod points at it", reason="VERSION_HAS_ALIAS")

    async def scenario() -> None:
        holds = Holds()
        held = hold(holds)
        told: list[MotleyError] = []
        held.on_revoked = told.append
        with pytest.raises(FailedPreconditionError):
            await asyncio.wait_for(delete(holds, 0.0 if force else 60.0, force=force, check=pointed_at), 1)
        assert told == []
        assert not holds.is_deleting(key_of(version()))
        held.release()

    asyncio.run(scenario())


def test_whoever_does_not_let_go_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds_module, "LOOK_AGAIN_SECONDS", 0.001)

    async def scenario() -> None:
        holds = Holds()
        hold(holds)
        with pytest.raises(DeadlineExceededError):
            await asyncio.wait_for(delete(holds, 0.0, force=True), 1)
        assert not holds.is_deleting(key_of(version()))

    asyncio.run(scenario())


def test_one_deletion_at_a_time() -> None:
    async def scenario() -> None:
        holds = Holds()
        held = hold(holds)
        deleting = asyncio.create_task(delete(holds))
        await asyncio.sleep(A_WHILE)
        with pytest.raises(AbortedError) as caught:
            await delete(holds)
        assert caught.value.reason == "VERSION_BEING_DELETED"
        assert holds.is_deleting(key_of(version()))
        held.release()
        await deleting

    asyncio.run(scenario())


def test_a_deletion_whose_caller_leaves_is_as_if_it_had_not_been() -> None:
    async def scenario() -> None:
        holds = Holds()
        held = hold(holds)
        deleting = asyncio.create_task(delete(holds))
        await asyncio.sleep(A_WHILE)
        deleting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deleting
        assert holds.hold(version()) is not None
        held.release()

    asyncio.run(scenario())
