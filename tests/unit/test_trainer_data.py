"""Lines become tokens as a server would make them, and what is measured by is never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BOS_ID, EOS_ID, make_tokenizer
from job_folders import reversals, write_dataset
from motley_trainer.data.batches import NOT_LEARNED, collate
from motley_trainer.data.lines import read_passages
from motley_trainer.data.samples import Sample, encode, encode_passages
from motley_trainer.data.training_data import TrainingData, batches_of, read_data
from motley_trainer.errors import DataError, SettingsError
from motley_trainer.spec.settings import GateSettings, LoraSettings, OverLength, TrainingMethod, TrainingSpec
from transformers import PreTrainedTokenizerFast

TOKENIZERS = ("byte_level", "metaspace")


def encoded(folder: Path, *lines: Any, tokenizer: PreTrainedTokenizerFast | str = "byte_level") -> list[Sample]:
    fast = make_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    digest = write_dataset(folder, lines)
    passages = read_passages(folder / f"{digest[7:]}.jsonl", digest, fast, "dataset")
    return [encode(passage, fast) for passage in passages]


def learned_tokens(sample: Sample) -> list[int]:
    return [token for token in sample.labels() if token != NOT_LEARNED]


def read(folder: Path, samples: list[Any], gate: list[Any] | None = None, **spec: Any) -> TrainingData:
    gate_digest = None if gate is None else write_dataset(folder, gate)
    asked = TrainingSpec(
        TrainingMethod.LORA, LoraSettings(), write_dataset(folder, samples), "", gate=GateSettings(gate_digest), **spec
    )
    return read_data(folder, asked, make_tokenizer("byte_level"), context_length=256)


def refusal(folder: Path, *lines: Any, **more: Any) -> DataError:
    with pytest.raises(DataError) as refused:
        encoded(folder, *lines, **more)
    return refused.value


def turns(*contents: str) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    }


# --- Lines to tokens


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["the quick", "the quick ", "the qui", ""])
def test_of_a_completion_its_tokens_and_the_end_are_learned_after_the_prompts_own(
    tmp_path: Path, kind: str, prompt: str
) -> None:
    tokenizer = make_tokenizer(kind)
    completion = "ck brown fox"
    sample = encoded(tmp_path, {"prompt": prompt, "completion": completion}, tokenizer=kind)[0]
    asked = tokenizer.encode(prompt)
    learned = learned_tokens(sample)
    if prompt:
        assert sample.tokens[: len(asked)].tolist() == asked
        assert sample.answer_start == len(asked)
        assert learned == sample.tokens[len(asked) :].tolist()
    assert learned[-1] == EOS_ID
    assert learned.count(EOS_ID) == 1
    if kind == "byte_level":
        assert tokenizer.decode([token for token in learned if token not in (BOS_ID, EOS_ID)]) == completion
    else:
        assert tokenizer.decode(sample.tokens, skip_special_tokens=True).replace(" ", "") == (
            prompt + completion
        ).replace(" ", "")


def test_a_border_inside_a_token_does_not_move(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level")
    whole = tokenizer.encode("the")
    assert len(whole) == 1 + len(tokenizer.encode("")), "a token of the three letters is what makes this a test"
    sample = encoded(tmp_path, {"prompt": "t", "completion": "he"})[0]
    assert tokenizer.decode(sample.tokens[: sample.answer_start], skip_special_tokens=True) == "t"
    assert tokenizer.decode(learned_tokens(sample)[:-1]) == "he"


def test_all_of_a_text_is_learned_and_its_end(tmp_path: Path) -> None:
    sample = encoded(tmp_path, {"text": "the lazy dog"})[0]
    assert sample.labels() == [*make_tokenizer("byte_level").encode("the lazy dog"), EOS_ID]
    assert sample.answer_start is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_of_a_conversation_the_assistants_turns_are_learned_and_their_ends(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    line = turns("the fox", "a dog", "one base", "many coats")
    sample = encoded(tmp_path, line, tokenizer=kind)[0]
    text = tokenizer.apply_chat_template(line["messages"], tokenize=False)
    assert sample.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
    for (start, end), answer, asked in zip(
        sample.learned, ("a dog", "many coats"), (line["messages"][:1], line["messages"][:3]), strict=True
    ):
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert sample.tokens[:start].tolist() == tokenizer.encode(prompt, add_special_tokens=False)
        assert sample.tokens[end - 1] == EOS_ID
        assert tokenizer.decode(sample.tokens[start : end - 1]).strip() == answer
    assert sample.answer_start == sample.learned[-1][0]


def test_a_conversation_that_ends_with_the_user_has_no_answer_to_compare(tmp_path: Path) -> None:
    assert encoded(tmp_path, turns("the fox", "a dog", "one base"))[0].answer_start is None


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        # Earlier answers lose something once there are later turns.
        ("{% for m in messages %}{{ m.role }}{{ m.content if m.role == 'user' or loop.last }}{% endfor %}", "rewrites"),
        # What an answer is asked with is not what stands before it.
        ("{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}now{% endif %}", "rewrites"),
    ],
)
def test_a_template_that_cannot_show_what_is_learned_is_refused(
    tmp_path: Path, template: str | None, problem: str
) -> None:
    error = refusal(
        tmp_path, turns("a", "b"), turns("a", "b", "c", "d"), tokenizer=make_tokenizer("byte_level", template)
    )
    assert error.reason == "CHAT_TEMPLATE"
    assert error.message.startswith("line ")
    assert problem in error.message


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", '"text"', "{}", '{"text": 1}', '{"text": "a", "more": 1}', '{"prompt": "a"}',
        '{"prompt": "a", "completion": null}', '{"messages": {}}', '{"messages": []}', '{"messages": [1]}',
        '{"messages": [{"role": "assistant"}]}', '{"messages": [{"role": "assistant", "content": 1}]}',
        '{"messages": [{"role": "user", "content": "a"}]}', "[" * 100_000,
        '{"messages": [{"role": "assistant", "content": "a", "name": "b"}]}', '{"prompt": "a", "completion": "b"}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_sample_of_the_first_lines_shape_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    error = refusal(tmp_path, {"text": "good"}, {"text": "good too"}, line)
    assert error.reason == "BAD_LINE"
    assert error.message.startswith("line 3 of dataset ")
    assert error.field == "dataset"


def test_a_text_with_a_strange_line_break_in_it_is_one_line(tmp_path: Path) -> None:
    samples = encoded(tmp_path, {"text": "one\u2028two\x85three\r"})
    assert len(samples) == 1


def test_data_with_other_bytes_than_its_name_says_is_refused(tmp_path: Path) -> None:
    digest = write_dataset(tmp_path, [{"text": "a"}])
    path = tmp_path / f"{digest[7:]}.jsonl"
    path.write_text('{"text": "b"}\n')
    with pytest.raises(DataError) as refused:
        list(read_passages(path, digest, make_tokenizer("byte_level"), "dataset"))
    assert refused.value.reason == "DATASET_CHANGED"


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        list(read_passages(tmp_path / "none", "", make_tokenizer("byte_level"), "dataset"))
    assert refused.value.reason == "DATASET_UNREADABLE"


def test_a_tokenizer_that_has_no_end_cannot_teach_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level", "another so that it is a tokenizer of its own")
    end, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        assert refusal(tmp_path, {"text": "a"}, tokenizer=tokenizer).reason == "NO_END_TOKEN"
    finally:
        tokenizer.eos_token = end


# --- Too long


LONG = {"prompt": "a " * 40, "completion": "b"}
SHORT = {"prompt": "a", "completion": "b " * 40}


def test_what_is_too_long_is_cut_and_counted_and_dropped_where_nothing_to_learn_is_left(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level")
    digest = write_dataset(tmp_path, [LONG, SHORT, {"prompt": "a", "completion": "b"}])
    passages = list(read_passages(tmp_path / f"{digest[7:]}.jsonl", digest, tokenizer, "dataset"))
    found = encode_passages(passages, tokenizer, max_length=20, over_length=OverLength.TRUNCATE, field="dataset")
    assert (found.num_truncated, found.num_dropped) == (2, 1)
    assert [sample.line for sample in found.samples] == [2, 3]
    cut = found.samples[0]
    assert (len(cut.tokens), cut.is_truncated, cut.answer_start) == (20, True, None)
    assert len(learned_tokens(cut)) == 20 - len(tokenizer.encode("a"))
    with pytest.raises(DataError) as refused:
        encode_passages(passages, tokenizer, max_length=20, over_length=OverLength.REFUSE, field="dataset")
    assert refused.value.reason == "SAMPLE_TOO_LONG"
    assert "line 1 of dataset" in refused.value.message


def test_a_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, reversals(9), max_length=257)
    assert refused.value.field == "max_length"


def test_nothing_is_longer_than_512_tokens_or_the_context_unless_asked_for(tmp_path: Path) -> None:
    data = read(tmp_path, [*reversals(9), {"prompt": "a", "completion": "b " * 300}])
    assert data.report.num_truncated == 1
    assert max(len(sample.tokens) for sample in (*data.training, *data.held_out)) == 256


# --- Held out


def contents(samples: tuple[Sample, ...]) -> set[bytes]:
    return {sample.content for sample in samples}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (10, 1), (11, 2), (200, 20)])
def test_a_tenth_is_held_out_and_never_trained_on(tmp_path: Path, count: int, held_out: int) -> None:
    data = read(tmp_path, reversals(count))
    assert (len(data.training), len(data.held_out)) == (count - held_out, held_out)
    assert (data.report.num_samples, data.report.num_held_out) == (count - held_out, held_out)
    assert data.report.num_tokens == sum(len(sample.tokens) for sample in data.training)
    assert not contents(data.training) & contents(data.held_out)


def test_no_more_than_200_are_held_out(tmp_path: Path) -> None:
    texts = [{"text": f"{number}"} for number in range(2100)]
    assert len(read(tmp_path, texts).held_out) == 200


def test_who_is_held_out_depends_on_seed_and_content_and_not_on_the_place(tmp_path: Path) -> None:
    samples = reversals(100)
    first = contents(read(tmp_path, samples, seed=1).held_out)
    assert contents(read(tmp_path, samples, seed=1).held_out) == first
    assert contents(read(tmp_path, samples[::-1], seed=1).held_out) == first
    assert contents(read(tmp_path, samples, seed=2).held_out) != first


def test_samples_that_teach_the_same_are_on_one_side(tmp_path: Path) -> None:
    for seed in range(5):
        data = read(tmp_path, reversals(10) * 3, seed=seed)
        assert not contents(data.training) & contents(data.held_out)
        assert (len(data.training), len(data.held_out)) == (27, 3)
    data = read(tmp_path, reversals(3) * 5)  # five alike are more than a tenth of fifteen
    assert (len(data.training), len(data.held_out)) == (10, 5)


def test_what_a_gate_measures_by_is_left_out_of_the_training(tmp_path: Path) -> None:
    data = read(tmp_path, reversals(10), gate=reversals(5, start=8))
    assert (len(data.training), len(data.held_out), data.report.num_dropped) == (8, 5, 2)
    assert not contents(data.training) & contents(data.held_out)


@pytest.mark.parametrize(
    ("samples", "gate", "field"),
    [
        ([], None, "dataset"),
        (reversals(1), None, "dataset"),
        (reversals(1) * 9, None, "dataset"),
        (reversals(5), reversals(5), "dataset"),
        (reversals(5), [], "gate.dataset"),
        (reversals(5), [{"prompt": "a " * 300, "completion": "b"}], "gate.dataset"),
    ],
)
def test_too_little_data_is_refused(tmp_path: Path, samples: list[Any], gate: list[Any] | None, field: str) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, samples, gate)
    assert (refused.value.reason, refused.value.field) == ("TOO_LITTLE_DATA", field)


# --- Order and batches


def test_every_pass_sees_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = read(tmp_path, reversals(30), seed=3)
    count = len(data.training)
    passes = [[sample.line for sample in data.at(epoch * count, count)] for epoch in range(3)]
    assert all(sorted(lines) == sorted(sample.line for sample in data.training) for lines in passes)
    assert len({tuple(lines) for lines in passes}) == 3
    assert [sample.line for sample in data.at(0, 3 * count)] == [*passes[0], *passes[1], *passes[2]]
    assert [sample.line for sample in data.at(count - 2, 5)] == [*passes[0][-2:], *passes[1][:3]]
    other = read(tmp_path, reversals(30), seed=4)
    assert [sample.content for sample in other.at(0, 9)] != [sample.content for sample in data.at(0, 9)]


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    data = read(tmp_path, reversals(30))  # 27 to train on
    for fields, steps in (({"epochs": 1.0}, 7), ({"epochs": 0.04}, 1), ({"steps": 5, "epochs": None}, 5)):
        spec = TrainingSpec(TrainingMethod.LORA, LoraSettings(), "", "", batch_size=4, **fields)
        assert data.num_steps(spec) == steps


@pytest.mark.parametrize("epochs", [1e-300, 0.036])
def test_epochs_of_less_than_one_sample_are_refused(tmp_path: Path, epochs: float) -> None:
    data = read(tmp_path, reversals(30))
    with pytest.raises(SettingsError, match=r"27 samples .* 0\.03704 at least") as refused:
        data.num_steps(TrainingSpec(TrainingMethod.LORA, LoraSettings(), "", "", epochs=epochs))
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", "epochs")


def test_whoever_reads_is_told_of_every_line_and_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[str, int, float]] = []
    asked = TrainingSpec(
        TrainingMethod.LORA, LoraSettings(), write_dataset(tmp_path, reversals(4)), "",
        gate=GateSettings(write_dataset(tmp_path, reversals(2, start=9))),
    )  # fmt: skip
    read_data(tmp_path, asked, make_tokenizer("byte_level"), 256, on_line=lambda *told_of: told.append(told_of))
    assert told == [*(("dataset", line, (line - 1) / 4) for line in range(1, 5)), *(
        ("gate.dataset", line, (line - 1) / 2) for line in (1, 2)
    )]  # fmt: skip


def test_a_step_is_its_micro_batches(tmp_path: Path) -> None:
    data = read(tmp_path, [*reversals(20), {"prompt": "a longer one than the others", "completion": " yes"}])
    whole, *others = data.step(1, 8, 8)
    assert not others
    parts = data.step(1, 8, 3)
    assert [len(part.input_ids) for part in parts] == [3, 3, 2]
    assert sum(part.num_learned for part in parts) == whole.num_learned
    assert torch.equal(data.step(5, 8, 8)[0].input_ids, batches_of(data.at(40, 8), 8)[0].input_ids)
    for part, start in zip(parts, (0, 3, 6), strict=True):
        assert part.input_ids.shape[1] == int(part.attention_mask.sum(1).max())  # as long as its longest
        rows = whole.input_ids[start : start + len(part.input_ids), : part.input_ids.shape[1]]
        assert torch.equal(rows, part.input_ids)


def test_a_batch_is_padded_on_the_right_and_learns_no_padding(tmp_path: Path) -> None:
    batch = collate([([5, 6, 7], [NOT_LEARNED, 6, 7]), ([8], [8])])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[NOT_LEARNED, 6, 7], [8, NOT_LEARNED, NOT_LEARNED]]
    assert (batch.num_learned, batch.num_tokens) == (2, 4)  # nothing stands before the 8


def test_a_sample_counts_what_its_batch_counts(tmp_path: Path) -> None:
    for sample in encoded(tmp_path, {"text": "the dog"}, {"text": ""}):
        assert sample.num_learned == batches_of([sample], 1)[0].num_learned
