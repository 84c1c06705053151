"""Pruned checkpoints that cannot be served as they are: each refused by its name, none repaired in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint, build_model, edit_json
from motley_bases.errors import BaseError, UnreadableBaseError, UnsupportedBaseError
from motley_bases.loader import load_base
from motley_bases.prune_manifest import LayerKeep, write_prune_manifest
from motley_bases.pruned import (
    LayerShape,
    PrunedShapes,
    check_prunable,
    decoder_shape,
    register_pruned,
    save_pruned,
    whole_shapes,
)
from motley_bases.pruned_models import CLASSES
from pruned_bases import GROUPED_KEEPS, load, make_manifest, prune_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    return prune_checkpoint(build_checkpoint("llama", root / "whole"), root / "pruned", GROUPED_KEEPS)


@pytest.fixture
def pruned(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pruned"))


def refusal(directory: Path) -> tuple[str, str | None]:
    with pytest.raises(BaseError) as caught:
        load_base(directory, dtype="float32", device=CPU)
    return caught.value.reason, caught.value.field


def change_layer(layer: int, **sizes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        shapes = json.loads((directory / "config.json").read_text())["pruned_shapes"]
        shapes["layers"][layer] |= sizes
        edit_json(directory / "config.json", pruned_shapes=shapes)

    return change


def change_shapes(shapes: object) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", pruned_shapes=shapes)


SHAPE_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (change_shapes(None), "pruned_shapes"),
    "a list": (change_shapes([]), "pruned_shapes"),
    "something else as well": (change_shapes({"layers": [], "ratio": 1}), "pruned_shapes"),
    "too few layers": (change_shapes({"layers": []}), "pruned_shapes.layers"),
    "a layer without sizes": (change_shapes({"layers": [{}]}), "pruned_shapes.layers[0]"),
    "a size that is no number": (change_layer(1, ffn_size="32"), "pruned_shapes.layers[1].ffn_size"),
    "a size that is true": (change_layer(1, num_kv_heads=True), "pruned_shapes.layers[1].num_kv_heads"),
    "an empty layer": (change_layer(1, ffn_size=0), "pruned_shapes.layers[1].ffn_size"),
    "a layer without heads": (change_layer(2, num_heads=0, num_kv_heads=0), "pruned_shapes.layers[2].num_kv_heads"),
    "more heads than there were": (
        change_layer(0, num_heads=8, num_kv_heads=4),
        "pruned_shapes.layers[0].num_kv_heads",
    ),
    "more channels than there were": (change_layer(0, ffn_size=97), "pruned_shapes.layers[0].ffn_size"),
    "a query head without its group": (change_layer(1, num_heads=1), "pruned_shapes.layers[1].num_heads"),
}


@pytest.mark.parametrize("case", SHAPE_FAULTS)
def test_sizes_that_no_pruning_leaves_are_refused(case: str, pruned: Path) -> None:
    change, field = SHAPE_FAULTS[case]
    change(pruned)
    assert refusal(pruned) == ("PRUNED_SHAPES", field)


def test_sizes_are_said_of_pruned_models_alone(pruned: Path) -> None:
    edit_json(pruned / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert refusal(pruned) == ("PRUNED_SHAPES", "pruned_shapes")


def test_weights_of_other_sizes_than_the_config_says_are_refused_and_not_made_up(pruned: Path) -> None:
    change_layer(1, ffn_size=31)(pruned)
    rewrite_manifest(pruned, (None, LayerKeep(tuple(range(31)), (1,)), GROUPED_KEEPS[2]))
    assert refusal(pruned) == ("OTHER_WEIGHTS", "mismatched_keys")


def rewrite_manifest(directory: Path, keeps: Any) -> None:
    write_prune_manifest(directory, make_manifest(f"sha256:{'a' * 64}", keeps))


MANIFEST_FAULTS: Mapping[str, tuple[Any, str]] = {
    "of fewer layers": (GROUPED_KEEPS[:2], "layers"),
    "of fewer channels": ((None, LayerKeep(tuple(range(31)), (1,)), GROUPED_KEEPS[2]), "layers[1].ffn_channels"),
    "of more heads": ((None, LayerKeep(tuple(range(32)), (0, 1)), GROUPED_KEEPS[2]), "layers[1].kv_heads"),
    "of a wider model": ((None, LayerKeep((*range(31), 96), (1,)), GROUPED_KEEPS[2]), "layers[1].ffn_channels"),
    "of a model with more heads": ((None, LayerKeep(tuple(range(32)), (2,)), GROUPED_KEEPS[2]), "layers[1].kv_heads"),
    "of a layer that is whole": ((None, None, GROUPED_KEEPS[2]), "layers[1].kv_heads"),
}


@pytest.mark.parametrize("case", MANIFEST_FAULTS)
def test_a_manifest_of_other_layers_is_refused(case: str, pruned: Path) -> None:
    keeps, field = MANIFEST_FAULTS[case]
    rewrite_manifest(pruned, keeps)
    assert refusal(pruned) == ("OTHER_MANIFEST", f"prune_manifest.{field}")


def test_a_manifest_is_bound_to_its_weights(pruned: Path) -> None:
    tensors = load_file(pruned / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, pruned / "model.safetensors", {"format": "pt"})
    assert refusal(pruned) == ("OTHER_MANIFEST", "prune_manifest.pruned_fingerprint")


def test_a_pruned_base_needs_its_manifest(pruned: Path) -> None:
    (pruned / "prune_manifest.json").unlink()
    assert refusal(pruned) == ("NO_PRUNE_MANIFEST", None)


# --- making ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "mixtral", "gpt2"])
def test_what_has_no_closed_form_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture, vocab_size=80)
    for refuse in (
        lambda: check_prunable(model.config),
        lambda: save_pruned(model.state_dict(), model.config, PrunedShapes(()), tmp_path),
    ):
        with pytest.raises(UnsupportedBaseError) as caught:
            refuse()
        assert (caught.value.reason, caught.value.field) == ("NOT_PRUNABLE", "model_type")
        assert architecture in caught.value.message
        assert all(known in caught.value.message for known in CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_have_the_sizes_are_not_written(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    whole = whole_shapes(decoder_shape(model.config))
    narrow = PrunedShapes((LayerShape(4, 2, 95), *whole.layers[1:]))
    up = "model.layers.0.mlp.gate_proj.weight"
    state = model.state_dict()
    for given, shapes, field in (
        (state, narrow, up),
        ({name: tensor for name, tensor in state.items() if name != up}, whole, up),
        (state | {"model.extra": torch.ones(1)}, whole, "model.extra"),
    ):
        with pytest.raises(UnreadableBaseError) as caught:
            save_pruned(given, model.config, shapes, tmp_path)
        assert (caught.value.reason, caught.value.field) == ("OTHER_WEIGHTS", field)
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_copy_can_be_saved_from_its_own_config(pruned: Path, tmp_path: Path) -> None:
    model = load(pruned)
    shapes = PrunedShapes(tuple(LayerShape(*size) for size in ((4, 2, 96), (2, 1, 32), (2, 1, 40))))
    save_pruned(model.state_dict(), model.config, shapes, tmp_path / "again")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", pruned))
    assert ours == theirs
    assert ours["model_type"] == "motley_pruned_llama"
    assert (ours["num_attention_heads"], ours["intermediate_size"]) == (4, 96), "the original's numbers stay"


def test_a_weight_that_was_never_loaded_shows(pruned: Path) -> None:
    register_pruned()
    fresh = AutoModelForCausalLM.from_config(load(pruned).config)
    assert fresh(torch.tensor([[5]])).logits.isnan().all()
