"""The check of a spec for LoRAM: what can be followed, and each refusal by the field's path."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from motley.v1 import training_pb2 as pb
from motley_bases.spec import BaseSpec, LayerSpec
from motley_server.errors import FailedPreconditionError, InvalidArgumentError
from motley_server.rpc.convert_training import text_of
from motley_server.rpc.training_spec import adapters_of, check_spec, datasets_of
from motley_trainer.spec.reading import read_spec
from rpc_harness import make_base
from training_calls import digest_of, samples, spec_with

BASE = make_base()
OTHER = digest_of(samples(seed=1))
UNSTRUCTURED, SEMI = pb.LORAM_PRUNING_UNSTRUCTURED, pb.LORAM_PRUNING_SEMI_STRUCTURED


def loram_with(**settings: Any) -> pb.TrainingSpec:
    """Return a spec that prunes the one layer that there is, to 1 of 1 heads and 16 of 32 channels."""
    said = {"layers": "" if "same_cut_as" in settings else "0:1", "lora": {"rank": 4}} | settings
    return spec_with(method=pb.TRAINING_METHOD_LORAM, loram=pb.LoramSettings(**said))


GOOD: dict[str, pb.TrainingSpec] = {
    "LoRAM over the layer": loram_with(),
    "LoRAM of nothing": loram_with(ratio="0", layers=""),
    "LoRAM of nearly all channels": loram_with(ratio="31/32", lora={"rank": 1}),
    "a ratio in decimals": loram_with(ratio=".65"),
    "a rank that the pruned channels still have": loram_with(lora={"rank": 16, "target_modules": ["up_proj"]}),
    "heads by lot": loram_with(pruning=pb.LORAM_PRUNING_RANDOM, ratio="0.65"),
    "weights alone": loram_with(
        pruning=UNSTRUCTURED, ratio="0.999", calibration_samples=1, lora={"rank": 16, "target_modules": ["up_proj"]}
    ),
    "four of eight": loram_with(pruning=SEMI),
    "four of eight, in all layers": loram_with(pruning=SEMI, layers=""),
    "weights of all layers": loram_with(pruning=UNSTRUCTURED, layers=""),
    "one of sixteen": loram_with(pruning=SEMI, pattern="1:16"),
    "another's cut": loram_with(same_cut_as="other/rows@2"),
    "alignment": loram_with(alignment=pb.LoramAlignment(dataset=OTHER, steps=1, learning_rate=1e-5, batch_size=1)),
    "alignment of another's cut": loram_with(same_cut_as="rows", alignment=pb.LoramAlignment(dataset=OTHER)),
}


@pytest.mark.parametrize("name", GOOD)
def test_settings_that_can_be_followed_are_let_through(name: str) -> None:
    assert check_spec(GOOD[name], BASE) == "loram"
    assert read_spec(json.loads(text_of(GOOD[name]))).method == "loram", "a worker reads it too"


BAD: dict[str, tuple[pb.TrainingSpec, str, str]] = {
    **{
        f"a ratio of {text}": (loram_with(ratio=text), "INVALID_RATIO", "loram.ratio")
        for text in ("1", "1.0", "3/2", "-0.5", "half", "1/0", "1/00", "0.5.5", "1e-1", "\u0665/6", ".", "nan")
    },
    "a ratio that leaves no channel": (loram_with(ratio="0.97"), "LEAVES_NOTHING", "loram.ratio"),
    **{
        f"layers {text}": (loram_with(layers=text), "INVALID_LAYERS", "loram.layers")
        for text in ("0", ":", "0:", ":1", "1:1", "1:0", "0:2", "1:2", "-1:1", "0:1:1", "0 :1")
    },
    "layers by default, of which there are none": (loram_with(layers=""), "INVALID_LAYERS", "loram.layers"),
    **{
        f"a pattern of {text}": (loram_with(pruning=SEMI, pattern=text), "INVALID_PATTERN", "loram.pattern")
        for text in ("4", "0:8", "8:8", "9:8", "4:", "4:8:8", "2:3", "4:32")
    },
    "a pattern for heads": (loram_with(pattern="4:8"), "SETTING_NOT_USED", "loram.pattern"),
    "a pattern for weights": (loram_with(pruning=UNSTRUCTURED, pattern="4:8"), "SETTING_NOT_USED", "loram.pattern"),
    "a ratio for a pattern": (loram_with(pruning=SEMI, ratio="1/2"), "SETTING_NOT_USED", "loram.ratio"),
    "samples for heads by lot": (
        loram_with(pruning=pb.LORAM_PRUNING_RANDOM, calibration_samples=8), "SETTING_NOT_USED",
        "loram.calibration_samples",
    ),
    **{
        f"another's cut, and {name}": (
            loram_with(same_cut_as="rows", **{name: value}), "SETTING_NOT_USED", f"loram.{name}",
        )
        for name, value in (
            ("pruning", pb.LORAM_PRUNING_STRUCTURED), ("ratio", "1/2"), ("layers", "0:1"), ("pattern", "4:8"),
            ("calibration_samples", 64),
        )
    },
    **{
        f"{name} {value} of nothing": (loram_with(**{"ratio": "0", "layers": "", name: value}), reason, f"loram.{name}")
        for name, value, reason in (
            ("pruning", pb.LORAM_PRUNING_RANDOM, "SETTING_NOT_USED"), ("layers", "0:1", "SETTING_NOT_USED"),
            ("pattern", "4:8", "SETTING_NOT_USED"), ("calibration_samples", 8, "SETTING_NOT_USED"),
            ("layers", "zebra", "INVALID_LAYERS"), ("layers", "9:3", "INVALID_LAYERS"),
        )
    },
    "alignment of what is whole": (
        loram_with(ratio="0", layers="", alignment=pb.LoramAlignment(dataset=OTHER)), "SETTING_NOT_USED",
        "loram.alignment",
    ),
    "the cut of a bad name": (loram_with(same_cut_as="Rows"), "INVALID_ADAPTER_NAME", "loram.same_cut_as"),
    "no samples to prune by": (loram_with(calibration_samples=0), "OUT_OF_RANGE", "loram.calibration_samples"),
    "LoRAM of rank 0": (loram_with(lora={"rank": 0}), "OUT_OF_RANGE", "loram.lora.rank"),
    "LoRAM of alpha 0": (loram_with(lora={"alpha": 0.0}), "OUT_OF_RANGE", "loram.lora.alpha"),
    "a LoRAM that drops all": (loram_with(lora={"dropout": 1.0}), "OUT_OF_RANGE", "loram.lora.dropout"),
    "LoRAM of nobody": (
        loram_with(lora={"target_modules": ["query"]}), "UNKNOWN_TARGET", "loram.lora.target_modules[0]",
    ),
    "a LoRAM rank of its own of nobody": (
        loram_with(lora={"rank": 1, "rank_pattern": {"w_proj": 1}}), "UNKNOWN_TARGET",
        "loram.lora.rank_pattern[w_proj]",
    ),
    "a rank over what is left of the channels": (
        loram_with(ratio="3/4", lora={"rank": 9, "target_modules": ["down_proj"]}), "RANK_TOO_LARGE",
        "loram.lora.rank",
    ),
    "a rank over another's cut": (
        loram_with(same_cut_as="rows", lora={"rank": 9}), "RANK_TOO_LARGE", "loram.lora.rank",
    ),
    "alignment on nothing": (
        loram_with(alignment=pb.LoramAlignment(steps=1)), "INVALID_DIGEST", "loram.alignment.dataset",
    ),
    "alignment in no steps": (
        loram_with(alignment=pb.LoramAlignment(dataset=OTHER, steps=0)), "OUT_OF_RANGE", "loram.alignment.steps",
    ),
    "alignment at a rate of 0": (
        loram_with(alignment=pb.LoramAlignment(dataset=OTHER, learning_rate=0.0)), "OUT_OF_RANGE",
        "loram.alignment.learning_rate",
    ),
    "alignment without a batch": (
        loram_with(alignment=pb.LoramAlignment(dataset=OTHER, batch_size=0)), "OUT_OF_RANGE",
        "loram.alignment.batch_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_followed_are_refused_by_the_fields_path(name: str) -> None:
    spec, reason, field = BAD[name]
    with pytest.raises(InvalidArgumentError) as caught:
        check_spec(spec, BASE)
    assert (caught.value.reason, caught.value.field) == (reason, f"spec.{field}")
    assert len(caught.value.message) < 400


def base_with_layers(number: int, num_heads: int, num_kv_heads: int) -> BaseSpec:
    """Return a base of some layers alike, with heads of 8."""
    sides = {
        "self_attn.q_proj": (64, 8 * num_heads), "self_attn.k_proj": (64, 8 * num_kv_heads),
        "self_attn.v_proj": (64, 8 * num_kv_heads), "self_attn.o_proj": (8 * num_heads, 64),
        "mlp.gate_proj": (64, 48), "mlp.up_proj": (64, 48), "mlp.down_proj": (48, 64),
    }  # fmt: skip
    linears = {f"model.layers.{layer}.{name}": both for layer in range(number) for name, both in sides.items()}
    layers = (LayerSpec(num_heads, num_kv_heads, 8, None),) * number
    return replace(BASE, layers=layers, linears=MappingProxyType({**linears, "lm_head": (64, 128)}))


@pytest.mark.parametrize(
    ("heads", "name", "ratio", "left"),
    [
        ((6, 2), "k_proj", "1/2", 8),
        ((6, 2), "q_proj", "1/2", 24),
        ((6, 2), "o_proj", "1/2", 24),
        ((6, 2), "v_proj", "0.49", 16),
        ((6, 2), "gate_proj", "0.65", 16),
        ((6, 2), "down_proj", "0.65", 16),
        ((4, 4), "q_proj", "0.65", 8),
        ((4, 4), "q_proj", "0", 32),
        ((12, 4), "o_proj", "1/4", 64),
        ((12, 4), "q_proj", "1/4", 64),
        ((12, 4), "q_proj", "1/2", 48),
    ],
)
def test_a_rank_fits_what_pruning_leaves_of_a_linear(heads: tuple[int, int], name: str, ratio: str, left: int) -> None:
    base = base_with_layers(8, *heads)
    for layer, largest in ((4, left), (5, left), (3, min(base.linears[path_of(3, name, base)])), (6, None)):
        path = path_of(layer, name, base)
        largest = min(base.linears[path]) if largest is None else largest
        for rank, fits in ((largest, True), (largest + 1, False)):
            spec = loram_with(layers="", ratio=ratio, lora={"rank": rank, "target_modules": [path]})
            if fits:
                assert check_spec(spec, base) == "loram"
                continue
            with pytest.raises(InvalidArgumentError, match=rf"{path}, which .*has {largest}$") as caught:
                check_spec(spec, base)
            assert caught.value.reason == "RANK_TOO_LARGE"
            assert ("pruned" in caught.value.message) == (largest < min(base.linears[path]))


def path_of(layer: int, name: str, base: BaseSpec) -> str:
    return next(path for path in base.linears if path.startswith(f"model.layers.{layer}.") and path.endswith(name))


def test_a_ratio_may_not_take_all_heads_where_each_has_its_own_keys() -> None:
    base = base_with_layers(8, 2, 2)
    assert check_spec(loram_with(layers="", ratio="1/2"), base) == "loram"
    with pytest.raises(InvalidArgumentError, match="2 key-value heads of layer 4") as caught:
        check_spec(loram_with(layers="", ratio="0.51"), base)
    assert (caught.value.reason, caught.value.field) == ("LEAVES_NOTHING", "spec.loram.ratio")
    assert check_spec(loram_with(layers="", ratio="0.51", pruning=UNSTRUCTURED), base) == "loram"


@pytest.mark.parametrize("settings", [{}, {"pruning": UNSTRUCTURED}, {"same_cut_as": "rows"}], ids=str)
def test_loram_is_refused_for_a_base_that_is_pruned_already(settings: dict[str, Any]) -> None:
    with pytest.raises(FailedPreconditionError, match="pruned already") as caught:
        check_spec(loram_with(**settings), replace(BASE, pruned_from="sha256:" + "a" * 64))
    assert (caught.value.reason, caught.value.field) == ("METHOD_NOT_FOR_BASE", "spec.method")


@pytest.mark.parametrize(
    "settings",
    [{}, {"pruning": UNSTRUCTURED}, {"pruning": SEMI}, {"same_cut_as": "rows"}, {"ratio": "0", "layers": ""}],
    ids=str,
)
def test_loram_is_refused_for_a_base_of_which_it_is_not_known_what_goes_together(settings: dict[str, Any]) -> None:
    base = replace(BASE, is_prunable=False, architecture="Gemma3ForCausalLM")
    if settings.get("ratio") == "0":
        assert check_spec(loram_with(**settings), base) == "loram", "nothing is pruned"
        return
    with pytest.raises(FailedPreconditionError, match="Gemma3ForCausalLM") as caught:
        check_spec(loram_with(**settings), base)
    assert (caught.value.reason, caught.value.field) == ("METHOD_NOT_FOR_BASE", "spec.method")


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_loram_is_refused_by_name_for_a_base_without_the_linears_that_it_prunes(name: str) -> None:
    without = {path: sides for path, sides in BASE.linears.items() if not path.endswith(name)}
    base = replace(BASE, linears=MappingProxyType(without))
    for settings in ({}, {"same_cut_as": "rows"}, {"pruning": UNSTRUCTURED}, {"pruning": SEMI}):
        with pytest.raises(FailedPreconditionError, match=name) as caught:
            check_spec(loram_with(**settings), base)
        assert (caught.value.reason, caught.value.field) == ("METHOD_NOT_FOR_BASE", "spec.method")


def test_what_a_spec_reads_is_in_the_order_of_its_fields() -> None:
    spec = loram_with(same_cut_as="rows@1", alignment=pb.LoramAlignment(dataset=OTHER))
    spec.gate.dataset = digest_of(b"held out")
    assert list(datasets_of(spec)) == [
        (spec.dataset, "spec.dataset"), (digest_of(b"held out"), "spec.gate.dataset"),
        (OTHER, "spec.loram.alignment.dataset"),
    ]  # fmt: skip
    assert [(one.name, one.field, one.kind) for one in adapters_of(spec)] == [
        ("rows@1", "spec.loram.same_cut_as", "loram")
    ]
    assert list(adapters_of(loram_with())) == []
