"""An S2FT adapter exported as LoRA is the same function, to PEFT and to our own reader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapter_files import spec_of, tiny_spec, write
from applied_adapters import applied, logits
from architectures import build_model
from kind_adapters import layer_linears, make_s2ft, some_channels
from motley_adapters.errors import AdapterError
from motley_adapters.export import export_s2ft_as_lora
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.reader import read_adapter
from motley_bases.spec import BaseSpec
from peft import PeftModel

TOKENS = (5, 17, 33, 8, 64, 3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_peft_gives_the_same_logits(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture, vocab_size=80)
    base = spec_of(model)
    directory = make_s2ft(tmp_path / "s2ft", base, seed=1)
    export_s2ft_as_lora(directory, tmp_path / "lora", base)
    alone = logits(model, TOKENS)
    with applied(model, (read_adapter(directory, base), 1.0)):
        ours = logits(model, TOKENS)
    with applied(model, (read_adapter(tmp_path / "lora", base), 1.0)):
        torch.testing.assert_close(logits(model, TOKENS), ours, rtol=1e-5, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(peft_model, TOKENS), ours, rtol=1e-5, atol=1e-4)
    assert (ours - alone).abs().max() > 0.1


def twelve_layers(tmp_path: Path) -> tuple[BaseSpec, Path]:
    """Write an adapter whose rank is another in every Linear, layers 1 and 11 included."""
    base = spec_of(build_model("llama", vocab_size=80, num_hidden_layers=12))
    generator = torch.Generator().manual_seed(2)
    blocks = {}
    for i, path in enumerate(layer_linears(base, ["down_proj"])):
        indices = some_channels(96, i + 1, generator)
        blocks[path] = ChannelBlock("input", indices, torch.randn(64, i + 1, generator=generator))
    write_s2ft(tmp_path / "s2ft", base, blocks)
    return base, tmp_path / "s2ft"


def test_the_scale_is_one_at_every_rank(tmp_path: Path) -> None:
    base, directory = twelve_layers(tmp_path)
    s2ft = read_adapter(directory, base)
    export_s2ft_as_lora(s2ft, tmp_path / "lora", base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert len(config["rank_pattern"]) == 12
    lora = read_adapter(tmp_path / "lora", base)
    assert lora.spec.ranks == s2ft.spec.ranks
    assert set(lora.spec.scalings.values()) == {1.0}


def test_the_block_is_stored_bit_for_bit(tmp_path: Path) -> None:
    base, directory = twelve_layers(tmp_path)
    s2ft = read_adapter(directory, base)
    export_s2ft_as_lora(directory, tmp_path / "lora", base)
    for path, unit in read_adapter(tmp_path / "lora", base).units.items():
        assert torch.equal(unit.b, s2ft.units[path].b)
        assert torch.equal(unit.a.nonzero()[:, 1], s2ft.units[path].inputs.long())
        assert torch.equal(unit.a.sum(dim=1), torch.ones(unit.rank))


def test_another_kind_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        export_s2ft_as_lora(write(tmp_path / "plain"), tmp_path / "lora", tiny_spec())
    assert (caught.value.reason, caught.value.field) == ("UNSUPPORTED_KIND", "motley_manifest.kind")
    assert not (tmp_path / "lora").exists()
