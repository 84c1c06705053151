"""The check of a spec for GOAT: what can be followed, and each refusal by the field's path."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from motley.v1 import training_pb2 as pb
from motley_server.errors import InvalidArgumentError
from motley_server.rpc.convert_training import text_of
from motley_server.rpc.training_spec import check_spec
from motley_trainer.errors import SettingsError
from motley_trainer.spec.reading import read_spec
from rpc_harness import make_base
from training_calls import spec_with

BASE = make_base()
ALPHA, TOTAL = pb.GOAT_SCALE_ALPHA, pb.GOAT_SCALE_RANK_TOTAL


def goat_with(**settings: Any) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_GOAT, goat=pb.GoatSettings(**settings))


GOOD: dict[str, pb.TrainingSpec] = {
    "GOAT as it comes": goat_with(),
    "GOAT without settings": spec_with(method=pb.TRAINING_METHOD_GOAT),
    "an expert": goat_with(experts=1),
    "as many experts for a token as there are": goat_with(rank=8, experts=4, top_k=4),
    "experts as wide as their segments": goat_with(rank=16, experts=8, target_modules=["q_proj"]),
    "a scale by theory": goat_with(scale=pb.GOAT_SCALE_THEORETICAL, eta=0.1, rank_for_scale=TOTAL),
    "a scale by alpha": goat_with(scale=ALPHA, alpha=16.0),
    "experts without balance": goat_with(balance_loss=0.0, dropout=0.0, rho=1e-3),
}


@pytest.mark.parametrize("name", GOOD)
def test_settings_that_can_be_followed_are_let_through(name: str) -> None:
    assert check_spec(GOOD[name], BASE) == "goat"
    assert read_spec(json.loads(text_of(GOOD[name]))).method == "goat", "a worker reads it too"


BAD: dict[str, tuple[pb.TrainingSpec, str, str]] = {
    "no experts": (goat_with(experts=0), "OUT_OF_RANGE", "goat.experts"),
    "fewer ranks than experts": (goat_with(rank=4), "RANK_TOO_SMALL", "goat.rank"),
    "more experts than ranks": (goat_with(experts=16), "RANK_TOO_SMALL", "goat.rank"),
    "ranks that cannot be shared": (goat_with(experts=3), "RANK_NOT_DIVISIBLE", "goat.rank"),
    "no expert for a token": (goat_with(top_k=0), "OUT_OF_RANGE", "goat.top_k"),
    "more experts for a token than there are": (goat_with(rank=4, experts=4, top_k=5), "OUT_OF_RANGE", "goat.top_k"),
    "experts wider than their segments": (goat_with(rank=16), "RANK_TOO_LARGE", "goat.rank"),
    "experts wider than a target's segments": (
        goat_with(rank=24, target_modules=["q_proj"]), "RANK_TOO_LARGE", "goat.rank",
    ),
    "experts of nobody": (goat_with(target_modules=["q_proj", "query"]), "UNKNOWN_TARGET", "goat.target_modules[1]"),
    "experts without end": (goat_with(target_modules=["q_proj"] * 1025), "OUT_OF_RANGE", "goat.target_modules"),
    "rho 0": (goat_with(rho=0.0), "OUT_OF_RANGE", "goat.rho"),
    "rho of infinity": (goat_with(rho=math.inf), "OUT_OF_RANGE", "goat.rho"),
    "rho that no file may have": (goat_with(rho=1e-35), "OUT_OF_RANGE", "goat.rho"),
    "eta that makes a scale that no file may have": (goat_with(eta=1e-70), "OUT_OF_RANGE", "goat.eta"),
    "alpha of a scale that no file may have": (goat_with(scale=ALPHA, alpha=1e-35), "OUT_OF_RANGE", "goat.alpha"),
    "eta 0": (goat_with(eta=0.0), "OUT_OF_RANGE", "goat.eta"),
    "a negative balance": (goat_with(balance_loss=-1e-9), "OUT_OF_RANGE", "goat.balance_loss"),
    "experts that drop all": (goat_with(dropout=1.0), "OUT_OF_RANGE", "goat.dropout"),
    "alpha for the scale by theory": (goat_with(alpha=16.0), "SETTING_NOT_USED", "goat.alpha"),
    "eta for the scale by alpha": (goat_with(scale=ALPHA, eta=1.0), "SETTING_NOT_USED", "goat.eta"),
    "a rank for the scale by alpha": (
        goat_with(scale=ALPHA, rank_for_scale=TOTAL), "SETTING_NOT_USED", "goat.rank_for_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_followed_are_refused_by_the_fields_path(name: str) -> None:
    spec, reason, field = BAD[name]
    with pytest.raises(InvalidArgumentError) as caught:
        check_spec(spec, BASE)
    assert (caught.value.reason, caught.value.field) == (reason, f"spec.{field}")
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", [name for name in BAD if "no file may have" in name])
def test_a_worker_refuses_what_no_file_may_have_too(name: str) -> None:
    spec, _, field = BAD[name]
    with pytest.raises(SettingsError) as caught:
        read_spec(json.loads(text_of(spec)))
    assert (caught.value.reason, caught.value.field) == ("BAD_SPEC", field)


def test_goat_takes_any_linears_and_a_base_that_is_pruned() -> None:
    assert check_spec(goat_with(target_modules=["lm_head"]), BASE) == "goat"
    assert check_spec(goat_with(), replace(BASE, pruned_from="sha256:" + "a" * 64)) == "goat"
