"""Documents packed into rows of token ids, with a label only where there is something to learn.

Owns how a document becomes tokens and labels and how documents share a row. Knows nothing of models or optimisers.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from prose import document
from skills import answer, draw_word, prompt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNLABELLED = -100


class Piece(NamedTuple):
    """One document: its tokens and, for each, whether the model is to learn to predict it."""

    tokens: list[int]
    learned: list[bool]


class Batch(NamedTuple):
    """Rows ready for a step. Shapes: tokens, targets [rows, T]; mask [rows, 1, T, T], True where attention may look."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor


def prose_piece(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Piece:
    """Draw prose; every token of it is learned, <bos> and <eos> too."""
    tokens = [*tokenizer.encode(document(rng)), tokenizer.eos_token_id]
    return Piece(tokens, [True] * len(tokens))


def skill_piece(tokenizer: PreTrainedTokenizerBase, rng: random.Random, skill: str) -> Piece:
    """Draw one line of `skill`; only the answer is learned, as nothing could predict which word is asked about."""
    word = draw_word(rng, held=False)
    asked = tokenizer.encode(prompt(skill, word))
    answered = [*tokenizer.encode(answer(skill, word), add_special_tokens=False), tokenizer.eos_token_id]
    return Piece(asked + answered, [True] + [False] * (len(asked) - 1) + [True] * len(answered))


def pack(draw: Callable[[], Piece], rng: random.Random, rows: int, length: int) -> Batch:
    """Fill `rows` rows of `length` tokens with documents, the last of a row cut where the row ends.

    Semantics: in every other row, on average, a document sees those before it, as in a conversation; in the rest it
    sees only itself, as a prompt on its own does. The target of a position is the token after it.
    """
    tokens = torch.empty(rows, length + 1, dtype=torch.long)
    targets = torch.empty(rows, length + 1, dtype=torch.long)
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1, 1)
    for row in range(rows):
        pieces: list[Piece] = []
        while sum(len(piece.tokens) for piece in pieces) <= length:
            pieces.append(draw())
        ids = torch.tensor([token for piece in pieces for token in piece.tokens])[: length + 1]
        learned = torch.tensor([flag for piece in pieces for flag in piece.learned])[: length + 1]
        tokens[row], targets[row] = ids, ids.where(learned, UNLABELLED)
        if rng.random() < 0.5:
            owner = torch.tensor([place for place, piece in enumerate(pieces) for _ in piece.tokens])[:length]
            mask[row, 0] &= owner[:, None] == owner[None, :]
    return Batch(tokens[:, :-1], targets[:, 1:], mask)
