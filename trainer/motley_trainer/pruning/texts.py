"""Texts of a pruning: files cut into windows of tokens, and the parts of them that must never meet.

Owns how a file becomes windows, which windows are the calibration, and that perplexity is measured on others. Knows
nothing of models. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from motley_trainer.errors import TextError

HELD_OUT_SHARE = 5  # one window in so many is held out for evaluation, where no other text is given for it


@dataclass(frozen=True, slots=True)
class WindowedText:
    """One file as windows. Shapes: windows [N, T] token ids; what does not fill a window is left out."""

    windows: Tensor
    sha256: str


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text that a pruning learns from.

    Semantics: `calibration` is the drawn windows, `learnable` all that may be trained on, these among them; no window
    of the evaluation is one of them. `sha256` is "sha256:..." of the whole file.
    """

    calibration: Tensor
    learnable: Tensor
    sha256: str


def read_windows(path: Path, tokenizer: PreTrainedTokenizerBase, window: int, *, field: str) -> WindowedText:
    """Read a file, and cut the stream of its documents' tokens into windows.

    Semantics: a .jsonl file has a document in each line's `text`; any other is UTF-8 text with blank lines between
    documents. A document has the special tokens that the tokenizer gives it, and its end-of-sequence token.
    Raises: TextError with reason TEXT_UNREADABLE, or TEXT_TOO_SHORT if there is not one window.
    """
    try:
        content = path.read_bytes()
        documents = _documents(content.decode("utf-8"), is_json=path.suffix == ".jsonl")
    except (OSError, ValueError) as error:
        raise TextError(f"{path} cannot be read: {error}", reason="TEXT_UNREADABLE", field=field) from error
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document, verbose=False)
        if tokenizer.eos_token_id is not None and stream[-1:] != [tokenizer.eos_token_id]:
            stream.append(tokenizer.eos_token_id)
    num_windows = len(stream) // window
    if num_windows == 0:
        raise too_short(path, f"{len(stream)} tokens", f"{window} tokens", field)
    windows = torch.tensor(stream[: num_windows * window], dtype=torch.long).view(num_windows, window)
    return WindowedText(windows, f"sha256:{hashlib.sha256(content).hexdigest()}")


def draw_calibration(
    text: WindowedText, evaluation: WindowedText | None, *, num_windows: int, seed: int, path: Path
) -> tuple[CalibrationText, Tensor]:
    """Draw the calibration windows, and return with them the windows to evaluate on.

    Shapes: the second result [N, T].
    Semantics: without an evaluation text, the last windows of this one are held out for it.
    Raises: TextError with reason TEXT_TOO_SHORT if fewer windows are left than are to be drawn; TEXTS_OVERLAP if an
    evaluation text has a learnable window in it.
    """
    windows = text.windows
    if evaluation is None:
        num_held_out = math.ceil(len(windows) / HELD_OUT_SHARE)
        learnable, held_out = windows[:-num_held_out], windows[-num_held_out:]
    else:
        learnable, held_out = windows, evaluation.windows
    if len(learnable) < num_windows:
        held = "" if evaluation is not None else f" beside the {len(held_out)} held out for evaluation"
        raise too_short(path, f"{len(learnable)} windows{held}", f"{num_windows}", "calibration")
    _refuse_overlap(learnable, held_out)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(learnable), generator=generator)[:num_windows].sort().values
    return CalibrationText(learnable[drawn], learnable, text.sha256), held_out


def too_short(path: Path, found: str, wanted: str, field: str) -> TextError:
    """Make the refusal of a text with too little in it."""
    return TextError(f"{path} is too short: {found}, where {wanted} are needed", reason="TEXT_TOO_SHORT", field=field)


def _documents(content: str, *, is_json: bool) -> list[str]:
    if not is_json:
        parts = content.replace("\r\n", "\n").split("\n\n")
        return [part.strip("\n") for part in parts if part.strip()]
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError(f"line {number} is not an object with a text")
        documents.append(entry["text"])
    return documents


def _refuse_overlap(learnable: Tensor, held_out: Tensor) -> None:
    """Refuse an evaluation in which a window that may be learned from occurs, wherever it begins."""
    stream, size = held_out.flatten().numpy().tobytes(), held_out.element_size()
    for window in learnable:
        wanted = window.numpy().tobytes()
        place = stream.find(wanted)
        while place > 0 and place % size != 0:  # found across the bytes of two tokens: no token of it is the same
            place = stream.find(wanted, place + 1)
        if place >= 0:
            raise TextError(
                f"the evaluation has {len(window)} tokens in a row that may be learned from: its perplexity would "
                "flatter",
                reason="TEXTS_OVERLAP",
                field="evaluation",
            )
