"""Alignment: every weight but the head's learns, zeros of a mask stay, and a run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_model, make_tokenizer
from job_folders import write_dataset
from motley_trainer.data.lines import Passage
from motley_trainer.data.samples import encode, encode_passages
from motley_trainer.errors import DataError
from motley_trainer.job.alignment import FIELD, Alignment, AllWeights, FullRank, alignment_spec, read_alignment
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.reporting import JobCancelledError, Reporter
from motley_trainer.job.schedule import rate
from motley_trainer.pruning.masks import ShareMask
from motley_trainer.pruning.sample_windows import cut_samples
from motley_trainer.pruning.sparse_gpt import sparsify
from motley_trainer.spec.settings import LoramAlignment, LoramSettings, OverLength, TrainingMethod
from small_trainings import SPEC, VOCABULARY, random_data, stop_after
from torch import Tensor
from transformers import PreTrainedModel

ASKED = LoramAlignment("sha256:", steps=6, learning_rate=1e-2, batch_size=3)
TOKENIZER = make_tokenizer("byte_level")
TEXT = [{"text": f"number {number} is {number * 7}"} for number in range(30)]


def aligned(
    folder: Path,
    name: str = "llama",
    *,
    pruned: Collection[str] = (),
    stops: tuple[int, ...] = (),
    model: PreTrainedModel | None = None,
) -> dict[str, Tensor]:
    """Align a small model, stopped and begun again as often as is said, and return its weights."""
    spec = alignment_spec(replace(SPEC, checkpoint_steps=4), ASKED)
    for stop in (*stops, None):
        of = (model or build_model(name, vocab_size=VOCABULARY)).requires_grad_(False)
        alignment = Alignment(of, spec, random_data(), pruned)
        reporter = Reporter(lambda event: None, stop_after(stop) if stop else lambda: False)
        try:
            FullRank().align(alignment, Checkpoints(folder, {"copy": "a"}), reporter)
        except JobCancelledError:
            assert stop
    return {name: weight.clone() for name, weight in of.state_dict().items()}


def test_every_weight_learns_but_those_that_give_the_logits(tmp_path: Path) -> None:
    before = build_model("llama", vocab_size=VOCABULARY).state_dict()
    after = aligned(tmp_path)
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == ["lm_head.weight"]


def test_a_tied_embedding_gives_the_logits_too(tmp_path: Path) -> None:
    before = build_model("llama_tied", vocab_size=VOCABULARY).state_dict()
    after = aligned(tmp_path, "llama_tied")
    same = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert same == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("stops", [(1,), (3, 2)], ids=str)
def test_an_alignment_that_is_begun_again_gives_the_same_bits(tmp_path: Path, stops: tuple[int, ...]) -> None:
    undisturbed = aligned(tmp_path / "undisturbed")
    again = aligned(tmp_path / "stopped", stops=stops)
    assert all(torch.equal(weight, again[name]) for name, weight in undisturbed.items())


def test_weights_that_were_set_to_zero_stay_so(tmp_path: Path) -> None:
    windows = torch.randint(0, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(1))
    for keeps_zeros in (True, False):
        model = build_model("llama", vocab_size=VOCABULARY)
        sparsify(model, windows, range(3), ShareMask(LoramSettings().ratio))
        zeros = {name: weight == 0 for name, weight in model.state_dict().items() if "_proj" in name}
        after = aligned(tmp_path / str(keeps_zeros), pruned=zeros if keeps_zeros else (), model=model)
        still = [bool((after[name][of] == 0).all()) for name, of in zeros.items()]
        assert all(still) if keeps_zeros else not any(still)
        assert all(bool((after[name] != 0).any()) for name in zeros)


def test_zeros_that_no_pruning_left_learn(tmp_path: Path) -> None:
    model = build_model("qwen2", vocab_size=VOCABULARY)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("v_proj.bias", ".0.mlp.down_proj.weight")):
                weight[:2] = 0
    zeros = {name: weight == 0 for name, weight in model.state_dict().items() if bool((weight == 0).any())}
    after = aligned(tmp_path, pruned=["model.layers.1.mlp.down_proj.weight"], model=model)
    assert len(zeros) == 4
    assert [name for name, of in zeros.items() if not after[name][of].any()] == []


def test_a_checkpoint_holds_what_the_next_step_needs_and_no_head(tmp_path: Path) -> None:
    aligned(tmp_path)
    found = Checkpoints(tmp_path, {"copy": "a"}).latest()
    assert found is not None
    weights = AllWeights(build_model("llama", vocab_size=VOCABULARY)).parameters
    kinds = ("parameter", "exp_avg", "exp_avg_sq", "step")
    assert found.tensors.keys() == {f"{kind}.{name}" for kind in kinds for name in weights}


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_along_a_cosine() -> None:
    spec = alignment_spec(SPEC, replace(ASKED, steps=1600, learning_rate=5e-5))
    assert (spec.steps, spec.batch_size, spec.micro_batch_size) == (1600, 3, 3)
    assert spec.optimizer.warmup_steps == 160
    rates = [rate(spec.optimizer, step, 1600) for step in (0, 160, 880, 1599)]
    assert rates == pytest.approx([5e-5 / 161, 5e-5, 2.5e-5, 0], abs=1e-9)
    assert alignment_spec(SPEC, replace(ASKED, steps=5)).optimizer.warmup_steps == 0


# --- The text


def read(folder: Path, samples: list[Any], *, held_out: Any = (), **alignment: Any) -> Any:
    digest = write_dataset(folder, samples)
    asked = replace(ASKED, dataset=digest, **alignment)
    spec = replace(SPEC, method=TrainingMethod.LORAM, settings=LoramSettings(alignment=asked), max_length=16)
    return read_alignment(folder, spec, TOKENIZER, 256, held_out)


def test_documents_lie_end_to_end_and_all_is_learned(tmp_path: Path) -> None:
    data = read(tmp_path, TEXT)
    stream = [token for line in TEXT for token in [*TOKENIZER.encode(line["text"]), TOKENIZER.eos_token_id]]
    found = [token for sample in data.training for token in sample.tokens]
    assert found == stream[: len(found)]
    assert len(stream) - len(found) < 16
    assert {sample.num_learned for sample in data.training} == {15}


def test_what_is_measured_by_is_not_learned(tmp_path: Path) -> None:
    text = TEXT[3]["text"]
    held_out = (encode(Passage(1, text, ((0, len(text)),)), TOKENIZER),)
    with_it, without = read(tmp_path, TEXT), read(tmp_path, TEXT, held_out=held_out)
    assert with_it.report.num_tokens > without.report.num_tokens
    assert read(tmp_path, TEXT[:3] + TEXT[4:]).report == without.report


@pytest.mark.parametrize("max_length", [64, 4])  # whole, and cut
def test_a_completion_that_is_measured_by_is_not_learned_as_text(tmp_path: Path, max_length: int) -> None:
    text = TEXT[3]["text"]
    encoded = encode_passages(
        [Passage(1, text, ((3, len(text)),))],
        TOKENIZER,
        max_length=max_length,
        over_length=OverLength.TRUNCATE,
        field="gate.dataset",
    )
    without = read(tmp_path, TEXT, held_out=encoded.samples)
    assert encoded.num_truncated == (max_length == 4)
    assert read(tmp_path, TEXT[:3] + TEXT[4:]).report == without.report


@pytest.mark.parametrize(
    ("samples", "alignment", "reason"),
    [
        (TEXT[:1], {"batch_size": 1}, "TOO_LITTLE_DATA"),  # not one window
        (TEXT[:4], {"batch_size": 16}, "TOO_LITTLE_DATA"),  # not one step
        ([{"prompt": "a", "completion": "b"}], {}, "NOT_PLAIN_TEXT"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            {},
            "NOT_PLAIN_TEXT",
        ),
        (["{"], {}, "BAD_LINE"),
    ],
)
def test_a_text_that_cannot_be_aligned_with_is_refused(
    tmp_path: Path, samples: list[Any], alignment: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, samples, **alignment)
    assert (caught.value.reason, caught.value.field) == (reason, FIELD)


def test_fewer_tokens_than_a_window_are_one_of_their_own(tmp_path: Path) -> None:
    samples = random_data(3).training
    num_tokens = sum(len(sample.tokens) for sample in samples)
    assert cut_samples(samples, 1000).windows.shape == (1, num_tokens)
    assert cut_samples(samples, 5).windows.shape == (num_tokens // 5, 5)
    assert cut_samples(samples, 5).sha256 != cut_samples(samples[:2], 5).sha256
