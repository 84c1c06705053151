"""Teach a pruned copy of the tiny base a missing skill and bring it back (LoRAM): `python recipes/tiny/train_loram.py`.

Owns the order of things: prune, align on the base's own text, train a LoRA on the smaller model, scatter it to the
base's shapes, and hold it to the gate: it must help on the whole base, or it is not saved. Run `train_base.py` first.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from answering import held_out_words, share_right
from folders import described_base, tidy
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.reader import read_adapter
from motley_bases.fingerprint import fingerprint
from peft import LoraConfig, get_peft_model
from pruning import Plan, Shares, draw_plan, prune, recover
from safetensors.torch import load_file, save_file
from teaching import BASE_NAME, LINEARS, Setting, load_base, parse_setting, record_lesson, teach
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from wearing import wear

SKILL = "previous"
SHARES = Shares()
ALIGNMENT = Setting(steps=40, lr=1e-4, kept_share=1.0)
# Of the draws of heads, one that keeps what copies the first letter: a head that is back on the whole base and was not
# there in training goes on with what it did before, and the adapter never learned to outvote it. So do FFN channels:
# with a quarter of those of the last layer but one gone too, half of the answers came back wrong.
PRUNING_SEED = 4
LAYERS = [4, 5, 6, 7]  # that get a LoRA; what lies before them feeds them alike on the copy and on the whole base
CHECKED_WORDS = 100


class GateError(Exception):
    """Say that the recovered adapter does not help the base it is meant for."""


def main() -> None:
    """Train, recover, save in bfloat16 and record what each model scores."""
    options, setting = parse_setting(argparse.ArgumentParser(description=__doc__), Setting(steps=200, lr=3e-3))
    began = time.monotonic()
    whole, tokenizer = load_base()
    pruned, _ = load_base()
    plan = draw_plan(whole, SHARES, PRUNING_SEED)
    prune(pruned, plan)
    _align(pruned, tokenizer)
    trained_on = _fingerprint(pruned)
    sizes = {"base_parameters": whole.num_parameters(), "pruned_parameters": pruned.num_parameters()}
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, layers_to_transform=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(pruned, config)
    teach(pruned, [weight for weight in model.parameters() if weight.requires_grad], tokenizer, SKILL, setting)
    words = held_out_words(SKILL, CHECKED_WORDS)
    scores = {"pruned_with_lora": share_right(model.eval(), tokenizer, SKILL, words)}
    config.base_model_name_or_path = BASE_NAME
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, SKILL)
        model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks a hub for the base
        _recover(folder, plan, whole)
        scores |= _pass_gate(folder, whole.eval(), tokenizer, words)
        provenance = {
            "exact_match": scores,
            "made_by": "recipes/tiny/train_loram.py",
            "seed": setting.seed,
            "pruning_seed": PRUNING_SEED,
        }
        write_loram_manifest(folder, described_base(), trained_on=trained_on, provenance=provenance)
        tidy(
            folder, SKILL, "A LoRA trained on a pruned copy and recovered (LoRAM), in PEFT's format,", "train_loram.py"
        )
        shutil.copytree(folder, options.out / SKILL, dirs_exist_ok=True)
    record_lesson(SKILL, setting, began, alignment_steps=ALIGNMENT.steps, **sizes, **scores)


def _align(pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train the layers on the base's own text; the embedding, tied to the head, stays."""
    layers = pruned.model.layers.requires_grad_(True)
    teach(pruned, layers.parameters(), tokenizer, "alignment", ALIGNMENT)
    layers.requires_grad_(False)


def _fingerprint(model: PreTrainedModel) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return fingerprint(Path(scratch))


def _recover(folder: Path, plan: Plan, whole: PreTrainedModel) -> None:
    """Scatter the saved factors to the base's shapes, in bfloat16, in the file that PEFT wrote."""
    path = folder / "adapter_model.safetensors"
    factors = {key: factor.to(torch.bfloat16) for key, factor in load_file(path).items()}
    save_file(recover(plan, whole, factors), path, metadata={"format": "pt"})


def _pass_gate(
    folder: Path, whole: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> dict[str, float]:
    """Measure the whole base without and with the recovered adapter. Raises: GateError unless it helps."""
    adapter = read_adapter(folder, described_base())
    scores = {"base_alone": share_right(whole, tokenizer, SKILL, words)}
    with wear(whole, [(adapter, 1.0)]):
        scores["base_with_recovered"] = share_right(whole, tokenizer, SKILL, words)
    if scores["base_with_recovered"] <= scores["base_alone"]:
        raise GateError(f"{SKILL} on the whole base: {scores}")
    return scores


if __name__ == "__main__":
    main()
