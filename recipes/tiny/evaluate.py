"""Measure the tiny base and its adapters on words held out of training: `python recipes/tiny/evaluate.py`.

Owns what is measured, writes it to results.json and rewrites the base's card from there. Reads the files as a user
would get them, in float32 and in bfloat16.
"""

import argparse
import os
import random
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning barriers starve every neighbour

import torch
from answering import held_out_words, share_right
from card import write_card
from folders import ASSETS as ADAPTERS
from folders import described_base
from motley_adapters.reader import read_adapter
from motley_adapters.spec import Adapter
from prose import VOCABULARY, document, words_of
from record import machine, record, results
from skills import KNOWN, SKILLS
from train_base import ASSETS as BASE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from wearing import wear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FUSION = {"next": 0.9, "unvowel": 0.9}  # two adapters on one request, as `motley demo` asks for them


def main() -> None:
    """Measure everything, print it as a table and rewrite the card."""
    options = _options()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    words = {skill: held_out_words(skill, options.prompts) for skill in SKILLS}
    base = {name: _skills(_load(dtype), tokenizer, words) for name, dtype in DTYPES.items()}
    facts = described_base()
    read = {folder.name: read_adapter(folder, facts) for folder in sorted(ADAPTERS.iterdir()) if folder.is_dir()}
    adapters = {
        name: _describe(adapter) | _worn([(adapter, 1.0)], [name], tokenizer, words) for name, adapter in read.items()
    }
    worn = [(read[name], weight) for name, weight in FUSION.items()]
    fusion = {"weights": FUSION} | _worn(worn, list(FUSION), tokenizer, words)
    prose = {name: _prose(_load(dtype), tokenizer, options) for name, dtype in DTYPES.items()}
    setting = {"prompts_per_skill": options.prompts, "seed": options.seed, "machine": machine()}
    record("evaluation", setting | {"base": base, "adapters": adapters, "fusion": fusion, "prose": prose})
    write_card(BASE / "README.md", results())
    _print_table(base, adapters, prose)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts for each skill")
    parser.add_argument("--continuations", type=int, default=200, help="sampled pieces of prose")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _load(dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=dtype)
    return model.eval()


def _skills(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: dict[str, list[str]]
) -> dict[str, float]:
    return {skill: round(share_right(model, tokenizer, skill, asked), 4) for skill, asked in words.items()}


def _describe(adapter: Adapter) -> dict[str, Any]:
    """Say of what kind and how big an adapter is: its rank or channels at each Linear, smallest to largest."""
    spec = adapter.spec
    sizes = sorted({unit.rank for unit in adapter.units.values()})
    return {"kind": spec.kind, "ranks": sizes, "linears": len(adapter.units)}


def _worn(
    adapters: list[tuple[Adapter, float]],
    skills: list[str],
    tokenizer: PreTrainedTokenizerBase,
    words: dict[str, list[str]],
) -> dict[str, Any]:
    """Measure adapters, worn together, on their skills in both dtypes, and how much of the base's knowledge they keep.

    Semantics: the figure of a dtype is the worst skill's.
    """
    measured: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        with wear(_load(dtype), adapters) as model:
            taught = _skills(model, tokenizer, {skill: words[skill] for skill in skills})
            measured[name] = min(taught.values())
            if dtype is torch.float32:
                kept = _skills(model, tokenizer, {skill: words[skill][:100] for skill in KNOWN})
                measured |= {"known_skills_kept": round(sum(kept.values()) / len(kept), 4), "skills": taught}
    return measured


@torch.inference_mode()
def _prose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, float | int]:
    """Sample continuations at temperature 1, half of them of nothing, half of the first words of a document."""
    torch.manual_seed(options.seed)
    rng = random.Random(f"prose {options.seed}")
    half = options.continuations // 2
    begun = [" ".join(document(rng).split()[: rng.randint(1, 4)]) + " " for _ in range(half)]
    words: list[str] = []
    ended = 0
    for prompts in ([""] * (options.continuations - half), begun):
        asked = tokenizer(prompts, padding=True, return_tensors="pt")
        given = model.generate(**asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=200)
        for tokens in given[:, asked["input_ids"].shape[1] :]:
            finished = tokenizer.eos_token_id in tokens
            written = words_of(tokenizer.decode(tokens, skip_special_tokens=True))
            words += written if finished else written[:-1]  # the last word may be cut
            ended += finished
    known = sum(word in VOCABULARY for word in words)
    return {
        "continuations": options.continuations,
        "ended": ended,
        "words": len(words),
        "words_in_vocabulary": round(known / len(words), 4),
    }


def _print_table(
    base: dict[str, dict[str, float]], adapters: dict[str, dict[str, Any]], prose: dict[str, dict[str, float | int]]
) -> None:
    print(f"{'skill':10} {'base fp32':>10} {'base bf16':>10} {'with adapter fp32':>18} {'with adapter bf16':>18}")
    for skill in SKILLS:
        taught = [f"{adapters[skill][name]:.1%}" if skill in adapters else "" for name in DTYPES]
        mine = [f"{base[name][skill]:.1%}" for name in DTYPES]
        print(f"{skill:10} {mine[0]:>10} {mine[1]:>10} {taught[0]:>18} {taught[1]:>18}")
    for name, measured in prose.items():
        print(f"prose {name}: {measured['words_in_vocabulary']:.1%} of {measured['words']} words are in the vocabulary")


if __name__ == "__main__":
    main()
