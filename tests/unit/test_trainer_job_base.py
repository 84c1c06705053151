"""The base of a job computes what the served one does, and can be trained through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from job_folders import make_job
from motley_bases.errors import UnsupportedBaseError
from motley_bases.loader import PlainBase
from motley_trainer.bases.quantize import quantize_base
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.errors import SettingsError
from motley_trainer.job.base import load_job_base
from motley_trainer.job.files import JobFiles
from motley_trainer.methods.lora import Lora
from motley_trainer.methods.method import Context
from motley_trainer.spec.settings import LoraSettings
from torch import Tensor
from transformers import AutoModelForCausalLM

TOKENS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(9))
LEARNED = Batch(TOKENS, torch.ones_like(TOKENS), TOKENS)


def load(directory: Path, *, dtype: str = "float32", quantization: str = "none") -> PlainBase:
    return load_job_base(directory, name="named", dtype=dtype, device=torch.device("cpu"), quantization=quantization)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


@pytest.mark.parametrize(
    ("family", "fields", "attention"),
    [
        ("llama", {}, "sdpa"),
        ("mistral", {}, "sdpa"),
        ("qwen2", {}, "sdpa"),
        ("gemma2", {}, "eager"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "eager"),
    ],
)
def test_attention_means_what_eager_does_with_windows_and_soft_caps(
    tmp_path: Path, family: str, fields: dict[str, Any], attention: str
) -> None:
    base = load(build_checkpoint(family, tmp_path, **fields))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(base.model), logits(eager), rtol=1e-4, atol=1e-4)
    assert base.model.config._attn_implementation == attention
    assert base.spec.name == "named"
    attached = Lora(LoraSettings(2)).attach(base.model, Context(base.spec, 0, lambda count: []), None)
    summed_loss(base.model, LEARNED).backward()
    assert all(factor.grad is not None for factor in attached.parameters.values())


def test_a_float16_base_is_trained_in_float32(tmp_path: Path) -> None:
    build_checkpoint("llama", tmp_path, dtype=torch.float16)
    assert load(tmp_path, dtype="auto").spec.dtype == "float32"
    assert load(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_quantized_base_is_trained_as_it_is_and_no_other_way(tmp_path: Path) -> None:
    plain, stored = build_checkpoint("llama", tmp_path / "plain"), tmp_path / "stored"
    quantize_base(plain, "nf4", stored)
    base = load(stored, quantization="nf4")
    assert base.spec.quantization == "nf4"
    assert base.spec.fingerprint == load(plain).spec.fingerprint
    assert torch.equal(logits(base.model), logits(load(plain, quantization="nf4").model))
    with pytest.raises(SettingsError) as refused:
        load(stored, quantization="none")
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", "quantization")


def test_a_base_that_is_not_served_is_not_trained(tmp_path: Path) -> None:
    build_checkpoint("phi3_longrope", tmp_path)
    with pytest.raises(UnsupportedBaseError):
        load(tmp_path)


# --- What a job is asked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("job_id", ""), ("base", None), ("base_name", 3), ("dtype", "float16"), ("served_quantization", "fp4"),
        ("device", "tpu"), ("spec", []), ("more", 1),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused_by_its_field(tmp_path: Path, name: str, value: object) -> None:
    folder = make_job(tmp_path, [])
    content = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(SettingsError) as refused:
        JobFiles(folder).request()
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", name)


def test_adapters_beside_a_job_are_in_their_order(tmp_path: Path) -> None:
    for index in (10, 2, 0, 1):
        (tmp_path / "adapters" / str(index)).mkdir(parents=True)
    (tmp_path / "adapters" / ".new-3").mkdir()
    assert [path.name for path in JobFiles(tmp_path).adapters()] == ["0", "1", "2", "10"]
