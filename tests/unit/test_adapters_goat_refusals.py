"""Whatever is wrong with a GOAT directory or its residual is refused, by reason, with the tensor or field at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_files import FINGERPRINT, tiny_spec
from motley_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, write_goat
from motley_adapters.reader import read_adapter
from torch import Tensor

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
K = "model.layers.0.self_attn.k_proj"
OTHER = f"sha256:{'f' * 64}"
GOAT = "motley_manifest.goat"
FORMAT, MISMATCH = AdapterFormatError, AdapterMismatchError
GEOMETRY = GoatGeometry(experts=2, top_k=1, rank=4, rho=10.0, segments="head")
TENSORS, RESIDUAL = "adapter_model.safetensors", "goat_residual.safetensors"


def write(directory: Path, *, geometry: GoatGeometry = GEOMETRY, seed: int = 0, residuals: Path | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)

    def random(*shape: int, source: torch.Generator = generator) -> Tensor:
        return torch.randn(shape, generator=source)

    rank = geometry.rank
    modules = {
        path: GoatModule(
            random(rank, 4),
            random(outputs, rank),
            random(geometry.experts, 4),
            3.0,
            random(rank, 4, source=shared),
            random(outputs, rank, source=shared),
        )
        for path, outputs in ((Q, 6), (UP, 8))
    }
    write_goat(directory, tiny_spec(), geometry, modules, residuals=residuals)
    return directory


def manifest(**fields: Any) -> Callable[[Path], None]:
    """Change fields of the goat object; None takes one away."""

    def change(directory: Path) -> None:
        file = directory / "motley_manifest.json"
        content = json.loads(file.read_text())
        content["goat"] = {k: v for k, v in (content["goat"] | fields).items() if v is not None}
        content["digest"] = None
        file.write_text(json.dumps(content))

    return change


def scale(value: str) -> Callable[[Path], None]:
    """Write a scale as it is spelled, whatever JSON thinks of it."""

    def change(directory: Path) -> None:
        manifest(scales={Q: 12345, UP: 3.0})(directory)
        file = directory / "motley_manifest.json"
        file.write_text(file.read_text().replace("12345", value))

    return change


def tensor(name: str, value: Tensor | None, file: str = TENSORS) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = safetensors.torch.load((directory / file).read_bytes()) | {name: value}
        kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        (directory / file).write_bytes(safetensors.torch.save(kept))

    return change


def residual(name: str, value: Tensor | None) -> Callable[[Path], None]:
    return tensor(name, value, RESIDUAL)


def made_of(fingerprint: str) -> Callable[[Path], None]:
    """Say of the residual of which base it was made."""

    def change(directory: Path) -> None:
        tensors = safetensors.torch.load((directory / RESIDUAL).read_bytes())
        (directory / RESIDUAL).write_bytes(safetensors.torch.save(tensors, {"motley_base": fingerprint}))

    return change


def link(directory: Path) -> None:
    (directory / RESIDUAL).rename(directory / "elsewhere")
    (directory / RESIDUAL).symlink_to(directory / "elsewhere")


NAN = torch.full((2, 4), torch.nan)
CASES: dict[str, tuple[Callable[[Path], None], type[AdapterError], str, str]] = {
    "a rank that experts do not divide": (manifest(experts=3), FORMAT, "INVALID_FIELD", f"{GOAT}.rank"),
    "fewer rank than experts": (manifest(experts=8), FORMAT, "INVALID_FIELD", f"{GOAT}.rank"),
    "more chosen than there are": (manifest(top_k=3), FORMAT, "INVALID_FIELD", f"{GOAT}.top_k"),
    "none chosen": (manifest(top_k=0), FORMAT, "INVALID_FIELD", f"{GOAT}.top_k"),
    "no experts": (manifest(experts=0), FORMAT, "INVALID_FIELD", f"{GOAT}.experts"),
    "experts that are true": (manifest(experts=True), FORMAT, "INVALID_FIELD", f"{GOAT}.experts"),
    "a missing rank": (manifest(rank=None), FORMAT, "MISSING_FIELD", f"{GOAT}.rank"),
    "another rank": (manifest(rank=2), FORMAT, "RANK_MISMATCH", f"{UP}.goat_A"),
    "rho of zero": (manifest(rho=0), FORMAT, "INVALID_FIELD", f"{GOAT}.rho"),
    "rho that is a word": (manifest(rho="10"), FORMAT, "INVALID_FIELD", f"{GOAT}.rho"),
    "no rho": (manifest(rho=None), FORMAT, "MISSING_FIELD", f"{GOAT}.rho"),
    "another rho": (manifest(rho=20.0), FORMAT, "RESIDUAL_MISMATCH", f"{GOAT}.residual"),
    "unknown segments": (manifest(segments="tail"), FORMAT, "INVALID_FIELD", f"{GOAT}.segments"),
    "an unknown field": (manifest(dropout=0.1), FORMAT, "UNKNOWN_FIELD", f"{GOAT}.dropout"),
    "an eta below zero": (manifest(eta=-1), FORMAT, "INVALID_FIELD", f"{GOAT}.eta"),
    "an unknown rank for the scale": (
        manifest(rank_for_scale="both"),
        FORMAT, "INVALID_FIELD", f"{GOAT}.rank_for_scale",
    ),
    "no scales": (manifest(scales=None), FORMAT, "MISSING_FIELD", f"{GOAT}.scales"),
    "scales of nothing": (manifest(scales={}), FORMAT, "INVALID_FIELD", f"{GOAT}.scales"),
    "a module without its scale": (manifest(scales={Q: 3.0}), FORMAT, "MISSING_FIELD", f"{GOAT}.scales.{UP}"),
    "a scale for a module without tensors": (
        manifest(scales={Q: 3.0, UP: 3.0, K: 3.0}),
        FORMAT, "MISSING_TENSOR", f"{K}.goat_router",
    ),
    "a scale of zero": (scale("0"), FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{Q}"),
    "a scale below zero": (scale("-3"), FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{Q}"),
    "a scale that overflows": (scale("1e999"), FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{Q}"),
    "a scale of a thousand digits": (scale("1" * 1000), FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{Q}"),
    "a scale that is NaN": (scale("NaN"), FORMAT, "BAD_JSON", "motley_manifest.json"),
    "a scale for an unknown module": (manifest(scales={"x.y": 3.0}), MISMATCH, "UNKNOWN_MODULE", f"{GOAT}.scales.x.y"),
    "the embedding": (
        manifest(scales={"model.embed_tokens": 3.0}),
        MISMATCH, "WRONG_MODULE_KIND", f"{GOAT}.scales.model.embed_tokens",
    ),
    "a module that is no Linear": (
        manifest(scales={"model.norm": 3.0}),
        MISMATCH, "NOT_A_LINEAR", f"{GOAT}.scales.model.norm",
    ),
    "no residual named": (manifest(residual=None), FORMAT, "MISSING_FIELD", f"{GOAT}.residual"),
    "a residual that is no digest": (manifest(residual="mine"), FORMAT, "INVALID_FIELD", f"{GOAT}.residual"),
    "another residual named": (manifest(residual=OTHER), FORMAT, "RESIDUAL_MISMATCH", f"{GOAT}.residual"),
    "no router": (tensor(f"{Q}.goat_router", None), FORMAT, "MISSING_TENSOR", f"{Q}.goat_router"),
    "no A": (tensor(f"{UP}.goat_A", None), FORMAT, "MISSING_TENSOR", f"{UP}.goat_A"),
    "no B": (tensor(f"{UP}.goat_B", None), FORMAT, "MISSING_TENSOR", f"{UP}.goat_B"),
    "a router of half precision": (
        tensor(f"{Q}.goat_router", torch.ones(2, 4).half()),
        FORMAT, "BAD_DTYPE", f"{Q}.goat_router",
    ),
    "a router for other inputs": (
        tensor(f"{Q}.goat_router", torch.ones(2, 5)),
        MISMATCH, "SHAPE_MISMATCH", f"{Q}.goat_router",
    ),
    "a router of other experts": (
        tensor(f"{Q}.goat_router", torch.ones(4, 4)),
        MISMATCH, "SHAPE_MISMATCH", f"{Q}.goat_router",
    ),
    "a router with NaN": (tensor(f"{Q}.goat_router", NAN), FORMAT, "NON_FINITE", f"{Q}.goat_router"),
    "A with infinity": (tensor(f"{Q}.goat_A", torch.full((4, 4), torch.inf)), FORMAT, "NON_FINITE", f"{Q}.goat_A"),
    "A that overflows": (tensor(f"{Q}.goat_A", torch.full((4, 4), 3e38)), FORMAT, "WEIGHT_TOO_LARGE", f"{Q}.goat_A"),
    "a router that overflows": (
        tensor(f"{Q}.goat_router", torch.full((2, 4), -3e38)),
        FORMAT, "WEIGHT_TOO_LARGE", f"{Q}.goat_router",
    ),
    "a scale that makes a factor overflow": (scale("1e30"), FORMAT, "WEIGHT_TOO_LARGE", f"{Q}.goat_B"),
    "a scale that is not what eta makes it": (
        manifest(eta=1.5, rank_for_scale="expert", scales={Q: 3.0, UP: 3.004}),
        FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{UP}",
    ),
    "a scale by the other rank": (
        manifest(eta=1.5, rank_for_scale="total"),
        FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{UP}",
    ),
    "an eta of zero": (manifest(eta=0, rank_for_scale="expert"), FORMAT, "INVALID_FIELD", f"{GOAT}.scales.{UP}"),
    "A for other inputs": (tensor(f"{Q}.goat_A", torch.ones(4, 5)), MISMATCH, "SHAPE_MISMATCH", f"{Q}.goat_A"),
    "B of another rank": (tensor(f"{Q}.goat_B", torch.ones(6, 8)), FORMAT, "RANK_MISMATCH", f"{Q}.goat_B"),
    "B for other outputs": (tensor(f"{Q}.goat_B", torch.ones(5, 4)), MISMATCH, "SHAPE_MISMATCH", f"{Q}.goat_B"),
    "a tensor of no kind": (tensor("x", torch.ones(1)), FORMAT, "UNEXPECTED_TENSOR", "x"),
    "whole numbers": (tensor("x", torch.ones(1, dtype=torch.int32)), FORMAT, "BAD_DTYPE", "x"),
    "half a residual": (residual(f"{Q}.residual_A", None), FORMAT, "MISSING_TENSOR", f"{Q}.residual_A"),
    "a residual of another geometry": (
        residual(f"{Q}.residual_A", torch.ones(2, 4)),
        FORMAT, "RANK_MISMATCH", f"{Q}.residual_A",
    ),
    "a residual for another base's sizes": (
        residual(f"{Q}.residual_B", torch.ones(7, 4)),
        MISMATCH, "SHAPE_MISMATCH", f"{Q}.residual_B",
    ),
    "a residual with other values": (
        residual(f"{Q}.residual_A", torch.ones(4, 4)),
        FORMAT, "RESIDUAL_MISMATCH", f"{GOAT}.residual",
    ),
    "a residual of another base": (made_of(OTHER), MISMATCH, "BASE_MISMATCH", RESIDUAL),
    "a residual of more modules": (
        residual(f"{K}.residual_A", torch.ones(4, 4)),
        FORMAT, "UNEXPECTED_TENSOR", f"{K}.residual_A",
    ),
    "a residual with NaN": (
        residual(f"{Q}.residual_A", torch.full((4, 4), torch.nan)),
        FORMAT, "NON_FINITE", f"{Q}.residual_A",
    ),
    "a residual cut short": (
        lambda d: (d / RESIDUAL).write_bytes((d / RESIDUAL).read_bytes()[:-4]),
        FORMAT, "TRUNCATED", f"{Q}.residual_B",
    ),
    "a residual that is a pickle": (
        lambda d: (d / RESIDUAL).write_bytes(b"\x80\x04\x95" + b"." * 99),
        FORMAT, "PICKLE_REFUSED", RESIDUAL,
    ),
    "a residual behind a link": (link, FORMAT, "SYMLINK_REFUSED", RESIDUAL),
    "no residual": (lambda d: (d / RESIDUAL).unlink(), MISMATCH, "MISSING_RESIDUAL", f"{GOAT}.residual"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, error, reason, field = CASES[case]
    change(write(tmp_path))
    with pytest.raises(error) as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (type(caught.value), caught.value.reason, caught.value.field) == (error, reason, field)


def test_the_files_are_sound_before_they_are_changed(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path), tiny_spec())
    assert adapter.spec.scalings == {Q: 3.0, UP: 3.0}
    assert [part.digest for part in adapter.parts] == [adapter.spec.digest, *adapter.spec.shared]


@pytest.mark.parametrize(
    "declared",
    [
        {"eta": 1.5, "rank_for_scale": "expert"},
        {"eta": 3.0, "rank_for_scale": "total"},
        {"eta": 1.5, "rank_for_scale": "expert", "scales": {Q: 3.0, UP: 3.002}},  # written with few digits
        {"eta": 99.0},  # of which rank is not said
        {"rank_for_scale": "total"},
    ],
)
def test_scales_that_are_what_eta_makes_them_are_read(declared: dict[str, Any], tmp_path: Path) -> None:
    manifest(**declared)(write(tmp_path))
    assert read_adapter(tmp_path, tiny_spec()).spec.scalings == declared.get("scales", {Q: 3.0, UP: 3.0})


@pytest.mark.parametrize("name", ["trained_on", "serves_on"])
def test_another_base_is_refused_with_both_fingerprints(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(AdapterMismatchError, match=f"{FINGERPRINT}.*{OTHER}") as caught:
        read_adapter(tmp_path, tiny_spec(fingerprint=OTHER))
    assert caught.value.reason == "BASE_MISMATCH"
    content = json.loads((tmp_path / "motley_manifest.json").read_text())
    (tmp_path / "motley_manifest.json").write_text(json.dumps(content | {name: "undeclared"}))
    with pytest.raises(AdapterFormatError) as caught_undeclared:
        read_adapter(tmp_path, tiny_spec())
    assert (caught_undeclared.value.reason, caught_undeclared.value.field) == (
        "MISSING_FIELD",
        f"motley_manifest.{name}",
    )


def test_a_residual_is_found_by_its_digest_among_many(tmp_path: Path) -> None:
    kept = tmp_path / "residuals"
    inside = read_adapter(write(tmp_path / "inside"), tiny_spec())
    write(tmp_path / "another geometry", geometry=GoatGeometry(2, 1, 2, 10.0, "head"), residuals=kept)
    outside = read_adapter(write(tmp_path / "outside", residuals=kept), tiny_spec(), residuals=kept)
    assert len(list(kept.iterdir())) == 2
    assert not (tmp_path / "outside" / RESIDUAL).exists()
    assert outside.spec.digest == inside.spec.digest


def test_a_kept_residual_with_another_content_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "residuals"
    write(tmp_path / "a", residuals=kept)
    (file,) = kept.iterdir()
    tensor(f"{Q}.residual_A", torch.ones(4, 4), str(file))(tmp_path)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path / "a", tiny_spec(), residuals=kept)
    assert caught.value.reason == "RESIDUAL_MISMATCH"


def test_a_second_adapter_stores_no_second_residual(tmp_path: Path) -> None:
    kept = tmp_path / "residuals"
    adapters = [
        read_adapter(write(tmp_path / str(seed), seed=seed, residuals=kept), tiny_spec(), residuals=kept)
        for seed in (1, 2)
    ]
    assert len(list(kept.iterdir())) == 1
    assert adapters[0].spec.shared == adapters[1].spec.shared
    assert adapters[0].spec.digest != adapters[1].spec.digest


def test_experts_wider_than_their_segment_of_the_spectrum_are_refused(tmp_path: Path) -> None:
    write(tmp_path, geometry=GoatGeometry(experts=2, top_k=1, rank=6, rho=10.0, segments="head"))
    with pytest.raises(AdapterFormatError, match="segments of 2") as caught:
        read_adapter(tmp_path, tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "motley_manifest.goat.rank")


def test_a_residual_tells_its_base_beside_an_adapter_and_need_not(tmp_path: Path) -> None:
    """Kept under its digest it may be that of several bases, and tells none."""
    told, kept = write(tmp_path / "told"), tmp_path / "kept"
    write(tmp_path / "outside", residuals=kept)
    (outside,) = kept.iterdir()
    metadata = []
    for file in (told / RESIDUAL, outside):
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata.append(opened.metadata())
    assert metadata == [{"motley_base": tiny_spec().fingerprint}, None]
    wanted = read_adapter(told, tiny_spec()).spec
    (told / RESIDUAL).write_bytes(outside.read_bytes())
    assert read_adapter(told, tiny_spec()).spec == wanted
