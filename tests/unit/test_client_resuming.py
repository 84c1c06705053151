"""Which failures of a transfer are tried again, after how long, and when it is given up."""

from __future__ import annotations

import pytest
from motley_client import (
    AbortedError,
    CancelledRequestError,
    DeadlineExceededError,
    InternalError,
    MotleyClientError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
    resuming,
)


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (UnavailableError("Socket closed", reason="UNREACHABLE"), True),
        (UnavailableError("draining", reason="DRAINING"), True),
        (InternalError("Received RST_STREAM with error code 2", reason="INTERNAL"), True),
        (CancelledRequestError("Received RST_STREAM with error code 8", reason="CANCELLED"), True),
        (OutOfRangeError("a gap", reason="UPLOAD_OFFSET"), True),
        (OutOfRangeError("past the end", reason="UPLOAD_PAST_END"), False),
        (CancelledRequestError("Channel closed!", reason="CANCELLED"), False),
        (InternalError("a fault", reason="ENGINE_FAILED"), False),
        (NotFoundError("another stream finished it", reason="UPLOAD_NOT_FOUND"), True),
        (NotFoundError("another stream finished it", reason="DATASET_NOT_FOUND"), True),
        (NotFoundError("no such name", reason="ADAPTER_NOT_FOUND"), False),
        (AbortedError("somebody was faster", reason="ETAG_MISMATCH"), False),
        (DeadlineExceededError("late", reason="DEADLINE_EXCEEDED"), False),
    ],
    ids=str,
)
def test_only_a_way_that_broke_is_tried_again(error: MotleyClientError, is_retried: bool) -> None:
    assert resuming.Resuming(None).pause_after(error) == (resuming.FIRST_PAUSE_SECONDS if is_retried else None)


def test_pauses_double_until_their_bound_and_begin_anew_with_progress() -> None:
    attempts, error = resuming.Resuming(None), UnavailableError("Socket closed", reason="UNREACHABLE")
    pauses = [attempts.pause_after(error) for _ in range(7)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    attempts.reached(5)
    assert attempts.pause_after(error) == 0.1
    attempts.reached(5)
    assert attempts.pause_after(error) == 0.2, "no further than before is no progress"


def test_a_server_that_says_when_to_come_back_is_believed() -> None:
    error = UnavailableError("draining", reason="DRAINING", retry_after_seconds=7.0)

    assert resuming.Resuming(None).pause_after(error) == 7.0
    assert resuming.Resuming(6.9).pause_after(error) is None, "it would be too late then"


def test_patience_counts_from_when_a_server_that_answered_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now)
    attempts, error = resuming.Resuming(None, 10.0), UnavailableError("Socket closed", reason="UNREACHABLE")
    assert attempts.pause_after(error) is None, "nobody answered yet"

    attempts.answered()
    now += 100  # of silence, in which nothing broke
    pauses = [attempts.pause_after(error) for _ in range(2000)]
    assert pauses[0] is not None
    assert pauses[-1] == resuming.LAST_PAUSE_SECONDS
    now += 9.9
    assert attempts.pause_after(error) is not None
    attempts.answered()
    now += 9.9
    assert attempts.pause_after(error) is not None
    now += 10.0
    assert attempts.pause_after(error) is None


def test_patience_is_no_reason_to_ask_again_after_an_answer_or_past_the_timeout() -> None:
    attempts = resuming.Resuming(5.0, 600.0)
    attempts.answered()
    assert attempts.pause_after(NotFoundError("no such job", reason="JOB_NOT_FOUND")) is None
    assert attempts.pause_after(UnavailableError("draining", reason="DRAINING", retry_after_seconds=6.0)) is None
