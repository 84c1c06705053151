"""What GOAT tells and writes: shares, checkpoints that a training goes on from, adapters; and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import FINGERPRINT, spec_of
from applied_adapters import applied
from architectures import build_checkpoint
from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.export import export_s2ft_as_lora
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_model
from motley_trainer.errors import SettingsError
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.methods import goat
from motley_trainer.spec.settings import GoatScale, GoatScaleRank, GoatSegments, GoatSettings
from small_goats import SETTINGS, attach, disturb, goats, logits, small_model, trained_on
from small_trainings import SmallTraining, random_data, stop_after

CPU = torch.device("cpu")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen2", tmp_path_factory.mktemp("base"))  # whose q, k and v have biases


# --- What is told

GOAT_TRAINING: dict[str, Any] = {"settings": replace(SETTINGS, target_modules=("q_proj", "down_proj")), "seed": 4}


def routing(events: list[Mapping[str, object]]) -> list[dict[str, list[float]]]:
    told = [event["routing"] for event in events if "routing" in event]
    return [{path: body["shares"] for path, body in one["modules"].items()} for one in told]  # type: ignore[index]


def test_each_checkpoint_tells_the_shares_since_the_last_and_the_adapter_all(tmp_path: Path) -> None:
    training = SmallTraining.of(**GOAT_TRAINING, steps=6, checkpoint_steps=4)
    num_tokens = [sum(batch.num_tokens for batch in random_data().step(step, 4, 4)) for step in range(6)]
    checkpoint = training.train(tmp_path)
    first, second = routing(training.events)
    assert (
        set(first) == set(second) == {path for path in training.base.linears if path.endswith(("q_proj", "down_proj"))}
    )
    assert first != second
    for shares in (*first.values(), *second.values()):
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    whole = training.attached.facts()
    assert whole["num_routed_tokens"] == sum(num_tokens)
    early = sum(num_tokens[:4]) / sum(num_tokens)
    for path, shares in whole["expert_shares"].items():  # type: ignore[attr-defined]
        mixed = [early * a + (1 - early) * b for a, b in zip(first[path], second[path], strict=True)]
        assert shares == pytest.approx(mixed, abs=1e-5)
    assert torch.equal(checkpoint.tensors["buffer.picks"].sum(1), torch.full((6,), 2 * sum(num_tokens)))


# --- Stopped and begun again


def test_a_training_that_was_stopped_gives_the_bits_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SmallTraining.of(**GOAT_TRAINING, steps=7)
    whole.train(tmp_path / "whole")
    wanted = whole.attached.write(tmp_path / "wanted", {})
    first = SmallTraining.of(**GOAT_TRAINING, steps=7)
    with pytest.raises(JobCancelledError):
        first.train(tmp_path / "parts", stop_after(3))

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a checkpoint has what the spectrum was taken for")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    second = SmallTraining.of(**GOAT_TRAINING, steps=7)
    second.train(tmp_path / "parts")
    assert second.attached.write(tmp_path / "found", {}) == wanted
    for path in (tmp_path / "wanted").iterdir():
        assert (tmp_path / "found" / path.name).read_bytes() == path.read_bytes(), path.name
    assert [event["checkpoint_step"] for event in second.events if "checkpoint_step" in event] == [4, 7]
    assert float(next(iter(whole.attached.parameters.values())).detach().abs().sum()) > 0


def test_micro_batches_even_out_each_of_them(tmp_path: Path) -> None:
    """Their losses count by the share of the samples; of one batch the loss is another, but of the same size."""
    extras = {}
    for size in (4, 2):
        training = SmallTraining.of(**GOAT_TRAINING, steps=1, micro_batch_size=size)
        attached = training.attach()
        batches = training.data.step(0, 4, size)
        found = [trained_on(training.model, attached, batch) for batch in batches]
        extras[size] = [float(extra.detach()) for extra in found if extra is not None]
    assert [len(found) for found in extras.values()] == [1, 2]
    assert sum(extras[2]) / 2 == pytest.approx(extras[4][0], rel=0.2)
    assert sum(extras[2]) / 2 != extras[4][0]


# --- What is written


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_what_is_written_gives_the_logits_that_were_trained(checkpoint: Path, tmp_path: Path, method: str) -> None:
    model, plain = (load_model(checkpoint, torch.float32, CPU, method) for _ in range(2))
    attached = attach(model, quantization=method)
    disturb(attached)
    digest = attached.write(tmp_path / "out", {"job": "job-1"})
    expected = logits(model)
    assert (expected - logits(plain)).abs().max() > 0.1
    adapter = read_adapter(tmp_path / "out", spec_of(plain))
    assert adapter.spec.digest == digest
    with applied(plain, (adapter, 1.0)):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_two_scales_and_seeds_share_one_residual(tmp_path: Path) -> None:
    residuals, scales, files = [], [], []
    for place, (settings, seed) in enumerate(
        (
            (SETTINGS, 0),
            (replace(SETTINGS, eta=0.1, rank_for_scale=GoatScaleRank.TOTAL), 1),
            (replace(SETTINGS, scale=GoatScale.ALPHA, alpha=6.0), 2),
            (replace(SETTINGS, segments=GoatSegments.MINI), 0),
        )
    ):
        model = small_model()
        attached = attach(model, settings, seed=seed)
        disturb(attached, seed)
        attached.write(tmp_path / str(place), {})
        adapter = read_adapter(tmp_path / str(place), spec_of(small_model()))
        residuals.append(adapter.spec.shared)
        scales.append(tuple(goat.scale for goat in goats(model).values()))
        (file,) = (tmp_path / str(place)).glob("*residual*")
        files.append(file.read_bytes())
    assert residuals[0] == residuals[1] == residuals[2] != residuals[3]
    assert files[0] == files[1] == files[2] != files[3]
    assert len(set(scales)) == 3


def test_random_segments_share_a_residual_by_their_seed(tmp_path: Path) -> None:
    residuals = []
    for place, seed in enumerate((1, 1, 2)):
        attached = attach(small_model(), replace(SETTINGS, segments=GoatSegments.RANDOM), seed=seed)
        attached.write(tmp_path / str(place), {})
        residuals.append(read_adapter(tmp_path / str(place), spec_of(small_model())).spec.shared)
    assert residuals[0] == residuals[1] != residuals[2]


@pytest.mark.parametrize("scale", list(GoatScale))
def test_the_manifest_says_the_geometry_the_scale_and_how_it_was_made(tmp_path: Path, scale: GoatScale) -> None:
    attached = attach(small_model(), replace(SETTINGS, target_modules=("q_proj",), scale=scale, alpha=6.0))
    digest = attached.write(tmp_path, {"job": "job-1"})
    manifest = json.loads((tmp_path / "motley_manifest.json").read_text())
    assert (manifest["kind"], manifest["digest"]) == ("goat", digest)
    assert manifest["trained_on"] == manifest["serves_on"] == FINGERPRINT
    goat = manifest["goat"]
    assert (goat["experts"], goat["top_k"], goat["rank"], goat["rho"], goat["segments"]) == (4, 2, 8, 10.0, "head")
    if scale is GoatScale.THEORETICAL:
        assert (goat["eta"], goat["rank_for_scale"]) == (1.0, "expert")
        assert list(goat["scales"].values()) == pytest.approx([math.sqrt(3 * 64 / 2)] * 3)
    else:
        assert "eta" not in goat
        assert list(goat["scales"].values()) == [3.0] * 3
    num_of_experts, num_of_routers = 3 * 8 * (64 + 64), 3 * 4 * 64
    assert manifest["provenance"] == {
        "job": "job-1",
        "num_trained_parameters": num_of_experts + num_of_routers,
        "num_expert_parameters": num_of_experts,
        "num_router_parameters": num_of_routers,
        "num_modules": 3,
        "spectrum": "float32 SVD of the float32 weights",
        "num_routed_tokens": 0,
        "expert_shares": {},
    }


def test_of_too_many_experts_the_manifest_has_how_even_each_linear_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SmallTraining.of(**GOAT_TRAINING, steps=1)
    training.train(tmp_path / "checkpoints")
    shares: Mapping[str, list[float]] = training.attached.facts()["expert_shares"]  # type: ignore[assignment]
    assert len(shares) == 6
    monkeypatch.setattr(goat, "_MAX_SHARES", 6 * 4 - 1)
    facts = training.attached.facts()
    assert "expert_shares" not in facts
    wanted = {
        path: {"least": min(of), "greatest": max(of), "effective": round(1 / sum(s * s for s in of), 3)}
        for path, of in shares.items()
    }
    assert facts["expert_spread"] == wanted


def test_linears_whose_experts_stay_at_zero_are_told(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_parameter(f"{Q0}.weight").zero_()
    attached = attach(model, replace(SETTINGS, target_modules=("q_proj",)))
    assert attached.facts()["num_modules_without_spectrum"] == 1
    attached.write(tmp_path, {})
    assert json.loads((tmp_path / "motley_manifest.json").read_text())["provenance"]["num_modules_without_spectrum"]


def test_it_is_of_one_base_and_cannot_be_merged(tmp_path: Path) -> None:
    model = small_model()
    attach(model, replace(SETTINGS, target_modules=("q_proj",))).write(tmp_path / "goat", {})
    base = spec_of(small_model())
    with pytest.raises(AdapterMismatchError):
        read_adapter(tmp_path / "goat", replace(base, fingerprint=f"sha256:{'1' * 64}"))
    with pytest.raises(AdapterFormatError) as caught:
        export_s2ft_as_lora(tmp_path / "goat", tmp_path / "lora", base)
    assert caught.value.reason == "UNSUPPORTED_KIND"


# --- Refused


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        (GoatSettings(rank=40, experts=8), "RANK_TOO_LARGE", "goat.rank"),  # k_proj has 32 outputs
        (GoatSettings(target_modules=("c_attn",)), "NO_SUCH_MODULE", "goat.target_modules"),
        (GoatSettings(target_modules=("embed_tokens",)), "NO_SUCH_MODULE", "goat.target_modules"),
        (GoatSettings(rank=4, experts=8), "INVALID_GEOMETRY", "goat.rank"),
        (GoatSettings(rank=12, experts=8), "INVALID_GEOMETRY", "goat.rank"),
        (GoatSettings(top_k=9), "INVALID_GEOMETRY", "goat.top_k"),
        (GoatSettings(rho=0.0), "INVALID_GEOMETRY", "goat.rho"),
        (GoatSettings(eta=0.0), "INVALID_GEOMETRY", "goat.eta"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    settings: GoatSettings, reason: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "svd", lambda *arguments, **keywords: pytest.fail("refused too late"))
    model = small_model()
    with pytest.raises(SettingsError) as refused:
        attach(model, settings)
    assert (refused.value.reason, refused.value.field) == (reason, field)
    assert not goats(model)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"rho": 1e-7}, "goat.rho"),
        ({"eta": 1e30}, "goat.eta"),
        ({"eta": 1e-24}, "goat.eta"),
        ({"scale": GoatScale.ALPHA, "alpha": 1e20}, "goat.alpha"),
    ],
)
def test_what_begins_too_large_to_be_served_is_refused_before_a_step(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as refused:
        attach(small_model(), replace(SETTINGS, **changed))
    assert (refused.value.reason, refused.value.field) == ("WEIGHT_TOO_LARGE", field)


def test_what_has_grown_too_large_to_be_served_is_not_written_in_silence(tmp_path: Path) -> None:
    attached = attach(small_model())
    with torch.no_grad():
        attached.parameters[f"{Q0}.goat_b"].mul_(1e6)
    with pytest.raises(AdapterFormatError) as refused:
        attached.write(tmp_path / "goat", {})
    assert (refused.value.reason, refused.value.field) == ("WEIGHT_TOO_LARGE", f"{Q0}.goat_B")


def test_the_largest_rank_that_fits_is_trained() -> None:
    attach(small_model(), GoatSettings(rank=32, experts=8, target_modules=("k_proj",)))
