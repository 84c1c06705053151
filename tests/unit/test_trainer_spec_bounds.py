"""What a server lets through by its numbers, and no more, the trainer takes."""

from __future__ import annotations

from typing import Any

import pytest
from motley_server.rpc import training_bounds
from motley_trainer.errors import SettingsError
from motley_trainer.spec import bounds
from motley_trainer.spec.reading import read_spec

MOST = {path: most.most for path, most in training_bounds.BOUNDS.items() if most.most <= training_bounds.MAX_STEPS}
OTHERS = {
    "loram": {"loram.alignment.dataset": f"sha256:{'1' * 64}"},
    "goat": {"goat.experts": 4096, "goat.rank": 4096, "goat.top_k": 1},
}


def spec_with(path: str, value: float) -> dict[str, Any]:
    """Return a spec that says this and what goes with it."""
    method = path.partition(".")[0]
    method = method if method in ("s2ft", "goat", "loram", "loqt") else "lora"
    spec: dict[str, Any] = {"method": f"TRAINING_METHOD_{method.upper()}", "dataset": f"sha256:{'0' * 64}"}
    said = dict(OTHERS.get(method, {})) if method == "goat" or "alignment" in path else {}
    for name, one in (said | {path: value}).items():
        *holders, field = name.split(".")
        place = spec
        for holder in holders:
            place = place.setdefault(holder, {})
        place[field] = one
    return spec


@pytest.mark.parametrize("path", MOST)
def test_a_number_beyond_the_servers_bound_is_refused(path: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_spec(spec_with(path, MOST[path] + 1))
    assert (caught.value.reason, caught.value.field) == ("BAD_SPEC", path)


@pytest.mark.parametrize("name", ["MAX_RANK", "MAX_STEPS", "MAX_BATCH", "MAX_SAMPLES", "MAX_GROWTH"])
def test_the_bounds_are_the_servers(name: str) -> None:
    assert getattr(bounds, name) == getattr(training_bounds, name)
