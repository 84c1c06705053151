"""`motley base prune`: from a checkpoint and a text to a smaller base that is served, or a refusal and nothing else."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint, edit_json
from motley_bases.base import Base
from motley_bases.errors import BaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_base
from motley_bases.prune_manifest import read_prune_manifest
from motley_bases.pruned import decoder_shape
from motley_bases.pruned_geometry import PruneRule, num_parameters
from motley_client.cli import app
from motley_trainer.commands import prune as commands_prune
from motley_trainer.device import parse_device
from motley_trainer.errors import TrainerError
from motley_trainer.files.outputs import new_directory
from motley_trainer.pruning import prune as module
from motley_trainer.pruning.aggregation import Aggregation
from motley_trainer.pruning.counting import CountingRule
from motley_trainer.pruning.perplexity import perplexity
from motley_trainer.pruning.prune import PruneReport, prune_base
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.settings import PruneSettings, RecoverySettings, Selection
from motley_trainer.pruning.texts import read_windows
from packed_passes import run_packed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

CPU = torch.device("cpu")
SEQUENCES = ([5, 9, 2, 7, 11, 3, 8], [4, 4, 6])
SETTINGS = PruneSettings(Fraction(1, 2), first_layer=1, num_windows=4, window=16)


def texts(directory: Path) -> tuple[Path, Path]:
    """Write a text to calibrate on and one to measure on, of words that no two documents share."""
    paths = directory / "calibration.txt", directory / "evaluation.txt"
    for path in paths:
        words = [hashlib.sha256(f"{path.name} {number}".encode()).hexdigest()[:48] for number in range(60)]
        path.write_text("\n\n".join(words), encoding="utf-8")
    return paths


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Make a folder with a base and two texts."""
    build_checkpoint("llama", tmp_path / "base", generation={"do_sample": True, "temperature": 0.7})
    texts(tmp_path)
    return tmp_path


def make(house: Path, settings: PruneSettings = SETTINGS, out: str = "out", **more: Path | None) -> PruneReport:
    given = {"calibration": house / "calibration.txt", "evaluation": house / "evaluation.txt", **more}
    return prune_base(str(house / "base"), settings, house / out, **given)  # type: ignore[arg-type]


def load(directory: Path) -> Base:
    return load_base(directory, dtype="auto", device=CPU)


def motley(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["base", "prune", *arguments])


def motley_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "motley_client", "base", "prune", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_a_pruned_base_is_served_with_layers_of_its_own_sizes(house: Path) -> None:
    report = make(house)
    base = load(house / "out")
    assert [(layer.num_heads, layer.num_kv_heads) for layer in base.spec.layers] == [(4, 2), (2, 1), (2, 1)]
    assert base.spec.linears["model.layers.1.mlp.down_proj"] == (48, 64)
    assert base.spec.fingerprint == report.fingerprint == fingerprint(house / "out")
    assert base.spec.pruned_from == fingerprint(house / "base")
    assert base.spec.generation.temperature == 0.7
    chunked, whole = (run_packed(base, SEQUENCES, cuts) for cuts in (((4, 2), (7, 3)), ((7, 3),)))
    for cached, uncached in zip(chunked, whole, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-5, atol=1e-5)


def test_a_pruned_base_answers_as_the_original_with_zeros_where_things_went(house: Path) -> None:
    make(house)
    manifest = read_prune_manifest(house / "out")
    dense = AutoModelForCausalLM.from_pretrained(house / "base", local_files_only=True)
    for layer, kept in zip(dense.model.layers, manifest.layers, strict=True):
        if kept is not None:
            gone = sorted(set(range(96)) - set(kept.ffn_channels))
            layer.mlp.down_proj.weight.data[:, gone] = 0
            for head in set(range(2)) - set(kept.kv_heads):
                layer.self_attn.o_proj.weight.data[:, 32 * head : 32 * (head + 1)] = 0
    for sequence, ours in zip(SEQUENCES, run_packed(load(house / "out"), SEQUENCES, ((7, 3),)), strict=True):
        with torch.inference_mode():
            theirs = dense(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_report_and_the_manifest_say_what_was_done(house: Path) -> None:
    report = make(house, PruneSettings(Fraction(1, 2), first_layer=1, end_layer=2, num_windows=4, window=16, seed=5))
    manifest = read_prune_manifest(house / "out")
    stored = load_file(house / "out" / "model.safetensors")
    counted = sum(tensor.numel() for tensor in stored.values())
    assert manifest.num_parameters == report.num_parameters_after == counted < report.num_parameters_before
    assert (manifest.protected, manifest.seed, manifest.recovery) == ((1, 1), 5, None)
    assert manifest.layers[0] is manifest.layers[2] is None
    assert (manifest.criterion, manifest.aggregation, manifest.selection) == ("param_first", "sum", "local")
    assert (manifest.ratio, manifest.steps, manifest.multiple) == (Fraction(1, 2), 1, 1)
    assert manifest.rule == CountingRule.LLM_PRUNER
    digest = hashlib.sha256((house / "calibration.txt").read_bytes()).hexdigest()
    assert (manifest.calibration_sha256, manifest.calibration_tokens) == (f"sha256:{digest}", 64)
    assert manifest.calibration_window == 16
    assert report.ratio_asked == report.ratio_gone == Fraction(1, 2)
    evaluation = read_windows(
        house / "evaluation.txt", AutoTokenizer.from_pretrained(house / "base"), 16, field="evaluation"
    ).windows
    assert report.num_evaluation_windows == len(evaluation)
    original = AutoModelForCausalLM.from_pretrained(house / "base", local_files_only=True)
    assert report.perplexity_before == pytest.approx(perplexity(original, evaluation), rel=1e-5)
    pruned = AutoModelForCausalLM.from_pretrained(house / "out", local_files_only=True)
    assert report.perplexity_pruned == pytest.approx(perplexity(pruned, evaluation), rel=1e-5)
    assert report.perplexity_pruned != report.perplexity_before
    assert not list((house / "out").glob("*.bin"))


def test_a_recovery_is_merged_stored_and_a_base_of_its_own(house: Path) -> None:
    without = make(house)
    recovery = RecoverySettings(steps=12, learning_rate=5e-3, batch_size=4)
    settings = PruneSettings(Fraction(1, 2), first_layer=1, num_windows=4, window=16, recovery=recovery)
    report = make(house, settings, "recovered")
    assert report.perplexity_recovered is not None
    assert report.perplexity_pruned is not None
    assert report.perplexity_recovered < report.perplexity_pruned
    assert report.fingerprint != without.fingerprint
    assert report.recovered is not None
    manifest = read_prune_manifest(house / "recovered")
    assert manifest.recovery == report.recovered.digest
    assert manifest.layers == read_prune_manifest(house / "out").layers
    assert load(house / "recovered").spec.fingerprint == report.fingerprint


def test_a_recovery_of_which_nothing_was_merged_leaves_no_trace(house: Path) -> None:
    without = make(house)
    settings = replace(SETTINGS, recovery=RecoverySettings(steps=2, learning_rate=1e-30))
    report = make(house, settings, "unrecovered")
    assert report.recovered is not None
    assert (report.recovered.best_step, report.perplexity_recovered) == (0, None)
    assert read_prune_manifest(house / "unrecovered").recovery is None
    assert report.fingerprint == without.fingerprint


def test_a_global_pruning_in_whole_multiples_reports_how_near_it_came(house: Path) -> None:
    settings = PruneSettings(Fraction(1, 5), selection=Selection.GLOBAL, criterion=Criterion.L1, steps=2, multiple=16)
    report = make(house, settings, calibration=None)
    groups = 3 * (2 * (2 * 2 + 2) * 16 * 64 + 96 * 3 * 64)
    assert report.ratio_gone == Fraction(report.num_parameters_before - report.num_parameters_after, groups)
    assert 0 <= groups * (report.ratio_asked - report.ratio_gone) < 16 * 3 * 64
    assert all(layer.ffn_size % 16 == 0 for layer in report.shapes.layers)
    manifest = read_prune_manifest(house / "out")
    assert (manifest.ratio, manifest.steps, manifest.multiple) == (Fraction(1, 5), 2, 16)


def test_what_is_measured_after_recovery_is_what_a_bfloat16_checkpoint_stores(tmp_path: Path) -> None:
    build_checkpoint("llama_tied", tmp_path / "base", dtype=torch.bfloat16)
    texts(tmp_path)
    recovery = RecoverySettings(steps=8, learning_rate=5e-3, batch_size=4)
    report = make(tmp_path, PruneSettings(Fraction(1, 4), num_windows=4, window=16, recovery=recovery))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    evaluation = read_windows(tmp_path / "evaluation.txt", tokenizer, 16, field="evaluation").windows
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True, dtype=torch.float32)
    assert report.perplexity_recovered == pytest.approx(perplexity(model, evaluation), rel=1e-6)


def test_the_same_request_makes_the_same_base_to_the_byte(house: Path) -> None:
    settings = PruneSettings(
        Fraction(1, 2), num_windows=4, window=16, steps=2, criterion=Criterion.PARAM_MIX, selection=Selection.GLOBAL,
        aggregation=Aggregation.MAX, recovery=RecoverySettings(steps=3),
    )  # fmt: skip
    first, again = (make(house, settings, out) for out in ("first", "again"))
    assert first.fingerprint == again.fingerprint
    assert read_prune_manifest(house / "first") == read_prune_manifest(house / "again")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama_biased"])
def test_each_family_of_the_closed_form_is_pruned_and_served(tmp_path: Path, family: str) -> None:
    build_checkpoint(family, tmp_path / "base")
    texts(tmp_path)
    make(tmp_path, PruneSettings(Fraction(1, 2), num_windows=4, window=16))
    assert [layer.num_kv_heads for layer in load(tmp_path / "out").spec.layers] == [1, 1, 1]


def test_a_criterion_without_text_needs_none_and_says_so(house: Path) -> None:
    settings = PruneSettings(Fraction(1, 2), criterion=Criterion.L2)
    report = make(house, settings, calibration=None, evaluation=None)
    manifest = read_prune_manifest(house / "out")
    assert (manifest.calibration_sha256, manifest.calibration_tokens, manifest.calibration_window) == (None, 0, 0)
    assert report.perplexity_before is report.perplexity_pruned is None


def test_the_rule_of_loram_leaves_its_own_counts_and_the_manifest_names_it(tmp_path: Path) -> None:
    build_checkpoint("llama", tmp_path / "base", num_hidden_layers=8)
    texts(tmp_path)
    shape = decoder_shape(load(tmp_path / "base").model.config)
    for out, criterion, interval in (
        ("random", Criterion.RANDOM, None),
        ("best", Criterion.PARAM_FIRST, None),
        ("wider", Criterion.RANDOM, (1, 7)),
    ):
        first, end = interval or (None, None)
        settings = PruneSettings(Fraction(1, 3), first, end, CountingRule.LORAM, criterion, num_windows=4, window=16)
        text = {} if criterion.needs_gradient else {"calibration": None, "evaluation": None}
        report = make(tmp_path, settings, out, **text)
        rule = PruneRule(Fraction(1, 3)) if interval is None else PruneRule(Fraction(1, 3), 1, 1)
        stored = sum(tensor.numel() for tensor in load_file(tmp_path / out / "model.safetensors").values())
        assert report.num_parameters_after == stored == num_parameters(shape, rule)
        manifest = read_prune_manifest(tmp_path / out)
        assert (manifest.rule, manifest.criterion) == ("loram", str(criterion))
        assert manifest.protected == (rule.num_first_whole, rule.num_last_whole)
        pruned = [layer for layer, kept in enumerate(manifest.layers) if kept is not None]
        assert pruned == list(rule.pruned_layers(8))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(house: Path, settings: PruneSettings = SETTINGS, **more: Path | None) -> str:
    with pytest.raises((TrainerError, BaseError)) as caught:
        make(house, settings, **more)
    assert not (house / "out").exists()
    assert not list(house.glob(".out*"))
    return caught.value.reason


def test_what_cannot_be_done_is_refused_and_leaves_nothing_behind(house: Path) -> None:
    assert refused(house, PruneSettings(Fraction(99, 100), window=16, num_windows=4)) == "EMPTY_LAYER"
    too_much = PruneSettings(Fraction(99, 100), selection=Selection.GLOBAL, window=16, num_windows=4)
    assert refused(house, too_much) == "RATIO_NOT_REACHED"
    assert refused(house, PruneSettings(Fraction(1, 2), first_layer=3)) == "LAYER_RANGE"
    assert refused(house, PruneSettings(Fraction(1, 2), window=300)) == "WINDOW_TOO_LONG"
    assert refused(house, PruneSettings(Fraction(1, 2), num_windows=10_000)) == "TEXT_TOO_SHORT"
    assert refused(house, calibration=None) == "NO_CALIBRATION"
    assert refused(house, evaluation=house / "calibration.txt") == "TEXTS_OVERLAP"
    assert refused(house, calibration=house / "nowhere.txt") == "TEXT_UNREADABLE"
    recovery = PruneSettings(Fraction(1, 2), criterion=Criterion.L1, recovery=RecoverySettings(steps=1))
    assert refused(house, recovery, calibration=None) == "NO_CALIBRATION"


def test_a_base_that_is_pruned_or_quantized_already_or_of_another_family_is_refused_by_name(house: Path) -> None:
    make(house)
    (house / "base").rename(house / "whole")
    (house / "out").rename(house / "base")
    assert refused(house) == "ALREADY_PRUNED"
    (house / "base").rename(house / "pruned")
    (house / "whole").rename(house / "base")
    edit_json(
        house / "base" / "config.json",
        quantization_config={
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
        },
    )  # fmt: skip
    assert refused(house) == "ALREADY_QUANTIZED"
    build_checkpoint("gemma2", house / "gemma")
    (house / "base").rename(house / "quantized")
    (house / "gemma").rename(house / "base")
    assert refused(house) == "NOT_PRUNABLE"


def test_a_place_that_is_taken_is_refused_before_anything_is_read(house: Path) -> None:
    (house / "out").mkdir()
    (house / "out" / "precious").touch()
    with pytest.raises(TrainerError) as caught:
        make(house, calibration=house / "nowhere.txt")
    assert caught.value.reason == "OUTPUT_EXISTS"
    assert [path.name for path in (house / "out").iterdir()] == ["precious"]


def test_a_place_that_is_taken_meanwhile_is_refused_and_left_as_it_is(house: Path) -> None:
    def lose_the_race() -> None:
        with new_directory(house / "out"):
            (house / "out").mkdir()
            (house / "out" / "precious").touch()

    with pytest.raises(TrainerError) as caught:
        lose_the_race()
    assert caught.value.reason == "OUTPUT_UNWRITABLE"
    assert [path.name for path in (house / "out").iterdir()] == ["precious"]
    assert not list(house.glob(".out*"))


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "tpu"):
        with pytest.raises(TrainerError) as caught:
            parse_device(name)
        assert caught.value.reason == "NO_DEVICE"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_parameters_and_perplexities_and_no_library_a_word(house: Path) -> None:
    ran = motley_process(
        str(house / "base"), "--ratio", "0.5", "--layers", "1:3", "--criterion", "param_mix", "--window", "16",
        "--calibration", str(house / "calibration.txt"), "--evaluation", str(house / "evaluation.txt"),
        "--recover-steps", "2", "--out", str(house / "out"),
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    made = fingerprint(house / "out")
    assert made in ran.stdout
    for told in ("parameters: ", "0: 4 heads over 2, 96 channels; 1-2: 2 heads over 1, 48 channels", " before, "):
        assert told in ran.stdout
    for told in (" pruned, ", " recovered (", "second order: ", "recovery: step "):
        assert told in ran.stdout


def test_the_command_prints_json(house: Path) -> None:
    ran = motley(str(house / "base"), "--ratio", "1/2", "--criterion", "l2", "--out", str(house / "out"), "--json")
    told = json.loads(ran.stdout)
    assert told["fingerprint"] == fingerprint(house / "out")
    assert told["perplexity_before"] is None
    assert told["layers"][0] == {"num_heads": 2, "num_kv_heads": 1, "ffn_size": 48}


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--ratio", "1.5", "BAD_RATIO"),
        ("--layers", "7", "LAYER_RANGE"),
        ("--criterion", "magic", "UNKNOWN_WORD"),
        ("--rule", "halves", "UNKNOWN_WORD"),
    ],
)
def test_the_command_refuses_in_one_line(house: Path, flag: str, value: str, reason: str) -> None:
    arguments = {"--ratio": "0.5", "--out": str(house / "out"), flag: value}
    ran = motley(str(house / "base"), *(word for pair in arguments.items() for word in pair))
    assert ran.exit_code == 1
    assert len(ran.output.splitlines()) == 1
    assert reason in ran.output


def test_the_help_lists_the_words_that_there_are() -> None:
    assert commands_prune.CRITERIA.split("|") == list(Criterion)
    assert commands_prune.AGGREGATIONS.split("|") == list(Aggregation)
    assert commands_prune.RULES.split("|") == list(CountingRule)


def test_under_the_rule_of_loram_the_embedded_base_loses_half_of_two_layers(tmp_path: Path) -> None:
    arguments = ["tiny", "--ratio", "0.5", "--rule", "loram", "--criterion", "random"]
    ran = motley(*arguments, "--out", str(tmp_path / "out"))
    whole, pruned = "6 heads over 2, 512 channels", "3 heads over 1, 256 channels"
    assert f"layers: 0-3: {whole}; 4-5: {pruned}; 6-7: {whole}\n" in ran.output
    told = motley(*arguments, "--layers", ":", "--out", str(tmp_path / "everywhere"), "--json")
    assert {layer["num_kv_heads"] for layer in json.loads(told.output)["layers"]} == {1}


def test_the_command_refuses_a_rule_with_what_contradicts_it(house: Path) -> None:
    for flag, value in (("--selection", "global"), ("--multiple", "16")):
        ran = motley(str(house / "base"), "--ratio", "0.5", "--rule", "loram", flag, value, "--out", str(house / "out"))
        assert (ran.exit_code, ran.output.count("RULE_CONFLICT")) == (1, 1)
        assert not (house / "out").exists()
