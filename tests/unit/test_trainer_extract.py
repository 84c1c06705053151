"""`motley base extract`: a known difference comes back exactly, a larger one as far as its rank goes, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_adapters.errors import AdapterError
from motley_adapters.reader import read_adapter
from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.stored_spec import read_spec
from motley_trainer.bases.extract import Extracted, Extraction, extract_lora
from motley_trainer.commands.base import StageLines
from motley_trainer.commands.base import base as base_command
from motley_trainer.errors import OutputError, SettingsError, TrainerError, UnsuitableBaseError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NORM = "model.norm.weight"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("bases") / "original")


def changed(original: Path, directory: Path, change: Change, origin: str | None = "") -> Path:
    """Write the base with its tensors changed, and perhaps a manifest that names an original."""
    shutil.copytree(original, directory)
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    if origin != "":
        write_manifest(directory, original_fingerprint=origin, chain=[] if origin is None else [origin])
    return directory


def write_manifest(directory: Path, **fields: object) -> None:
    """Write a manifest as a job does but for what is said."""
    manifest = {"schema_version": 1, "fingerprint": fingerprint(directory), "merges": []} | fields
    (directory / "loqt_manifest.json").write_text(json.dumps(manifest))


def product(state: dict[str, Tensor], path: str, values: list[float], seed: int = 0) -> Tensor:
    """Return a difference with these singular values."""
    outputs, inputs = state[f"{path}.weight"].shape
    drawn = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(outputs, len(values), generator=drawn)).Q
    right = torch.linalg.qr(torch.randn(inputs, len(values), generator=drawn)).Q
    return left @ torch.diag(torch.tensor(values)) @ right.T


def by_two_products(state: dict[str, Tensor]) -> None:
    """Change two Linears: one by a rank of 2, one by 4 directions."""
    state[f"{QUERY}.weight"] += product(state, QUERY, [0.5, 0.25])
    state[f"{DOWN}.weight"] += product(state, DOWN, [0.4, 0.3, 0.2, 0.1], seed=1)


def with_a_norm(state: dict[str, Tensor]) -> None:
    by_two_products(state)
    state[NORM] += 0.5
    state["lm_head.weight"] += 0.5


@pytest.fixture(scope="module")
def trained(original: Path) -> Path:
    origin = fingerprint(original)
    return changed(original, original.parent / "trained", by_two_products, origin)


def extract(trained: Path, original: Path, out: Path, rank: int, **asked: object) -> Extracted:
    return extract_lora(str(trained), str(original), Extraction(rank, **asked), out, StageLines())  # type: ignore[arg-type]


def delta_of(directory: Path, path: str) -> Tensor:
    """Return what an adapter's files add to a Linear."""
    factors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    a, b = (factors[f"base_model.model.{path}.lora_{name}.weight"] for name in "AB")
    (alpha,) = {config["alpha_pattern"][key] for key in config["alpha_pattern"] if key.replace("\\", "") == f"^{path}"}
    return b @ a * (alpha / len(a))


def test_a_difference_of_that_rank_comes_back_whole(original: Path, trained: Path, tmp_path: Path) -> None:
    found = extract(trained, original, tmp_path / "out", 4)

    assert found.energy == pytest.approx(1.0, abs=1e-9)
    assert found.energies == {path: pytest.approx(1.0, abs=1e-9) for path in (QUERY, DOWN)}
    assert found.left_out == ()
    before, after = (load_file(path / "model.safetensors") for path in (original, trained))
    for path in (QUERY, DOWN):
        wanted = after[f"{path}.weight"] - before[f"{path}.weight"]
        torch.testing.assert_close(delta_of(tmp_path / "out", path), wanted, atol=1e-6, rtol=0)
    spec = read_adapter(tmp_path / "out", read_spec(original)).spec
    assert (spec.digest, spec.kind, spec.trained_on) == (found.digest, "lora", fingerprint(original))
    manifest = json.loads((tmp_path / "out" / "motley_manifest.json").read_text())
    assert manifest["provenance"] == {
        "extracted_from": fingerprint(trained),
        "rank": 4,
        "energy_kept": found.energy,
        "energy_kept_of_linears": found.energy_of_linears,
        "energy_kept_by_module": dict(found.energies),
        "left_out": [],
    }


def test_an_extracted_adapter_is_refused_by_the_base_that_it_was_extracted_from(
    original: Path, trained: Path, tmp_path: Path
) -> None:
    extract(trained, original, tmp_path / "out", 4)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "out", read_spec(trained))
    assert caught.value.reason == "BASE_MISMATCH"


def test_what_a_rank_cannot_keep_is_told_and_refused_below_the_bound(
    original: Path, trained: Path, tmp_path: Path
) -> None:
    # Squares: 0.25 + 0.0625, and 0.16 + 0.09 + 0.04 + 0.01, of which the first of each are kept.
    kept = {QUERY: 0.25 / 0.3125, DOWN: 0.16 / 0.30}
    in_all = (0.25 + 0.16) / 0.6125
    with pytest.raises(UnsuitableBaseError, match=r"66\.94%.*less than 90\.00%") as caught:
        extract(trained, original, tmp_path / "out", 1)
    assert (caught.value.reason, caught.value.field) == ("ENERGY_TOO_LOW", "rank")
    assert list(tmp_path.iterdir()) == []
    found = extract(trained, original, tmp_path / "out", 1, min_energy=0.66)
    assert found.energies == pytest.approx(kept, rel=1e-5)
    assert found.energy == pytest.approx(in_all, rel=1e-5)
    wanted = delta_of(tmp_path / "out", QUERY)
    assert float(torch.linalg.matrix_norm(wanted, 2)) == pytest.approx(0.5, rel=1e-5)
    assert torch.linalg.matrix_rank(wanted) == 1


def test_what_no_lora_of_linears_can_have_is_refused_unless_it_may_be_left_out(original: Path, tmp_path: Path) -> None:
    trained = changed(original, tmp_path / "trained", with_a_norm)
    with pytest.raises(UnsuitableBaseError, match=rf"2 tensors.*lm_head\.weight, {NORM}") as caught:
        extract(trained, original, tmp_path / "out", 4)
    assert (caught.value.reason, caught.value.field) == ("OTHERS_CHANGED", "linears_only")
    before = load_file(original / "model.safetensors")
    lost = 0.25 * (before[NORM].numel() + before["lm_head.weight"].numel())
    kept = 0.6125 / (0.6125 + lost)
    with pytest.raises(UnsuitableBaseError, match=rf"keeps {kept:.2%}.*100\.00% of the Linears'") as too_low:
        extract(trained, original, tmp_path / "out", 4, linears_only=True)
    assert too_low.value.reason == "ENERGY_TOO_LOW", "what is left out is lost as well"
    found = extract(trained, original, tmp_path / "out", 4, linears_only=True, min_energy=0.0)
    assert found.energy == pytest.approx(kept, rel=1e-4)
    assert found.energy_of_linears == pytest.approx(1.0, abs=1e-9)
    assert found.left_out == ("lm_head.weight", NORM)
    manifest = json.loads((tmp_path / "out" / "motley_manifest.json").read_text())
    assert manifest["provenance"]["left_out"] == list(found.left_out)
    assert set(found.energies) == {QUERY, DOWN}


def nothing(state: dict[str, Tensor]) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("change", "origin", "reason", "field"),
    [
        (nothing, "", "NOTHING_CHANGED", "from"),
        (by_two_products, f"sha256:{'0' * 64}", "OTHER_ORIGINAL", "loqt_manifest.original_fingerprint"),
        (by_two_products, None, "OTHER_ORIGINAL", "loqt_manifest.original_fingerprint"),
    ],
    ids=["nothing changed", "trained from another", "trained from scratch"],
)
def test_bases_that_nothing_can_be_extracted_from_are_refused(
    original: Path, tmp_path: Path, change: Change, origin: str | None, reason: str, field: str
) -> None:
    trained = changed(original, tmp_path / "trained", change, origin)
    with pytest.raises(UnsuitableBaseError) as caught:
        extract(trained, original, tmp_path / "out", 4)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [f"{QUERY}.weight", NORM])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    original: Path, tmp_path: Path, name: str, value: float
) -> None:
    def break_it(state: dict[str, Tensor]) -> None:
        by_two_products(state)
        state[name].view(-1)[3] = value

    trained = changed(original, tmp_path / "trained", break_it)
    with pytest.raises(UnsuitableBaseError) as caught:
        extract(trained, original, tmp_path / "out", 4, linears_only=True, min_energy=0.0)
    assert (caught.value.reason, caught.value.field) == ("NOT_FINITE", name)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 100_000, '{"schema_version": 1}'])
def test_a_manifest_that_cannot_be_read_is_refused(original: Path, trained: Path, tmp_path: Path, text: str) -> None:
    other = tmp_path / "trained"
    shutil.copytree(trained, other)
    (other / "loqt_manifest.json").write_text(text)
    with pytest.raises(UnreadableBaseError) as caught:
        extract(other, original, tmp_path / "out", 4)
    assert caught.value.reason == "LOQT_MANIFEST"


def test_a_manifest_is_held_against_the_weights(original: Path, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "trained"
    shutil.copytree(trained, other)
    (other / "loqt_manifest.json").unlink()
    (other / "loqt_manifest.json").mkdir()
    with pytest.raises(UnreadableBaseError) as broken:
        extract(other, original, tmp_path / "out", 4)
    assert broken.value.reason == "LOQT_MANIFEST"
    (other / "loqt_manifest.json").rmdir()
    origin = fingerprint(original)
    write_manifest(other, fingerprint=origin, original_fingerprint=origin, chain=[origin])
    with pytest.raises(UnsuitableBaseError) as caught:
        extract(other, original, tmp_path / "out", 4)
    assert (caught.value.reason, caught.value.field) == ("OTHER_MANIFEST", "loqt_manifest.fingerprint")


@pytest.mark.parametrize("share", [float("nan"), -0.1, 1.1])
def test_a_least_energy_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(SettingsError) as caught:
        Extraction(4, min_energy=share)
    assert (caught.value.reason, caught.value.field) == ("BAD_MIN_ENERGY", "min_energy")


def test_a_base_of_other_shapes_and_one_that_is_stored_quantized_are_refused(original: Path, tmp_path: Path) -> None:
    other = build_checkpoint("llama", tmp_path / "other", intermediate_size=80)
    shutil.copytree(original, tmp_path / "int8")
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(tmp_path / "int8" / "config.json", quantization_config=quantization)
    for trained, reason in ((other, "OTHER_SHAPES"), (tmp_path / "int8", "ALREADY_QUANTIZED")):
        with pytest.raises(UnsuitableBaseError) as caught:
            extract(trained, original, tmp_path / "out", 4)
        assert caught.value.reason == reason


def test_settings_that_cannot_be_are_refused(original: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as too_large:
        extract(trained, original, tmp_path / "out", 1000)
    assert (too_large.value.reason, too_large.value.field) == ("RANK_TOO_LARGE", "rank")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError) as taken:
        extract(trained, original, tmp_path / "out", 4)
    assert taken.value.reason == "OUTPUT_EXISTS"


def test_the_command_tells_what_was_kept(original: Path, trained: Path, tmp_path: Path) -> None:
    arguments = ["extract", str(trained), "--from", str(original), "--rank", "1", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(base_command, arguments)
    assert isinstance(refused.exception, TrainerError)
    assert refused.exception.reason == "ENERGY_TOO_LOW"
    lines = CliRunner().invoke(base_command, [*arguments, "--min-energy", "0.5"]).output.splitlines()
    digest = json.loads((tmp_path / "out" / "motley_manifest.json").read_text())["digest"]
    assert lines == [
        f"{tmp_path / 'out'}: {digest}, serves on original ({fingerprint(original)})",
        "energy of the difference that was kept: 66.94%, of the Linears': 66.94%",
        f"  {QUERY}: 80.00%",
        f"  {DOWN}: 53.33%",
    ]
    arguments[-1] = str(tmp_path / "again")
    told = json.loads(CliRunner().invoke(base_command, [*arguments, "--min-energy", "0.5", "--json"]).output)
    assert (told["digest"], told["left_out"]) == (digest, [])
    assert told["energy_kept"] == pytest.approx(0.41 / 0.6125, rel=1e-5)
