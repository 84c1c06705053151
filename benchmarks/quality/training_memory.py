"""What training takes in memory, by method: counted on one base and one batch, beside what formulas say.

Every cell is measured in a process of its own: the bytes of what is trained, of gradients and of moments; what autograd
keeps of a forward pass, by hooks; and by how much the process grows while it takes a few steps. The weights are random,
since sizes do not depend on them; a seed is a repetition.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that are started from here: what is freed goes back at once, or growth could take place in it.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")

import torch
import training_memory_plan as plan
from cells import Row, measure_cells, parse_options, write
from costs import CPU
from kept_tensors import kept_tensors
from motley_bases.checkpoint import resolve_base
from motley_bases.loader import PlainBase
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.job.base import load_job_base
from motley_trainer.job.loop import set_training
from motley_trainer.methods.lora import Lora
from motley_trainer.methods.method import Attached, Context
from motley_trainer.methods.s2ft import S2ft
from motley_trainer.spec.settings import LoraSettings, S2ftSettings
from subject import EMBEDDED
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def write_base(directory: Path, num_layers: int = plan.LAYERS) -> Path:
    """Write a random Llama, with the tokenizer of the embedded base."""
    config = LlamaConfig(
        hidden_size=plan.HIDDEN,
        intermediate_size=plan.FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=plan.HEADS,
        num_key_value_heads=plan.KV_HEADS,
        vocab_size=plan.VOCABULARY,
        max_position_embeddings=plan.LENGTH,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in resolve_base(EMBEDDED).glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def measure(cell: plan.Cell, seed: int, *, checkpoint: Path) -> Row:
    """Measure one method on the CPU, and on a GPU too where there is one."""
    torch.set_num_threads(1)
    row = measure_on(CPU, cell, seed, checkpoint)
    if torch.cuda.is_available():
        row["cuda_growth"] = measure_on(torch.device("cuda"), cell, seed, checkpoint)["growth"]
    return row


def measure_on(device: torch.device, cell: plan.Cell, seed: int, checkpoint: Path) -> Row:
    """Take some steps of training, and count.

    Semantics: `growth` is by how much memory grew over what was held before the first step, at most; `held` is that.
    """
    base = load_job_base(checkpoint, name="random", dtype=cell.dtype, device=device, quantization=cell.quantization)
    weights = storage_bytes((*base.model.parameters(), *base.model.buffers()))
    trained = attach(base, cell, seed)
    batch = draw_batch(seed).to(device)
    with torch.no_grad():
        summed_loss(base.model, batch)  # what libraries set up once is no part of a step
    peak = Peak(device)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0) if trained else None
    for _ in range(plan.STEPS):
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        summed_loss(base.model, batch).backward()
        if optimizer is not None:
            optimizer.step()
    growth = peak.growth()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    state = [] if optimizer is None else [value for moments in optimizer.state.values() for value in moments.values()]
    base.model.zero_grad(set_to_none=True)
    with kept_tensors(base.model) as kept:
        loss = summed_loss(base.model, batch)
    assert loss.requires_grad
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": weights,
        "scales": storage_bytes(scales(base.model)),
        "state": storage_bytes((*trained, *gradients, *state)),
        "kept": sum(kept.by_all.values()),
        "kept_by_linears": sum(kept.by_linears.values()),
        "growth": growth,
        "held": peak.before,
    }


def attach(base: PlainBase, cell: plan.Cell, seed: int) -> list[nn.Parameter]:
    """Make a base one that is trained by a method, and return what is trained.

    Semantics: where nothing is, gradients go through the base all the same, from its first layer on.
    """
    model: PreTrainedModel = base.model
    if cell.method == plan.FULL:
        model.requires_grad_(True)
        return list(model.parameters())
    if cell.method == plan.FROZEN:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return []
    context = Context(base.spec, seed, lambda count: [])
    attached: Attached
    if cell.method == plan.LORA:
        attached = Lora(LoraSettings(rank=plan.RANK, alpha=2.0 * plan.RANK)).attach(model, context, None)
    else:
        attached = S2ft(S2ftSettings(o_share=plan.O_SHARE, down_share=plan.DOWN_SHARE)).attach(model, context, None)
    set_training(model, attached, True)
    return list(attached.parameters.values())


def draw_batch(seed: int) -> Batch:
    """Draw samples of equal length, all of whose tokens are learned."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, plan.VOCABULARY, (plan.ROWS, plan.LENGTH), generator=generator)
    return Batch(tokens, torch.ones_like(tokens), tokens)


def scales(model: nn.Module) -> Iterator[Tensor]:
    """Yield what goes with weights in 4 bits: their scales, the scales of these, and the tables of both."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    for state in (state for state in states if state is not None):
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what tensors hold, every storage once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


class Peak:
    """The most that is held from now on, over what is held now: by torch on a GPU, by this process else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self.before = resident("VmRSS")

    def growth(self) -> int:
        """Return by how many bytes it grew at most."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self.before
        return resident("VmHWM") - self.before


def resident(name: str) -> int:
    """Return what the system says of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_base(Path(folder, "base"))
        cells = measure_cells(plan.CELLS, partial(measure, checkpoint=checkpoint), options, is_alone=True)
    setting: dict[str, Any] = {
        "rows": plan.ROWS,
        "length": plan.LENGTH,
        "steps": plan.STEPS,
        "layers": plan.LAYERS,
        "hidden": plan.HIDDEN,
    }
    write("quality_training_memory", {"setting": setting, "cells": cells}, options)


if __name__ == "__main__":
    main()
