"""Adapters of every kind that each make one token near-certain, so that an answer shows which adapter made it.

All of them write a token's direction from the last layer's down_proj, which in the base made here reads much the same
vector whatever the prompt: its embedding has a part that all tokens share.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from architectures import build_checkpoint
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, write_goat
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_bases.base import Base
from motley_bases.loader import load_base
from torch import Tensor
from transformers import AutoModelForCausalLM

KINDS = ("lora", "s2ft", "goat", "loram")
FIRST_MARKER = 20  # ids below are special tokens
STRENGTH = 40.0  # of the direction that is written, in lengths of the hidden state
GEOMETRY = GoatGeometry(experts=2, top_k=1, rank=4, rho=10.0, segments="head")


def make_marker_base(directory: Path) -> Path:
    """Write a random checkpoint whose hidden states have much in common, whatever the prompt."""
    build_checkpoint("llama", directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        common = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(1))
        embedding += 4 * common * embedding.norm(dim=1).mean() / common.norm()
    model.save_pretrained(directory)
    return directory


def marker_of(index: int) -> int:
    """Return the token that adapter `index` makes near-certain."""
    return FIRST_MARKER + index


class MarkerMaker:
    """Write marker adapters for one base."""

    def __init__(self, base: Base, checkpoint: Path) -> None:
        layers = [path for path in base.spec.linears if path.endswith("mlp.down_proj")]
        self.path, self.other_path = layers[-1], layers[0]
        self.base = base
        self._checkpoint = checkpoint
        self._read, self._hidden_length = common_input(checkpoint, self.path, base.spec.vocab_size)
        heads = base.tensor(f"{base.spec.lm_head_path}.weight").detach().clone()
        self._directions = heads / heads.norm(dim=1, keepdim=True)

    def fresh_base(self) -> Base:
        """Load the base again: one that no other engine has bound anything to."""
        return load_base(self._checkpoint, dtype="float32", device=torch.device("cpu"))

    def make(self, directory: Path, index: int, kind: str, seed: int = 0) -> Path:
        """Write the adapter that makes `marker_of(index)` near-certain; `seed` varies its rank and its noise."""
        direction = self._directions[marker_of(index)] * self._hidden_length * STRENGTH
        write: Callable[[Path, Tensor, random.Random], None] = getattr(self, f"_write_{kind}")
        write(directory, direction, random.Random(1000 * seed + index))
        return directory

    def _write_lora(self, directory: Path, direction: Tensor, rng: random.Random) -> None:
        write_peft_lora(directory, self._pairs(direction, self._read / self._read.norm() ** 2, rng))

    def _write_loram(self, directory: Path, direction: Tensor, rng: random.Random) -> None:
        kept = torch.zeros_like(self._read)
        kept[torch.tensor(rng.sample(range(len(kept)), len(kept) // 2))] = 1.0
        read = self._read * kept
        write_peft_lora(directory, self._pairs(direction, read / read.norm() ** 2, rng))
        write_loram_manifest(directory, self.base.spec)

    def _pairs(self, direction: Tensor, read: Tensor, rng: random.Random) -> dict[str, LoraPair]:
        rank = rng.choice((1, 2, 4, 8))
        a, b = read.repeat(rank, 1), direction[:, None].repeat(1, rank) / rank
        noise = torch.Generator().manual_seed(rng.randrange(2**31))
        weak = LoraPair(0.01 * torch.randn(a.shape, generator=noise), 0.01 * torch.randn(b.shape, generator=noise))
        return {self.path: LoraPair(a, b), self.other_path: weak}

    def _write_s2ft(self, directory: Path, direction: Tensor, rng: random.Random) -> None:
        indices = torch.tensor(sorted(rng.sample(range(len(self._read)), rng.choice((24, 32, 48)))))
        read = self._read[indices]
        weight = direction[:, None] * (read / read.norm() ** 2)[None]
        write_s2ft(directory, self.base.spec, {self.path: ChannelBlock("input", indices.to(torch.int32), weight)})

    def _write_goat(self, directory: Path, direction: Tensor, rng: random.Random) -> None:
        rows = GEOMETRY.rank // GEOMETRY.experts
        a = (self._read / self._read.norm() ** 2).repeat(GEOMETRY.rank, 1)
        b = direction[:, None].repeat(1, GEOMETRY.rank) / rows
        noise = torch.Generator().manual_seed(rng.randrange(2**31))
        shared = torch.Generator().manual_seed(7)  # the residual is one, whatever the adapter
        module = GoatModule(
            a=a,
            b=b,
            router=torch.randn(GEOMETRY.experts, len(self._read), generator=noise),
            scale=1.0,
            residual_a=0.1 * torch.randn(a.shape, generator=shared),
            residual_b=0.1 * torch.randn(b.shape, generator=shared),
        )
        write_goat(directory, self.base.spec, GEOMETRY, {self.path: module})


def common_input(checkpoint: Path, path: str, vocab_size: int) -> tuple[Tensor, float]:
    """Return what a Linear reads on average, and how long the hidden state that it adds to is."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, given, __: seen.append(given[0]))
    tokens = torch.randint(0, vocab_size, (16, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        hidden = model(tokens, output_hidden_states=True).hidden_states[-2]
    hook.remove()
    inputs = seen[0].reshape(-1, seen[0].shape[-1])
    mean = inputs.mean(dim=0)
    agreement = torch.nn.functional.cosine_similarity(inputs, mean[None], dim=1)
    assert float(agreement.min()) > 0.3, "the base's hidden states have too little in common"
    return mean.clone(), float(hidden.norm(dim=-1).mean())


def draw_prompts(vocab_size: int, count: int, seed: int) -> Sequence[list[int]]:
    """Draw prompts of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocab_size) for _ in range(rng.randint(1, 24))] for _ in range(count)]
