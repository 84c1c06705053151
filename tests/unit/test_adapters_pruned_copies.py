"""A LoRA carried from a pruned copy to the original, and a LoRA or S2FT of the original cut down to the copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import make_harness
from kind_adapters import SIDES, make_goat, make_loram, make_s2ft
from kind_definitions import define
from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.pruned_copies import NOT_RESTRICTED, recover_adapter, restrict_adapter
from motley_adapters.reader import KIND_READERS, read_adapter
from motley_adapters.spec import Side
from motley_bases.base import Base
from motley_bases.errors import UnreadableBaseError
from motley_bases.kept_channels import kept_by_path
from motley_bases.loader import load_base
from motley_bases.prune_manifest import LayerKeep, PruneManifest, read_prune_manifest
from peft_adapters import ALL_LINEAR, generate, make_adapter
from pruned_bases import GROUPED_KEEPS, prune_checkpoint, zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor

PROMPT = [5, 17, 33, 8, 64, 3, 90, 121]
OTHER = f"sha256:{'e' * 64}"
EVERYWHERE = (*ALL_LINEAR, "lm_head")


@dataclass(frozen=True)
class World:
    """A base whose pruned parts are read by nothing, and its pruned copy: without adapters the two are one function."""

    original: Base
    pruned: Base
    manifest: PruneManifest
    paths: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    original = zero_checkpoint(build_checkpoint("llama", root / "whole"), root / "original", GROUPED_KEEPS)
    pruned = prune_checkpoint(original, root / "pruned", GROUPED_KEEPS)
    bases = [load_base(path, dtype="float32", device=torch.device("cpu")) for path in (original, pruned)]
    manifest = read_prune_manifest(pruned)
    paths = {
        "original": original,
        "pruned": pruned,
        "of the original": make_adapter(original, root / "whole-lora", seed=2, target_modules=EVERYWHERE),
        "of the copy": make_adapter(pruned, root / "small-lora", seed=1, r=5, use_rslora=True),
    }
    return World(bases[0], bases[1], manifest, paths)


def recovered(world: World, directory: Path) -> Path:
    recover_adapter(
        world.paths["of the copy"],
        directory,
        world.manifest,
        original=world.original.spec,
        pruned=world.pruned.spec,
    )
    return directory


def restricted(world: World, directory: Path) -> Path:
    restrict_adapter(
        world.paths["of the original"],
        directory,
        world.manifest,
        original=world.original.spec,
        pruned=world.pruned.spec,
    )
    return directory


def factors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def delta(directory: Path, path: str) -> Tensor:
    tensors = factors(directory)
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    return b @ a


def test_every_linear_of_a_pruned_layer_keeps_what_the_manifest_says(world: World) -> None:
    kept = kept_by_path(world.manifest, world.original.spec)
    assert len(kept) == 2 * 7
    sizes = world.pruned.spec.linears
    for path, of in kept.items():
        inputs, outputs = world.original.spec.linears[path]
        found = (len(of.inputs) if of.inputs else inputs, len(of.outputs) if of.outputs else outputs)
        assert found == sizes[path], path
    assert kept["model.layers.1.self_attn.k_proj"].outputs == tuple(range(16, 32))
    assert kept["model.layers.2.mlp.down_proj"].inputs == (0, 5, 6, *range(40, 77))


def test_a_recovered_adapter_does_on_the_original_what_it_did_on_the_copy(world: World, tmp_path: Path) -> None:
    directory = recovered(world, tmp_path)
    [(tokens, logprobs)] = generate(world.paths["pruned"], [PROMPT], world.paths["of the copy"], max_new_tokens=8)
    for base, path in ((world.original, directory), (world.pruned, world.paths["of the copy"])):
        harness = make_harness(Path(), {"a": path}, base=base)
        answers = harness.run([harness.request("1", PROMPT, "a", max_new_tokens=8, logprobs=0)])
        assert answers["1"].token_ids[0] == tokens
        assert [entry.logprob for entry in answers["1"].logprobs[0]] == pytest.approx(logprobs, abs=1e-4)
    [(plain, _)] = generate(world.paths["pruned"], [PROMPT], max_new_tokens=8)
    assert tokens != plain, "the adapter moves nothing"


def test_a_recovered_adapter_has_beside_it_what_the_copy_kept(world: World, tmp_path: Path) -> None:
    directory = recovered(world, tmp_path)
    assert read_prune_manifest(directory) == world.manifest
    declared = json.loads((directory / "motley_manifest.json").read_text())["loram"]
    assert declared == {"recovered": True, "prune_manifest": world.manifest.digest}


def test_recovery_and_restriction_are_inverse_bit_for_bit(world: World, tmp_path: Path) -> None:
    specs = {"original": world.original.spec, "pruned": world.pruned.spec}
    whole = recovered(world, tmp_path / "whole")
    (whole / "motley_manifest.json").unlink()  # without it, the same files are a LoRA with zeros
    restrict_adapter(whole, tmp_path / "again", world.manifest, **specs)
    before, after = factors(world.paths["of the copy"]), factors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_adapter(tmp_path / "again", world.pruned.spec).spec.scalings == pytest.approx(
        read_adapter(world.paths["of the copy"], world.pruned.spec).spec.scalings
    )


def test_a_restricted_delta_is_the_originals_on_what_was_kept(world: World, tmp_path: Path) -> None:
    directory = restricted(world, tmp_path)
    kept = kept_by_path(world.manifest, world.original.spec)
    for path, (inputs, outputs) in world.original.spec.linears.items():
        whole, small = delta(world.paths["of the original"], path), delta(directory, path)
        of = kept.get(path)
        rows = list(range(outputs) if of is None or of.outputs is None else of.outputs)
        columns = list(range(inputs) if of is None or of.inputs is None else of.inputs)
        torch.testing.assert_close(small, whole[rows][:, columns], rtol=0, atol=1e-6)
    assert read_adapter(directory, world.pruned.spec).units.keys() == world.pruned.spec.linears.keys()


def test_each_says_what_it_was_trained_on_and_serves_there_alone(world: World, tmp_path: Path) -> None:
    original, pruned = world.original.spec, world.pruned.spec
    for directory, serves, other, trained in (
        (recovered(world, tmp_path / "recovered"), original, pruned, pruned),
        (restricted(world, tmp_path / "restricted"), pruned, original, original),
    ):
        spec = read_adapter(directory, serves).spec
        assert (spec.trained_on, spec.serves_on) == (trained.fingerprint, serves.fingerprint)
        provenance = json.loads((directory / "motley_manifest.json").read_text())["provenance"]
        assert provenance["declared_by"] == "operator"  # the LoRA itself, as PEFT saved it, does not say
        with pytest.raises(AdapterMismatchError) as caught:
            read_adapter(directory, other)
        assert caught.value.reason == "BASE_MISMATCH"
        assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] is None
        with pytest.raises(AdapterMismatchError):
            read_adapter(directory, replace(serves, pruned_from=None, fingerprint=OTHER))


def test_only_a_copy_of_the_declared_original_takes_a_restricted_adapter(world: World, tmp_path: Path) -> None:
    directory = restricted(world, tmp_path)
    with pytest.raises(AdapterMismatchError) as caught:
        read_adapter(directory, replace(world.pruned.spec, pruned_from=OTHER))
    assert (caught.value.reason, caught.value.field) == ("BASE_MISMATCH", "motley_manifest.trained_on")


def test_a_manifest_of_another_base_carries_nothing(world: World, tmp_path: Path) -> None:
    specs = {"original": world.original.spec, "pruned": world.pruned.spec}
    trained = world.paths["of the copy"]
    with pytest.raises(UnreadableBaseError) as caught:
        recover_adapter(trained, tmp_path / "a", replace(world.manifest, original_fingerprint=OTHER), **specs)
    assert caught.value.reason == "OTHER_ORIGINAL"
    with pytest.raises(AdapterMismatchError) as mismatch:
        recover_adapter(trained, tmp_path / "a", replace(world.manifest, pruned_fingerprint=OTHER), **specs)
    assert (mismatch.value.reason, mismatch.value.field) == ("BASE_MISMATCH", "prune_manifest.pruned_fingerprint")
    for layers, field in (
        (GROUPED_KEEPS[:2], "prune_manifest.layers"),
        ((None, LayerKeep((96,), (0,)), None), "prune_manifest.layers[1]"),
        ((None, None, LayerKeep((0,), (2,))), "prune_manifest.layers[2]"),
    ):
        with pytest.raises(UnreadableBaseError) as caught:
            recover_adapter(trained, tmp_path / "a", replace(world.manifest, layers=tuple(layers)), **specs)
        assert (caught.value.reason, caught.value.field) == ("PRUNE_MANIFEST", field)
    assert not (tmp_path / "a").exists()


def test_a_restricted_adapter_is_not_recovered_as_if_it_were_trained_on_the_copy(world: World, tmp_path: Path) -> None:
    directory = restricted(world, tmp_path / "restricted")
    with pytest.raises(AdapterMismatchError) as caught:
        recover_adapter(
            directory, tmp_path / "a", world.manifest, original=world.original.spec, pruned=world.pruned.spec
        )
    assert (caught.value.reason, caught.value.field) == ("BASE_MISMATCH", "motley_manifest.trained_on")


# --- S2FT -------------------------------------------------------------------------------------------------------------

OTHER_SIDES: dict[str, Side] = {
    "q_proj": "input", "k_proj": "output", "v_proj": "input", "o_proj": "output", "gate_proj": "output",
    "up_proj": "input", "down_proj": "output",
}  # fmt: skip


def restricted_s2ft(world: World, adapter: Path, directory: Path) -> Path:
    restrict_adapter(adapter, directory, world.manifest, original=world.original.spec, pruned=world.pruned.spec)
    return directory


@pytest.mark.parametrize("sides", [SIDES, OTHER_SIDES], ids=["usual sides", "other sides"])
def test_restricted_s2ft_does_on_the_copy_what_is_left_of_the_dense_model_that_it_makes(
    world: World, sides: Mapping[str, Side], tmp_path: Path
) -> None:
    adapter = make_s2ft(tmp_path / "s2ft", world.original.spec, seed=4, sides=sides, num_channels=24)
    edited = tmp_path / "edited"
    shutil.copytree(world.paths["original"], edited)
    define(world.paths["original"], [(adapter, 1.0)]).model.save_pretrained(edited)
    dense = zero_checkpoint(edited, tmp_path / "dense", GROUPED_KEEPS)
    [(tokens, logprobs)] = generate(dense, [PROMPT], max_new_tokens=8)
    directory = restricted_s2ft(world, adapter, tmp_path / "restricted")
    harness = make_harness(world.paths["pruned"], {"a": directory})
    answers = harness.run([harness.request("1", PROMPT, "a", max_new_tokens=8, logprobs=0)])
    assert answers["1"].token_ids[0] == tokens
    assert [entry.logprob for entry in answers["1"].logprobs[0]] == pytest.approx(logprobs, abs=1e-5)
    [(plain, _)] = generate(world.paths["pruned"], [PROMPT], max_new_tokens=8)
    assert tokens != plain, "the adapter moves nothing"


def test_restricted_s2ft_names_the_copys_channels_and_both_bases_and_keeps_its_precision(
    world: World, tmp_path: Path
) -> None:
    path = "model.layers.2.mlp.down_proj"  # of whose channels 0, 5, 6 and 40 to 76 are kept
    block = ChannelBlock("input", torch.tensor([0, 3, 6, 41, 90], dtype=torch.int32), torch.randn(64, 5))
    write_s2ft(tmp_path / "s2ft", world.original.spec, {path: block}, dtype=torch.bfloat16)
    directory = restricted_s2ft(world, tmp_path / "s2ft", tmp_path / "restricted")
    stored = factors(directory)
    assert stored[f"{path}.s2_idx"].tolist() == [0, 2, 4]
    assert stored[f"{path}.s2_weight"].dtype == torch.bfloat16
    assert torch.equal(stored[f"{path}.s2_weight"], block.weight[:, [0, 2, 3]].to(torch.bfloat16))
    spec = read_adapter(directory, world.pruned.spec).spec
    assert (spec.kind, spec.channels[path].indices) == ("s2ft", (0, 2, 4))
    assert (spec.trained_on, spec.serves_on) == (world.original.spec.fingerprint, world.pruned.spec.fingerprint)
    for base in (world.original.spec, replace(world.pruned.spec, pruned_from=OTHER)):
        with pytest.raises(AdapterMismatchError) as caught:
            read_adapter(directory, base)
        assert caught.value.reason == "BASE_MISMATCH"


def test_a_linear_that_loses_all_its_channels_drops_out_and_an_adapter_that_does_is_refused(
    world: World, tmp_path: Path
) -> None:
    gone, left = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"  # layer 1 keeps 1, 4, 7, ...
    blocks = {
        path: ChannelBlock("input", torch.tensor([0, 3, 95], dtype=torch.int32), torch.randn(64, 3))
        for path in (gone, left)
    }
    write_s2ft(tmp_path / "some", world.original.spec, blocks)
    directory = restricted_s2ft(world, tmp_path / "some", tmp_path / "restricted")
    assert read_adapter(directory, world.pruned.spec).units.keys() == {left}
    write_s2ft(tmp_path / "all", world.original.spec, {gone: blocks[gone]})
    with pytest.raises(AdapterMismatchError) as caught:
        restricted_s2ft(world, tmp_path / "all", tmp_path / "nothing")
    assert (caught.value.reason, caught.value.field) == ("NOTHING_KEPT", "motley_manifest.s2ft.modules")
    assert not (tmp_path / "nothing").exists()


# --- kinds that stay where they are -----------------------------------------------------------------------------------


def test_a_kind_that_cannot_be_restricted_is_refused_with_its_reason(world: World, tmp_path: Path) -> None:
    goat = make_goat(tmp_path / "goat", world.original.tensor, world.original.spec, seed=1)
    loram = make_loram(tmp_path / "loram", world.original.spec, seed=1)
    for directory, why in ((goat, "its residual and its router"), (loram, "trained on a pruned copy already")):
        with pytest.raises(AdapterFormatError, match=why) as caught:
            restricted_s2ft(world, directory, tmp_path / "a")
        assert (caught.value.reason, caught.value.field) == ("UNSUPPORTED_KIND", "motley_manifest.kind")
    assert NOT_RESTRICTED.keys() | {"lora", "s2ft"} == KIND_READERS.keys()
    assert not (tmp_path / "a").exists()


def test_a_lora_alone_is_recovered(world: World, tmp_path: Path) -> None:
    directory = make_s2ft(tmp_path / "s2ft", world.pruned.spec, seed=1)
    with pytest.raises(AdapterFormatError, match="only lora is") as caught:
        recover_adapter(
            directory, tmp_path / "a", world.manifest, original=world.original.spec, pruned=world.pruned.spec
        )
    assert caught.value.reason == "UNSUPPORTED_KIND"
