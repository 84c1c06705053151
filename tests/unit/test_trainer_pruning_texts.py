"""Texts become windows; what is learned from and what is measured on never meet."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from architectures import build_model, make_tokenizer
from motley_trainer.errors import TextError
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.texts import CalibrationText, WindowedText, draw_calibration, read_windows
from torch import Tensor
from torch.nn.functional import cross_entropy

TOKENIZER = make_tokenizer("byte_level")
# Words of digests, so that no two documents have many tokens in a row in common.
DOCUMENTS = [" ".join(hashlib.sha256(bytes([n])).hexdigest()[at : at + 5] for at in range(0, 60, 5)) for n in range(40)]


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    else:
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def read(path: Path, window: int = 16) -> WindowedText:
    return read_windows(path, TOKENIZER, window, field="calibration")


def draw(
    text: WindowedText, evaluation: WindowedText | None = None, num: int = 4, seed: int = 0
) -> tuple[CalibrationText, Tensor]:
    return draw_calibration(text, evaluation, num_windows=num, seed=seed, path=Path("cal.txt"))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_documents_follow_one_another_each_with_its_end(tmp_path: Path, name: str) -> None:
    text = read(write(tmp_path / name, DOCUMENTS))
    stream = [token for document in DOCUMENTS for token in [*TOKENIZER.encode(document), TOKENIZER.eos_token_id]]
    assert text.windows.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert text.windows.shape == (len(stream) // 16, 16)
    assert text.sha256 == f"sha256:{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}"


def test_blank_lines_part_documents_and_single_breaks_do_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\n\r\n\r\nthree " + b"x" * 200)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "one\ntwo"}) + "\n\n" + json.dumps({"text": "three " + "x" * 200})
    )
    assert torch.equal(read(tmp_path / "a.txt").windows, read(tmp_path / "b.jsonl").windows)


def test_the_drawn_windows_depend_on_the_seed_alone(tmp_path: Path) -> None:
    text = read(write(tmp_path / "a.txt", DOCUMENTS))
    (first, _), (again, _), (other, _) = (draw(text, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.calibration, again.calibration)
    assert not torch.equal(first.calibration, other.calibration)
    assert len(first.calibration.unique(dim=0)) == 4


def test_without_another_text_the_end_is_held_out_and_never_drawn(tmp_path: Path) -> None:
    text = read(write(tmp_path / "a.txt", DOCUMENTS))
    num_held_out = math.ceil(len(text.windows) / 5)
    for seed in range(5):
        drawn, held_out = draw(text, num=20, seed=seed)
        assert torch.equal(held_out, text.windows[-num_held_out:])
        assert torch.equal(drawn.learnable, text.windows[:-num_held_out])
        learnable = {tuple(window) for window in drawn.learnable.tolist()}
        assert {tuple(window) for window in drawn.calibration.tolist()} <= learnable


def test_another_text_is_measured_whole(tmp_path: Path) -> None:
    text = read(write(tmp_path / "a.txt", DOCUMENTS))
    other = read(write(tmp_path / "b.txt", [document.upper() for document in DOCUMENTS]))
    drawn, held_out = draw(text, other)
    assert torch.equal(held_out, other.windows)
    assert torch.equal(drawn.learnable, text.windows)


@pytest.mark.parametrize("before", ["", "a few words in front, so that the windows lie elsewhere. "])
def test_an_evaluation_that_holds_a_learnable_window_is_refused_wherever_it_begins(tmp_path: Path, before: str) -> None:
    text = read(write(tmp_path / "a.txt", DOCUMENTS))
    other = read(write(tmp_path / "b.txt", [before + DOCUMENTS[7], *(document.upper() for document in DOCUMENTS)]))
    with pytest.raises(TextError, match="would flatter") as refused:
        draw(text, other)
    assert (refused.value.reason, refused.value.field) == ("TEXTS_OVERLAP", "evaluation")


def test_a_text_that_repeats_itself_overlaps_with_its_own_end(tmp_path: Path) -> None:
    with pytest.raises(TextError) as refused:
        draw(read(write(tmp_path / "a.txt", DOCUMENTS[:1] * 40)))
    assert refused.value.reason == "TEXTS_OVERLAP"


def test_bytes_that_agree_across_tokens_are_no_overlap() -> None:
    learnable = torch.tensor([[256, 256]])  # as bytes, 00 01 00 ..., which is found in 1, 1, 1 one byte in
    shifted = torch.frombuffer(bytearray(b"\x09" + learnable.numpy().tobytes() + b"\x09" * 7), dtype=torch.int64)
    text, other = WindowedText(learnable, "sha256:"), WindowedText(shifted[None], "sha256:")
    drawn, held_out = draw(text, other, num=1)
    assert len(drawn.learnable) == len(held_out) == 1


def test_a_text_that_is_too_short_is_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"too short: \d+ tokens, where 16 tokens are needed") as refused:
        read(write(tmp_path / "a.txt", ["ab"]))
    assert (refused.value.reason, refused.value.field) == ("TEXT_TOO_SHORT", "calibration")
    text = read(write(tmp_path / "b.txt", DOCUMENTS[:3]))
    with pytest.raises(TextError, match="held out for evaluation, where 90 are needed") as refused:
        draw(text, num=90)
    assert refused.value.reason == "TEXT_TOO_SHORT"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.txt", None),
        ("latin.txt", "zwölf".encode("latin-1") * 50),
        ("broken.jsonl", b'{"text": "a"}\n{'),
        ("other.jsonl", b'{"texts": "a"}\n'),
        ("list.jsonl", b'["a"]\n'),
        ("number.jsonl", b'{"text": 1}\n'),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=name) as refused:
        read(tmp_path / name)
    assert refused.value.reason == "TEXT_UNREADABLE"


def test_perplexity_is_that_of_each_window_on_its_own() -> None:
    model = build_model("llama", vocab_size=50)
    windows = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0]
            losses += [float(cross_entropy(logits[place], window[place + 1])) for place in range(8)]
    for batch_size in (1, 2, 16):
        found = perplexity(model, windows, batch_size=batch_size)
        assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
