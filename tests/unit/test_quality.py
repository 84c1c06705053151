"""docs/quality.md is what the committed result files say, and what they hold was measured as the page tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from architectures import build_checkpoint
from motley_bases.prune_manifest import LayerKeep
from motley_trainer.pruning.iterative import Pruned
from pruned_bases import GROUPED_KEEPS, prune_checkpoint
from quality_scripts import HOUSE, RESULTS, imported, row, write_changed

MODULES = ("claims", "costs", "embedded", "page", "pruning", "pruning_plan", "readings")
RANDOM, FIRST = (
    {"cut": "quarter_ends_whole", "criterion": name, "recovered": False} for name in ("random", "param_first")
)


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture
def results(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Copy the result files with one of them changed."""
    return lambda edit: write_changed(tmp_path, "quality_pruning", edit)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_committed_results_say(quality: SimpleNamespace) -> None:
    assert (HOUSE / "docs" / "quality.md").read_text() == quality.page.render()


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a row": lambda content: content["cells"].remove(row(content, RANDOM)),
    "a row of two": lambda content: content["cells"].append(row(content, RANDOM)),
    "a seed of a row": lambda content: row(content, RANDOM)["skills"].pop(),
    "a figure of a row": lambda content: row(content, RANDOM).pop("perplexity"),
    "what a cut takes": lambda content: content.pop("costs"),
    "a seed": lambda content: content["seeds"].pop(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_result_file_that_lacks_something_is_refused(
    quality: SimpleNamespace, results: Callable[..., Path], edit: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(quality.readings.IncompleteResultError, match=r"^quality_pruning has "):
        quality.page.render(results(edit))


def test_a_result_file_that_is_not_there_is_refused(quality: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(quality.readings.IncompleteResultError, match="make quality"):
        quality.page.render(tmp_path)


def test_the_word_of_a_claim_follows_its_numbers(quality: SimpleNamespace, results: Callable[..., Path]) -> None:
    def turn(content: dict[str, Any]) -> None:
        row(content, FIRST)["perplexity"] = [3.0] * 5
        row(content, RANDOM)["perplexity"] = [2.0] * 5

    line = "| `param_first` costs less than `random` | 19.09 against 27.51 | 18%: 3.000 against 2.000, 0 of 5 seeds<br>"
    found = next(line for line in quality.page.render(results(turn)).splitlines() if "than `random` | 19" in line)
    assert found.startswith(line)
    assert found.split(" | ")[3].startswith("reversed<br>")


def test_a_criterion_that_is_the_worst_at_another_cut_is_said_to_be(
    quality: SimpleNamespace, results: Callable[..., Path]
) -> None:
    def best(content: dict[str, Any]) -> None:
        row(content, FIRST | {"cut": "half"})["perplexity"] = [1.0] * 5

    def words(page: str) -> set[str]:
        claims = page.partition("### Other cuts")[2].partition("###")[0].splitlines()
        told = [line.split(" | ") for line in claims if line.startswith("| `param_first` costs less than")]
        return {
            word
            for *_, found, held in told
            for where, word in zip(found.split("<br>"), held.removesuffix(" |").split("<br>"), strict=True)
            if where.startswith("49%, every layer: ")
        }

    assert words(quality.page.render()) == {"reversed", "undecided"}
    assert words(quality.page.render(results(best))) == {"held"}


def test_heads_that_went_are_told_from_channels_by_the_parameters_that_did(
    quality: SimpleNamespace, results: Callable[..., Path]
) -> None:
    cut = {"cut": "more_across", "criterion": "param_first"}

    def take(content: dict[str, Any]) -> None:
        changed = row(content, cut)
        changed["gone"][0] -= (
            84  # a head is what 85.3 channels are: one of 32 channels for three queries, key and value
        )
        changed["gone"][1:] = [gone - 167 for gone in changed["gone"][1:]]
        for seed, num_heads in enumerate((1, 2, 2, 2, 2)):
            changed["parameters"][seed] = 3_198_720 - 49_152 * num_heads - 576 * (changed["gone"][seed] - num_heads)

    assert "at 25% `param_first` 0, `random` 0, `l2` 1." in quality.page.render().replace("\n", " ")
    assert "at 25% `param_first` 1 to 2, `random` 0, `l2` 1." in quality.page.render(results(take)).replace("\n", " ")


@pytest.mark.parametrize(
    ("minutes", "told"),
    [(61.6, "`quality_pruning` 62 minutes"), (None, "`quality_pruning` a time that was not recorded")],
)
def test_the_page_tells_how_long_it_took_as_far_as_that_was_recorded(
    quality: SimpleNamespace, results: Callable[..., Path], minutes: float | None, told: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["setting"]["minutes"]
        content["setting"] |= {} if minutes is None else {"minutes": minutes}

    assert told in quality.page.render(results(change)).replace("\n", " ")


@pytest.mark.parametrize(
    ("first", "second", "below", "above"),
    [
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2], "held", "reversed"),
        ([1, 1, 1, 1, 2.5], [2, 2, 2, 2, 2], "held", "reversed"),
        ([1, 1, 1, 2.5, 2.5], [2, 2, 2, 2, 2], "undecided", "undecided"),  # three of five
        ([1, 1, 1, 1, 9], [2, 2, 2, 2, 2], "undecided", "undecided"),  # by the mean, the other way
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], "undecided", "undecided"),
        ([2, 2, 2, 2, 2], [1, 1, 1, 1, 1], "reversed", "held"),
    ],
)
def test_a_claim_holds_by_the_mean_and_by_four_seeds_in_five(
    quality: SimpleNamespace, first: list[float], second: list[float], below: str, above: str
) -> None:
    finding = quality.claims.Finding("here", first, second)
    assert quality.claims.verdict(finding) == below
    assert quality.claims.verdict(finding, is_below=False) == above


# --- what is measured ------------------------------------------------------------------------------------------------


def test_no_cell_is_measured_twice(quality: SimpleNamespace) -> None:
    cells = quality.pruning_plan.list_cells()
    assert len(cells) == len(set(cells))


def test_nothing_held_out_is_learned_from(quality: SimpleNamespace) -> None:
    drawn = {
        seed: quality.embedded.draw_texts(seed, learned_letters=4000, held_out_letters=3000, words_per_skill=7)
        for seed in (1, 2)
    }
    for texts in drawn.values():
        assert sum(map(len, texts.learned)) >= 4000
        assert not set(texts.learned) & set(texts.held_out)
        asked = {word for words in texts.words.values() for word in words}
        learned = {document.split()[1] for document in texts.learned if document.split()[0].endswith(":")}
        assert len(learned) > 20
        assert not asked & learned
        assert {len(set(words)) for words in texts.words.values()} == {7}
    assert drawn[1] != drawn[2]


def test_a_document_that_was_learned_from_is_not_held_out(
    quality: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality.embedded, "document", lambda rng: f"The {rng.randrange(40)}th baker sings.")
    texts = quality.embedded.draw_texts(1, learned_letters=500, held_out_letters=300, words_per_skill=1)
    assert len({document for document in texts.learned if document.endswith("baker sings.")}) > 5
    assert not set(texts.learned) & set(texts.held_out)


def test_what_is_gone_is_counted_in_heads_and_channels_of_the_whole_base(quality: SimpleNamespace) -> None:
    base = SimpleNamespace(config=SimpleNamespace(num_key_value_heads=2, intermediate_size=4))
    layers = (None, LayerKeep(ffn_channels=(0, 2), kv_heads=(1,)))
    pruned = Pruned(layers, num_group_parameters=1, num_unlike_first_order=None)
    assert quality.pruning.groups_gone(pruned, base) == {(1, "head", 0), (1, "channel", 1), (1, "channel", 3)}


def test_whole_ends_are_paid_for_with_no_fewer_parameters() -> None:
    costs = json.loads((RESULTS / "quality_pruning.json").read_text())["costs"]
    for cut in ("quarter", "half"):
        gone, with_whole_ends = (
            costs["whole"]["parameters"] - costs[name]["parameters"] for name in (cut, f"{cut}_ends_whole")
        )
        assert gone <= with_whole_ends < 1.003 * gone


def test_measured_bytes_and_flops_fall_as_computed(quality: SimpleNamespace, tmp_path: Path) -> None:
    # Two layers lose one of two heads each, with two query heads of 16 channels, one 64 and one 56 FFN channels.
    whole = build_checkpoint("llama", tmp_path / "whole")
    pruned = prune_checkpoint(whole, tmp_path / "pruned", GROUPED_KEEPS)
    head, channel = 64 * 16 * (2 + 1 + 1 + 2), 64 * 3
    num_gone, num_tokens = 2 * head + (64 + 56) * channel, 10
    sizes = [quality.costs.sizes(base)["parameters"] for base in (whole, pruned)]
    held = [quality.costs.weight_bytes(base) for base in (whole, pruned)]
    flops = [quality.costs.forward_flops(base, num_tokens) for base in (whole, pruned)]
    assert sizes[0] - sizes[1] == num_gone
    assert held[0].measured - held[1].measured == 4 * num_gone
    assert flops[0].measured - flops[1].measured == 2 * num_tokens * num_gone + 2 * 2 * 4 * num_tokens**2 * 16
    assert [cost.measured for cost in (*held, *flops)] == [cost.predicted for cost in (*held, *flops)]
