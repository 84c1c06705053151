"""The least that a job's adapter takes, told from its spec: exactly what the tensors take that the trainer writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from motley.v1 import training_pb2 as pb
from motley_bases.loader import load_base, load_model
from motley_bases.spec import LayerSpec
from motley_server.rpc.training_sizes import least_adapter_bytes
from motley_trainer.methods import method_of
from motley_trainer.methods.method import Context
from motley_trainer.spec import settings as trainer
from rpc_harness import make_base
from small_trainings import SPEC
from training_calls import spec_with
from written_tensors import tensor_bytes


def lora(**settings: Any) -> pb.TrainingSpec:
    return spec_with(lora=settings)


def goat(**settings: Any) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_GOAT, goat=pb.GoatSettings(**settings))


def loram(**settings: Any) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_LORAM, loram=pb.LoramSettings(**settings))


def s2ft(**settings: Any) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_S2FT, s2ft=pb.S2ftSettings(**settings))


def test_a_lora_takes_its_factors() -> None:
    base = make_base()  # sides of 16, 8 and 32
    sides = {"q": 32, "k": 24, "v": 24, "o": 32, "gate": 48, "up": 48, "down": 48, "lm_head": 144}
    everywhere = sum(sides.values()) - sides["lm_head"]
    assert least_adapter_bytes(spec_with(), base) == 4 * 8 * everywhere
    assert least_adapter_bytes(lora(rank=3), base) == 4 * 3 * everywhere
    named = lora(rank=2, target_modules=["q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
    assert least_adapter_bytes(named, base) == 4 * 2 * (32 + 48 + 144)
    ranks = lora(rank=2, rank_pattern={"q_proj": 5, "self_attn.q_proj": 7, "down_proj": 1})
    assert least_adapter_bytes(ranks, base) == 4 * (2 * everywhere + 5 * 32 - 48)


def test_a_loram_takes_what_its_lora_would_on_the_whole_base() -> None:
    base = make_base()
    inner = {"rank": 2, "target_modules": ["q_proj", "mlp.up_proj"], "rank_pattern": {"up_proj": 3}}
    assert least_adapter_bytes(loram(lora=inner), base) == least_adapter_bytes(lora(**inner), base) > 0
    assert least_adapter_bytes(loram(ratio="3/4"), base) == least_adapter_bytes(spec_with(), base)


CASES: dict[str, tuple[pb.TrainingSpec, trainer.Settings]] = {
    "lora": (
        lora(rank=2, target_modules=["q_proj", "down_proj"], rank_pattern={"mlp.down_proj": 3}),
        trainer.LoraSettings(
            rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), rank_pattern={"mlp.down_proj": 3}
        ),
    ),
    "s2ft as it comes": (s2ft(), trainer.S2ftSettings(o_share=0.05, down_share=0.02)),
    "s2ft everywhere": (
        s2ft(o_share=0.5, down_share=0.1, v_share=0.5, up_share=0.29),
        trainer.S2ftSettings(o_share=0.5, down_share=0.1, v_share=0.5, up_share=0.29),
    ),
    "s2ft of all layers": (
        s2ft(down_share=0.1, o_share=0.3, budget=pb.CHANNEL_BUDGET_GLOBAL),
        trainer.S2ftSettings(down_share=0.1, o_share=0.3, budget=trainer.ChannelBudget.GLOBAL),
    ),
    "goat as it comes": (goat(), trainer.GoatSettings()),
    "goat of two": (
        goat(rank=6, experts=3, target_modules=["q_proj", "mlp.down_proj", "lm_head"]),
        trainer.GoatSettings(rank=6, experts=3, target_modules=("q_proj", "mlp.down_proj", "lm_head")),
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of 3 layers of 4 query heads over 2, 16 channels a head, 96 FFN channels."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_trainer_writes(name: str, checkpoint: Path, tmp_path: Path) -> None:
    spec, settings = CASES[name]
    base = load_base(checkpoint, dtype="float32", device=torch.device("cpu")).spec
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), "none")
    method_of(replace(SPEC, settings=settings)).attach(model, Context(base, 0, lambda count: []), None).write(
        tmp_path, {}
    )
    assert least_adapter_bytes(spec, base) == tensor_bytes(tmp_path) > 0


def test_of_a_share_of_all_layers_the_smallest_are_taken() -> None:
    base = make_base()
    path, other = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"
    sides = {path: (16, 16), other: (8, 16)}
    mixed = replace(base, layers=(LayerSpec(2, 1, 8, None), LayerSpec(2, 1, 4, None)), linears=sides)
    whole = s2ft(o_share=0.5, budget=pb.CHANNEL_BUDGET_GLOBAL)
    assert least_adapter_bytes(whole, mixed) == 4 * 2 * (4 * 17)
    assert least_adapter_bytes(s2ft(o_share=0.5), mixed) == 4 * (8 * 17 + 4 * 17)


def test_a_method_that_is_not_known_takes_nothing() -> None:
    assert least_adapter_bytes(spec_with(method=0), make_base()) == 0
