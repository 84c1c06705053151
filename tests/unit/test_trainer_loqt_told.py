"""What LoQT tells of its merges: each at least once, with a digest of all that was until then."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.methods.loqt import Merge, merges_to_json
from small_loqts import SmallLoqt


def test_the_digest_changes_at_every_merge_and_each_is_told_once(tmp_path: Path) -> None:
    small = SmallLoqt.of("nf4")
    small.training = {"steps": 13, "checkpoint_steps": 5}
    small.train(tmp_path)
    told = [event["merges"]["merges"] for event in small.events if "merges" in event]
    assert [[merge["step"] for merge in merges] for merges in told] == [[2, 4], [6, 8], [10, 12]]
    digests = [merge["digest"] for merges in told for merge in merges]
    assert len(set(digests)) == 6
    assert digests == [merge.digest for merge in small.attached.merges]
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


@pytest.mark.parametrize("stops", [0, 1, 3])
def test_merges_that_were_not_told_when_their_checkpoint_was_saved_are_told_again(
    tmp_path: Path, stops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a checkpoint was saved and before a word of it was told, and begun again."""
    real, saved = Checkpoints.save, []

    def save(self: Checkpoints, checkpoint: Any) -> None:
        real(self, checkpoint)
        saved.append(checkpoint.step)
        if len(saved) == stops:
            raise KeyboardInterrupt

    told: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save)
        for _ in range(1 + (stops > 0)):
            small = SmallLoqt.of("nf4")
            small.training = {"steps": 13, "checkpoint_steps": 5}
            with suppress(KeyboardInterrupt):
                small.train(tmp_path)
            told += [merge for event in small.events if "merges" in event for merge in event["merges"]["merges"]]
    assert told == merges_to_json(small.attached.merges)
    assert [merge["step"] for merge in told] == [2, 4, 6, 8, 10, 12]


def test_a_digest_covers_all_digests_before_it_and_what_training_began_from() -> None:
    found = {}
    for original in (None, "sha256:a", "sha256:b"):
        small = SmallLoqt.of("nf4")
        small.original = original
        deque(small.steps(5), maxlen=0)
        found[original] = [merge.digest for merge in small.attached.merges]
    for merge in range(2):  # the weights are the same
        assert len({digests[merge] for digests in found.values()}) == 3
    now = small.attached._digest()
    assert now == small.attached._digest()
    small.attached.merges[-1] = Merge(4, "sha256:another")
    assert now != small.attached._digest()
