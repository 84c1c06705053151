"""What is refused, by name: by the config, by the attention function, and by the probe on planted wrong models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint, build_model, edit_json
from motley_bases import probe as probe_module
from motley_bases.attention import ATTENTION_NAME, attend_packed, register_attention
from motley_bases.errors import UnsupportedBaseError
from motley_bases.loader import load_base
from motley_bases.probe import probe
from motley_kernels.paged_attention import paged_attention
from motley_kernels.paged_attention.types import LayerKV, PagedBatch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

CPU = torch.device("cpu")
VOCAB = 326


def refusal(directory: Path) -> UnsupportedBaseError:
    with pytest.raises(UnsupportedBaseError) as caught:
        load_base(directory, dtype="float32", device=CPU)
    return caught.value


def probe_refusal(model: PreTrainedModel) -> UnsupportedBaseError:
    with pytest.raises(UnsupportedBaseError) as caught:
        probe(model)
    return caught.value


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_attention()


@pytest.mark.parametrize(
    ("name", "reason", "field", "word"),
    [
        ("falcon", "OWN_ATTENTION", "architectures", "FalconForCausalLM"),
        ("bloom", "OWN_ATTENTION", "architectures", "BloomForCausalLM"),
        ("mpt", "OWN_ATTENTION", "architectures", "MptForCausalLM"),
        ("gptj", "OWN_ATTENTION", "architectures", "GPTJForCausalLM"),
        ("llama_dynamic_rope", "ROPE_TYPE", "rope_parameters.rope_type", "dynamic"),
        ("phi3_longrope", "ROPE_TYPE", "rope_parameters.rope_type", "longrope"),
        ("llama4_text", "LAYER_TYPE", "layer_types", "chunked_attention"),
        ("lfm2", "LAYER_TYPE", "layer_types", "conv"),
        ("gpt_oss", "ATTENTION_ARGUMENT", "s_aux", "s_aux"),
    ],
)
def test_a_family_that_would_be_served_wrongly_is_refused_by_name(
    name: str, reason: str, field: str, word: str, tmp_path: Path
) -> None:
    error = refusal(build_checkpoint(name, tmp_path / name))
    assert (error.reason, error.field) == (reason, field)
    assert word in error.message


@pytest.mark.parametrize(
    ("model_type", "reason", "field"),
    [
        ("t5", "ENCODER_DECODER", "is_encoder_decoder"),
        ("gemma3", "MULTIMODAL", "vision_config"),
        ("qwen3_next", "LAYER_TYPE", "layer_types"),
        ("vit", "NOT_A_CAUSAL_LM", "architectures"),
    ],
)
def test_a_config_alone_is_enough_to_refuse(model_type: str, reason: str, field: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert (error.reason, error.field) == (reason, field)


def test_code_brought_by_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('the code ran')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    edit_json(tmp_path / "config.json", model_type="own", auto_map=auto_map)
    assert (refusal(tmp_path).reason, refusal(tmp_path).field) == ("REMOTE_CODE", "auto_map")
    edit_json(tmp_path / "config.json", auto_map=None)
    assert refusal(tmp_path).reason == "UNKNOWN_MODEL_TYPE"


def test_a_known_model_type_is_served_without_the_code_it_brings(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    (directory / "configuration_own.py").write_text("raise SystemExit('the code ran')\n", encoding="utf-8")
    edit_json(directory / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    assert load_base(directory, dtype="auto", device=CPU).spec.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "QUANTIZED_CHECKPOINT", "quantization_config"),
        ({"is_causal": False}, "NOT_CAUSAL", "is_causal"),
        ({"use_bidirectional_attention": True}, "NOT_CAUSAL", "use_bidirectional_attention"),
    ],
)
def test_a_config_field_that_changes_the_answers_is_refused(
    fields: dict[str, Any], reason: str, field: str, tmp_path: Path
) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    edit_json(directory / "config.json", **fields)
    assert (refusal(directory).reason, refusal(directory).field) == (reason, field)


def test_a_sound_model_passes_and_is_measured() -> None:
    report = probe(build_model("gemma3_text", vocab_size=VOCAB))
    assert [layer.sliding_window for layer in report.layers] == [6, 6, None]
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in report.layers} == {(4, 2, 24)}
    assert len(report.linears) == 3 * 7 + 1


def test_the_probe_leaves_no_hooks_and_our_attention() -> None:
    model = build_model("llama", vocab_size=VOCAB)
    probe(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    assert not any(module._forward_pre_hooks for module in model.modules())


# Planted: kernels that do something else than the model means.


def see_everything_before(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch, **how: Any) -> Tensor:
    return paged_attention(q, k, v, kv, batch, **{**how, "sliding_window": None})


def see_one_token_more(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch, **how: Any) -> Tensor:
    return paged_attention(q, k, v, kv, batch, **{**how, "sliding_window": how["sliding_window"] + 1})


def forget_the_soft_cap(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch, **how: Any) -> Tensor:
    return paged_attention(q, k, v, kv, batch, **{**how, "softcap": None})


def forget_earlier_chunks(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch, **how: Any) -> Tensor:
    return paged_attention(q, k, v, kv, replace(batch, seq_lens=batch.query_lens), **how)


def read_the_neighbours_blocks(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch, **how: Any) -> Tensor:
    paged_attention(q, k, v, kv, batch, **how)
    swapped = replace(batch, block_tables=batch.block_tables.flip(0))
    return paged_attention(q, k, v, kv, swapped, **how)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mistral", see_everything_before),
        ("mistral", see_one_token_more),
        ("gemma2", forget_the_soft_cap),
        ("llama", forget_earlier_chunks),
        ("llama", read_the_neighbours_blocks),
    ],
)
def test_the_probe_catches_a_wrong_attention(
    name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(name, vocab_size=VOCAB)
    probe(model)
    monkeypatch.setattr(probe_module, "paged_attention", wrong)
    assert probe_refusal(model).reason == "PROBE_DIFFERS"


# Planted: models that are not what their config says.


def test_the_probe_catches_a_window_that_attention_is_not_told_of() -> None:
    model = build_model("mistral", vocab_size=VOCAB, sliding_window=4096)

    class Blind:
        sliding_window = None

        def __getattr__(self, name: str) -> Any:
            return getattr(model.config, name)

    model.get_submodule("model.layers.1.self_attn").config = Blind()  # type: ignore[assignment]
    error = probe_refusal(model)
    assert (error.reason, error.field) == ("WINDOW", "sliding_window")
    assert "layer 1" in error.message


def test_the_probe_catches_a_layer_that_keeps_its_own_attention() -> None:
    model = build_model("llama", vocab_size=VOCAB)
    stubborn = copy.deepcopy(model.config)
    stubborn._attn_implementation = "eager"
    model.get_submodule("model.layers.1.self_attn").config = stubborn  # type: ignore[assignment]
    error = probe_refusal(model)
    assert error.reason == "NOT_EVERY_LAYER"
    assert "2 of 3" in error.message


def test_the_probe_catches_a_layer_that_mixes_tokens_outside_attention() -> None:
    class Mixing(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.mlp(x)) + 0.1 * x.cumsum(dim=1)

    model = build_model("llama", vocab_size=VOCAB)
    layer = model.get_submodule("model.layers.0")
    layer.mlp = Mixing(layer.get_submodule("mlp"))
    assert probe_refusal(model).reason == "PROBE_DIFFERS"


def test_a_linear_that_is_not_called_once_on_every_row_takes_no_adapter() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x)) + nn.functional.linear(x, self.weight)  # type: ignore[no-any-return]

    model = build_model("llama", vocab_size=VOCAB)
    odd = Twice(64, 64, bias=False)
    odd.inner = nn.Linear(64, 64)
    model.get_submodule("model.layers.0.self_attn").o_proj = odd
    model.get_submodule("model").unused = nn.Linear(64, 64)
    linears = probe(model).linears
    assert "model.layers.0.self_attn.o_proj" in linears
    assert "model.layers.0.self_attn.o_proj.inner" not in linears
    assert "model.unused" not in linears
    assert "lm_head" in linears


def test_a_forward_that_takes_no_keywords_is_refused() -> None:
    class Closed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor, attention_mask: Any, position_embeddings: Any) -> Any:
            return self.inner(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)

    model = build_model("llama", vocab_size=VOCAB)
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[0].self_attn = Closed(layers[0].get_submodule("self_attn"))
    assert probe_refusal(model).reason == "FORWARD_FAILS"


class Echo:
    """A context whose attention returns its queries."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return q


def attention_module(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in {"layer_idx": 0, "is_causal": True, **attributes}.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"something_new": 0}, "something_new"),
        ({"something_new": False}, "something_new"),
        ({"dropout": 0.1}, "dropout"),
        ({"use_cache": True}, "use_cache"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask"),
        ({"motley_attention": None}, "motley_attention"),
    ],
)
def test_an_attention_argument_that_is_not_understood_is_refused(keywords: dict[str, Any], field: str) -> None:
    q = torch.zeros(1, 2, 3, 4)
    given = {"attention_mask": None, "motley_attention": Echo(), "scaling": 1.0, **keywords}
    with pytest.raises(UnsupportedBaseError, match=field) as caught:
        attend_packed(attention_module(), q, q, q, **given)
    assert caught.value.field == field


def test_arguments_that_ask_for_nothing_are_let_through() -> None:
    q = torch.randn(1, 2, 3, 4)
    output, weights = attend_packed(
        attention_module(),
        q,
        q,
        q,
        None,
        s_aux=None,
        output_attentions=False,
        output_router_logits=False,
        position_ids=torch.zeros(1, 3),
        motley_attention=Echo(),
    )
    assert weights is None
    assert torch.equal(output, q.transpose(1, 2))


def test_an_attention_that_is_not_causal_or_has_no_layer_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    for attributes, field in (({"is_causal": False}, "is_causal"), ({"layer_idx": None}, "layer_idx")):
        with pytest.raises(UnsupportedBaseError) as caught:
            attend_packed(attention_module(**attributes), q, q, q, None, motley_attention=Echo())
        assert caught.value.field == field
