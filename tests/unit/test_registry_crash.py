"""The registry through crashes: its process dies at every point of its work, and what it said holds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import registry_crash
from dying_registry import KILLED, POWER_AND_NAMES_LOST, POWER_LOST

LEAST_POINTS = {KILLED: 180, POWER_LOST: 120, POWER_AND_NAMES_LOST: 120}


@pytest.mark.parametrize("way", [KILLED, POWER_LOST, POWER_AND_NAMES_LOST])
def test_dead_at_every_point_what_was_acknowledged_is_whole_and_nothing_else_stays(way: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, registry_crash.__file__, way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["failures"] == []
    points = [(act, change.split()[0]) for act, change in told["points"]]
    assert len(points) >= LEAST_POINTS[way]
    assert {act for act, _ in points} == set(told["acts"])
    kinds = {change for _, change in points}
    assert kinds == {"make_folder", "make_file", "write", "fsync", "rename", "remove", "before", "after"}
