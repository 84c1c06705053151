"""The check of a training spec: every bound on both of its sides, what does not go together, by the field's path."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from motley.v1 import training_pb2 as pb
from motley_server.errors import FailedPreconditionError, InvalidArgumentError, MotleyError
from motley_server.rpc.convert_training import METHODS
from motley_server.rpc.training_bounds import BOUNDS
from motley_server.rpc.training_spec import check_spec
from rpc_harness import CONTEXT, make_base
from training_calls import digest_of, samples, spec_with

BASE = make_base()
MIB = 1 << 20
OTHER = digest_of(samples(seed=1))


def s2ft_with(**settings: Any) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_S2FT, s2ft=pb.S2ftSettings(**settings))


def optimized_with(**settings: Any) -> pb.TrainingSpec:
    return spec_with(optimizer=pb.OptimizerSettings(**settings))


def gated_with(**settings: Any) -> pb.TrainingSpec:
    return spec_with(gate=pb.Gate(**settings))


def refused(spec: pb.TrainingSpec) -> MotleyError:
    with pytest.raises(MotleyError) as caught:
        check_spec(spec, BASE)
    return caught.value


FULL_PATH = "model.layers.0.mlp.down_proj"
GOOD: dict[str, pb.TrainingSpec] = {
    "nothing but what must be": spec_with(),
    "LoRA as it comes": spec_with(lora={}),
    "s2ft as it comes": s2ft_with(),
    "s2ft without settings": spec_with(method=pb.TRAINING_METHOD_S2FT),
    "the largest rank": spec_with(lora={"rank": 8}),
    "a larger rank where it fits": spec_with(lora={"rank": 16, "target_modules": ["q_proj", FULL_PATH]}),
    "ranks of their own": spec_with(lora={"rank": 4, "rank_pattern": {"q_proj": 16, "self_attn.k_proj": 1}}),
    "a longer name goes before": spec_with(
        lora={"rank": 4, "target_modules": ["down_proj"], "rank_pattern": {"down_proj": 4096, "mlp.down_proj": 16}}
    ),
    "the logits' Linear by name": spec_with(lora={"rank": 16, "target_modules": ["lm_head"]}),
    "alphas of their own": spec_with(lora={"rank": 2, "alpha": 0.5, "alpha_pattern": {"up_proj": 3.5}}),
    "dropout": spec_with(lora={"rank": 2, "dropout": 0.999}),
    "one share of four": s2ft_with(up_share=1.0),
    "some shares of nothing": s2ft_with(o_share=0.0, v_share=0.001),
    "apart from others": s2ft_with(disjoint_from=["rows", "rows@2", "other/rows@prod"], calibration_samples=1),
    "a step": spec_with(steps=1),
    "many steps": spec_with(steps=10_000_000),
    "half an epoch": spec_with(epochs=0.5),
    "a part of the usual batch": spec_with(micro_batch_size=4),
    "a batch in parts": spec_with(batch_size=6, micro_batch_size=3),
    "two tokens": spec_with(max_length=2),
    "all the context": spec_with(max_length=CONTEXT),
    "warm up but for a step": spec_with(steps=10, optimizer=pb.OptimizerSettings(warmup_steps=9)),
    "no warm-up in one step": spec_with(steps=1, optimizer=pb.OptimizerSettings(warmup_steps=0)),
    "no clipping": optimized_with(max_gradient_norm=0.0, beta1=0.0, beta2=0.0, weight_decay=0.0),
    "nf4": spec_with(quantization="nf4"),
    "none": spec_with(quantization="none"),
    "a gate": gated_with(dataset=OTHER, max_loss_ratio=0.5, min_exact_match=0.0),
    "any seed": spec_with(seed=-(1 << 63)),
    "no alias moved": spec_with(publish={"keep_aliases": True}),
    "aliases and labels": spec_with(publish={"aliases": ["default", "prod"], "labels": {"team": "search"}}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_spec_that_can_be_followed_is_let_through(name: str) -> None:
    assert check_spec(GOOD[name], BASE) == METHODS[GOOD[name].method]


BAD: dict[str, tuple[pb.TrainingSpec, str, str]] = {
    "nothing": (pb.TrainingSpec(), "METHOD_REQUIRED", "method"),
    "settings of s2ft for LoRA": (
        spec_with(s2ft=pb.S2ftSettings()), "SETTINGS_OF_ANOTHER_METHOD", "s2ft",
    ),
    "settings of LoRA for s2ft": (
        spec_with(method=pb.TRAINING_METHOD_S2FT, lora={}), "SETTINGS_OF_ANOTHER_METHOD", "lora",
    ),
    "settings of GOAT for LoRAM": (
        spec_with(method=pb.TRAINING_METHOD_LORAM, goat=pb.GoatSettings()), "SETTINGS_OF_ANOTHER_METHOD", "goat",
    ),
    "settings of LoRA for LoRAM": (
        spec_with(method=pb.TRAINING_METHOD_LORAM, lora={}), "SETTINGS_OF_ANOTHER_METHOD", "lora",
    ),
    "no dataset": (spec_with(dataset=""), "INVALID_DIGEST", "dataset"),
    "a dataset by another name": (spec_with(dataset="sha256:" + "A" * 64), "INVALID_DIGEST", "dataset"),
    "a gate's dataset by another name": (gated_with(dataset="mine"), "INVALID_DIGEST", "gate.dataset"),
    "a quantization of int8": (spec_with(quantization="int8"), "UNKNOWN_QUANTIZATION", "quantization"),
    "rank 0": (spec_with(lora={"rank": 0}), "OUT_OF_RANGE", "lora.rank"),
    "rank 4097": (spec_with(lora={"rank": 4097}), "OUT_OF_RANGE", "lora.rank"),
    "a rank over the smaller side": (spec_with(lora={"rank": 9}), "RANK_TOO_LARGE", "lora.rank"),
    "a rank over a target's smaller side": (
        spec_with(lora={"rank": 17, "target_modules": ["q_proj"]}), "RANK_TOO_LARGE", "lora.rank",
    ),
    "a rank of its own over the smaller side": (
        spec_with(lora={"rank": 4, "rank_pattern": {"v_proj": 9}}), "RANK_TOO_LARGE", "lora.rank_pattern[v_proj]",
    ),
    "a rank of its own of nothing": (
        spec_with(lora={"rank": 4, "rank_pattern": {"v_proj": 0}}), "OUT_OF_RANGE", "lora.rank_pattern[v_proj]",
    ),
    "a rank of nobody": (
        spec_with(lora={"rank": 4, "rank_pattern": {"w_proj": 1}}), "UNKNOWN_TARGET", "lora.rank_pattern[w_proj]",
    ),
    "a rank of what is not trained": (
        spec_with(lora={"rank": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 1}}),
        "UNKNOWN_TARGET", "lora.rank_pattern[v_proj]",
    ),
    "a rank of the logits' Linear, which is not trained": (
        spec_with(lora={"rank": 4, "rank_pattern": {"lm_head": 1}}), "UNKNOWN_TARGET", "lora.rank_pattern[lm_head]",
    ),
    "alpha 0": (spec_with(lora={"alpha": 0.0}), "OUT_OF_RANGE", "lora.alpha"),
    "alpha of its own NaN": (
        spec_with(lora={"rank": 4, "alpha_pattern": {"q_proj": math.nan}}), "OUT_OF_RANGE",
        "lora.alpha_pattern[q_proj]",
    ),
    "an alpha of nobody": (
        spec_with(lora={"rank": 4, "alpha_pattern": {"": 1.0}}), "UNKNOWN_TARGET", "lora.alpha_pattern[]",
    ),
    "dropout of all": (spec_with(lora={"dropout": 1.0}), "OUT_OF_RANGE", "lora.dropout"),
    "a target that matches nothing": (
        spec_with(lora={"rank": 4, "target_modules": ["q_proj", "query"]}), "UNKNOWN_TARGET",
        "lora.target_modules[1]",
    ),
    "a part of a name": (
        spec_with(lora={"rank": 4, "target_modules": ["proj"]}), "UNKNOWN_TARGET", "lora.target_modules[0]",
    ),
    "an empty target": (
        spec_with(lora={"rank": 4, "target_modules": [""]}), "UNKNOWN_TARGET", "lora.target_modules[0]",
    ),
    "targets without end": (
        spec_with(lora={"target_modules": ["q_proj"] * 1025}), "OUT_OF_RANGE", "lora.target_modules",
    ),
    "ranks without end": (
        spec_with(lora={"rank_pattern": {str(number): 1 for number in range(1025)}}), "OUT_OF_RANGE",
        "lora.rank_pattern",
    ),
    "aliases named and kept": (
        spec_with(publish={"aliases": ["prod"], "keep_aliases": True}), "ALIASES_KEPT", "publish.aliases",
    ),
    "a share above all": (s2ft_with(o_share=1.01), "OUT_OF_RANGE", "s2ft.o_share"),
    "a share below nothing": (s2ft_with(up_share=-0.1), "OUT_OF_RANGE", "s2ft.up_share"),
    "a share of NaN": (s2ft_with(v_share=math.nan), "OUT_OF_RANGE", "s2ft.v_share"),
    "shares of nothing": (s2ft_with(o_share=0.0, down_share=0.0), "SELECTS_NOTHING", "s2ft"),
    "no samples to score on": (s2ft_with(calibration_samples=0), "OUT_OF_RANGE", "s2ft.calibration_samples"),
    "apart from a bad name": (
        s2ft_with(disjoint_from=["rows", "Rows"]), "INVALID_ADAPTER_NAME", "s2ft.disjoint_from[1]",
    ),
    "apart from one twice": (s2ft_with(disjoint_from=["a", "b", "a"]), "DUPLICATE_ADAPTER", "s2ft.disjoint_from[2]"),
    "apart from too many": (
        s2ft_with(disjoint_from=[f"a{number}" for number in range(33)]), "OUT_OF_RANGE", "s2ft.disjoint_from",
    ),
    "no steps": (spec_with(steps=0), "OUT_OF_RANGE", "steps"),
    "too many steps": (spec_with(steps=10_000_001), "OUT_OF_RANGE", "steps"),
    "no epochs": (spec_with(epochs=0.0), "OUT_OF_RANGE", "epochs"),
    "epochs without end": (spec_with(epochs=math.inf), "OUT_OF_RANGE", "epochs"),
    "no batch": (spec_with(batch_size=0), "OUT_OF_RANGE", "batch_size"),
    "a batch without end": (spec_with(batch_size=65537), "OUT_OF_RANGE", "batch_size"),
    "no part of a batch": (spec_with(micro_batch_size=0), "OUT_OF_RANGE", "micro_batch_size"),
    "parts that do not fit": (spec_with(batch_size=8, micro_batch_size=3), "BATCH_NOT_DIVISIBLE", "micro_batch_size"),
    "a part larger than the whole": (
        spec_with(micro_batch_size=32), "BATCH_NOT_DIVISIBLE", "micro_batch_size",
    ),
    "a token": (spec_with(max_length=1), "OUT_OF_RANGE", "max_length"),
    "more than the context": (spec_with(max_length=CONTEXT + 1), "OUT_OF_RANGE", "max_length"),
    "no checkpoints": (spec_with(checkpoint_steps=0), "OUT_OF_RANGE", "checkpoint_steps"),
    "a rate of 0": (optimized_with(learning_rate=0.0), "OUT_OF_RANGE", "optimizer.learning_rate"),
    "a rate of infinity": (optimized_with(learning_rate=math.inf), "OUT_OF_RANGE", "optimizer.learning_rate"),
    "a negative warm-up": (optimized_with(warmup_steps=-1), "OUT_OF_RANGE", "optimizer.warmup_steps"),
    "a warm-up over all steps": (
        spec_with(steps=10, optimizer=pb.OptimizerSettings(warmup_steps=10)), "OUT_OF_RANGE",
        "optimizer.warmup_steps",
    ),
    "a negative decay": (optimized_with(weight_decay=-0.1), "OUT_OF_RANGE", "optimizer.weight_decay"),
    "beta1 of 1": (optimized_with(beta1=1.0), "OUT_OF_RANGE", "optimizer.beta1"),
    "beta2 below 0": (optimized_with(beta2=-0.1), "OUT_OF_RANGE", "optimizer.beta2"),
    "a negative norm": (optimized_with(max_gradient_norm=-1.0), "OUT_OF_RANGE", "optimizer.max_gradient_norm"),
    "a ratio of 0": (gated_with(max_loss_ratio=0.0), "OUT_OF_RANGE", "gate.max_loss_ratio"),
    "more than every answer": (gated_with(min_exact_match=1.5), "OUT_OF_RANGE", "gate.min_exact_match"),
    "no name": (spec_with(publish={"adapter_name": ""}), "INVALID_ADAPTER_NAME", "publish.adapter_name"),
    "another's name": (
        spec_with(publish={"adapter_name": "other/mine"}), "INVALID_ADAPTER_NAME", "publish.adapter_name",
    ),
    "an alias of digits": (spec_with(publish={"aliases": ["prod", "3"]}), "INVALID_ALIAS", "publish.aliases[1]"),
    "aliases without end": (
        spec_with(publish={"aliases": [f"a{number}" for number in range(101)]}), "OUT_OF_RANGE", "publish.aliases",
    ),
    "a label of capitals": (spec_with(publish={"labels": {"Team": "a"}}), "INVALID_LABEL", "publish.labels"),
    "a label of the server's": (
        spec_with(publish={"labels": {"motley.job": "job-0"}}), "INVALID_LABEL", "publish.labels[motley.job]",
    ),
    "as many labels as there may be, and the server's": (
        spec_with(publish={"labels": {f"l{number}": "" for number in range(32)}}), "INVALID_LABEL", "publish.labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_spec_that_cannot_be_followed_is_refused_by_the_fields_path(name: str) -> None:
    spec, reason, field = BAD[name]
    error = refused(spec)
    assert isinstance(error, InvalidArgumentError)
    assert (error.reason, error.field) == (reason, f"spec.{field}")
    assert len(error.message) < 400


def test_every_number_of_a_spec_has_bounds() -> None:
    numbers = {
        f"{prefix}{field.name}"
        for prefix, message in (
            ("", pb.TrainingSpec), ("lora.", pb.LoraSettings), ("s2ft.", pb.S2ftSettings), ("goat.", pb.GoatSettings),
            ("loram.", pb.LoramSettings), ("loram.lora.", pb.LoraSettings), ("loram.alignment.", pb.LoramAlignment),
            ("loqt.", pb.LoqtSettings), ("loram.alignment.loqt.", pb.LoqtSettings),
            ("optimizer.", pb.OptimizerSettings), ("gate.", pb.Gate),
        )
        for field in message.DESCRIPTOR.fields
        if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_DOUBLE)
    }  # fmt: skip
    assert set(BOUNDS) == numbers - {"seed", "max_length"}  # any will do; and the base's own


@pytest.mark.parametrize(("share", "name"), [("o_share", "o_proj"), ("down_share", "down_proj"), ("v_share", "v_proj")])
def test_s2ft_is_refused_by_name_for_a_base_without_its_linears(share: str, name: str) -> None:
    without = {path: sides for path, sides in BASE.linears.items() if not path.endswith(name)}
    base = replace(BASE, linears=MappingProxyType(without))
    spec = s2ft_with(**{share: 0.5})
    with pytest.raises(FailedPreconditionError) as caught:
        check_spec(spec, base)
    assert (caught.value.reason, caught.value.field) == ("METHOD_NOT_FOR_BASE", "spec.method")
    assert name in caught.value.message
    assert check_spec(s2ft_with(up_share=0.5), base) == "s2ft"


def test_a_base_of_two_layers_needs_them_in_both() -> None:
    base = replace(BASE, layers=BASE.layers * 2)
    with pytest.raises(FailedPreconditionError, match=r"model\.layers\.1\.self_attn\.o_proj"):
        check_spec(s2ft_with(), base)


def test_s2ft_as_it_comes_takes_heads_and_channels() -> None:
    without = {path: sides for path, sides in BASE.linears.items() if not path.endswith(("v_proj", "up_proj"))}
    assert check_spec(s2ft_with(), replace(BASE, linears=MappingProxyType(without))) == "s2ft"
