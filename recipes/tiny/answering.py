"""Ask a model the prompts of a skill, greedily, and mark the answers.

Owns what counts as right: the whole answer, then <eos>. Works for the base and for a model with an adapter alike.
"""

import random

import torch
from skills import answer, draw_word, prompt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_ANSWER = 17  # tokens: a space, seven letters twice, <eos>, and one to spare


def held_out_words(skill: str, count: int) -> list[str]:
    """List `count` different words for `skill` that no training line used, the same ones every time."""
    rng = random.Random(f"held out for {skill}")
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw_word(rng, held=True)] = None
    return list(words)


def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str, words: list[str]) -> float:
    """Give the share of `words` for which the answer matches exactly and then ends."""
    answers = complete(model, tokenizer, [prompt(skill, word) for word in words])
    wanted = [answer(skill, word) + str(tokenizer.eos_token) for word in words]
    return sum(given == right for given, right in zip(answers, wanted, strict=True)) / len(words)


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Complete each prompt greedily; <eos> is written out, so that an answer that ended shows it."""
    asked = tokenizer(prompts, padding=True, return_tensors="pt")
    given = model.generate(**asked, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    texts: list[str] = tokenizer.batch_decode(given[:, asked["input_ids"].shape[1] :])
    return [text.replace(str(tokenizer.pad_token), "") for text in texts]
