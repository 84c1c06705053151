"""The registry through crashes: its process dies at every point of its work, and what it said holds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import registry_crash
from dying_registry import KILLED, POWER_AND_NAMES_LOST, POWER_LOST

LEAST_POINTS = {KILLED: 70, POWER_LOST: 50, POWER_AND_NAMES_LOST: 50}
LEAST_OF_ALL = {KILLED: 180, POWER_LOST: 120, POWER_AND_NAMES_LOST: 120}
WAYS = pytest.mark.parametrize("way", [KILLED, POWER_LOST, POWER_AND_NAMES_LOST])


@WAYS
def test_dead_at_each_change_what_was_acknowledged_is_whole_and_nothing_else_stays(way: str) -> None:
    check_deaths(way, LEAST_POINTS[way])


@pytest.mark.soak
@WAYS
def test_dead_at_every_point_what_was_acknowledged_is_whole_and_nothing_else_stays(way: str) -> None:
    check_deaths(way, LEAST_OF_ALL[way], "thorough")


def check_deaths(way: str, least: int, *flags: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, registry_crash.__file__, way, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["failures"] == []
    points = [(act, change.split()[0]) for act, change in told["points"]]
    assert len(points) >= least
    assert {act for act, _ in points} == set(told["acts"])
    kinds = {change for _, change in points}
    assert kinds == {"make_folder", "make_file", "write", "fsync", "rename", "remove", "before", "after"}
