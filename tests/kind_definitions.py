"""Each kind by its own paper, on a copied model: what answers under an adapter are held against.

Reads an adapter's files by themselves and shares no code with what serves them. S2FT and the low-rank kinds are weights
added to a copy's; GOAT is its published form, where a residual is taken out of the copy's weight and each token's
experts are added as it passes. A set is the weighted sum of all that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Members = Sequence[tuple[Path, float]]


@dataclass
class Experts:
    """GOAT's experts at one Linear, and which of them each token took."""

    a: Tensor
    b: Tensor
    router: Tensor
    scale: float
    top_k: int
    routes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the experts' share of the output, by methods' section 2.4: softmax over all, top k, renormalised."""
        num_experts = len(self.router)
        expert_rank = len(self.a) // num_experts
        chances = torch.softmax(x @ self.router.T, -1)
        values, chosen = chances.topk(self.top_k, -1)
        shares = torch.zeros_like(chances).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        self.routes.extend(tuple(sorted(route)) for route in chosen.reshape(-1, self.top_k).tolist())
        total = torch.zeros(*x.shape[:-1], len(self.b))
        for expert in range(num_experts):
            rows = slice(expert * expert_rank, (expert + 1) * expert_rank)
            total = total + shares[..., expert : expert + 1] * (x @ self.a[rows].T @ self.b[:, rows].T)
        return self.scale * total


@dataclass(frozen=True)
class Definition:
    """A model that is a set of adapters, and the experts in it by module path, one a GOAT adapter."""

    model: PreTrainedModel
    experts: Mapping[str, list[Experts]]


def define(checkpoint: Path, members: Members) -> Definition:
    """Copy a base and make it what a weighted set of adapter directories means."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    experts: dict[str, list[Experts]] = {}
    with torch.no_grad():
        for directory, weight in members:
            manifest = _manifest(directory)
            if manifest["kind"] == "goat":
                _add_goat(model, directory, manifest["goat"], weight, experts)
            elif manifest["kind"] == "s2ft":
                _add_s2ft(model, directory, manifest["s2ft"], weight)
            else:
                for path, delta in low_rank_deltas(checkpoint, directory).items():
                    model.get_submodule(path).weight += weight * delta
    return Definition(model, experts)


def low_rank_deltas(checkpoint: Path, directory: Path) -> dict[str, Tensor]:
    """Return what PEFT itself would merge into each Linear."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    peft_model = PeftModel.from_pretrained(model, directory)
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for path, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "motley_manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"kind": "lora"}


def _add_s2ft(model: PreTrainedModel, directory: Path, facts: dict[str, Any], weight: float) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    for path, side in facts["modules"].items():
        base, block = model.get_submodule(path).weight, tensors[f"{path}.s2_weight"]
        channels = tensors[f"{path}.s2_idx"].long()
        if side == "input":
            base[:, channels] += weight * block
        else:
            base[channels] += weight * block


def _add_goat(
    model: PreTrainedModel, directory: Path, facts: dict[str, Any], weight: float, experts: dict[str, list[Experts]]
) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    residuals = load_file(directory / "goat_residual.safetensors")
    for path, scale in facts["scales"].items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        coefficient = 1 / (facts["rho"] * facts["experts"])
        linear.weight -= weight * coefficient * residuals[f"{path}.residual_B"] @ residuals[f"{path}.residual_A"]
        chosen = Experts(
            tensors[f"{path}.goat_A"], tensors[f"{path}.goat_B"], tensors[f"{path}.goat_router"], scale, facts["top_k"]
        )
        experts.setdefault(path, []).append(chosen)
        linear.register_forward_hook(lambda module, inputs, output, chosen=chosen: output + weight * chosen(inputs[0]))
