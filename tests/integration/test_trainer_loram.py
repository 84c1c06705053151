"""Jobs of LoRAM from folder to result: what they train on, what they measure on, and what they write."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapters import applied, logits
from google.protobuf import json_format
from job_folders import make_job
from loram_jobs import LAYERS, SAMPLES, SPEC, collecting_quickly, loram_job, make_base, ran, stages_of
from motley.v1 import training_pb2
from motley_adapters.errors import AdapterMismatchError
from motley_adapters.formats import CUT_FILE
from motley_adapters.reader import inspect_adapter, read_adapter
from motley_bases.errors import BaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.prune_manifest import read_prune_manifest
from motley_bases.pruned import decoder_shape
from motley_bases.stored_spec import read_spec
from motley_server.rpc.training_sizes import least_adapter_bytes
from motley_trainer.bases.carry import recover_directory
from motley_trainer.data.training_data import read_data
from motley_trainer.errors import TrainerError
from motley_trainer.job.base import load_job_base
from motley_trainer.job.evaluation import mean_loss
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.run import run
from motley_trainer.methods.loram import Loram
from motley_trainer.methods.loram_copy import PrunedCopy
from motley_trainer.methods.method import Context
from peft import PeftModel
from peft_adapters import make_adapter
from pruned_bases import load, zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from written_tensors import tensor_bytes

CPU = torch.device("cpu")
TOKENS = (5, 17, 33, 8, 64, 3)
STAGES = ["reading data", "loading base", "measuring before", "pruning", "loading base", "training", "loading base",
          "measuring after", "writing"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with collecting_quickly():
        yield


@dataclass(frozen=True)
class Done:
    """A base, a job for it, and what came of the job."""

    base: Path
    folder: Path
    result: Result
    events: list[Any]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def copy(self) -> Path:
        return self.folder / "stages" / "pruned"

    @property
    def manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.adapter / "motley_manifest.json").read_text())
        return content


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def structured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = loram_job(tmp_path_factory.mktemp("job"), base)
    return Done(base, folder, *ran(folder))


def do(folder: Path, base: Path, **more: Any) -> Done:
    return Done(base, folder, *ran(loram_job(folder, base, **more)))


def factors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def trained_factors(folder: Path) -> dict[str, Tensor]:
    """Return what was trained, as the last checkpoint has it."""
    tensors = load_file(folder / "checkpoints" / "step-2" / "tensors.safetensors")
    return {name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")}


# --- Heads and channels


def test_a_job_trains_on_the_copy_and_writes_for_the_original(structured: Done) -> None:
    assert stages_of(structured.events) == STAGES
    manifest = structured.manifest
    assert manifest["kind"] == "loram"
    assert manifest["trained_on"] == fingerprint(structured.copy) != manifest["serves_on"]
    assert manifest["serves_on"] == fingerprint(structured.base)
    cut = read_prune_manifest(structured.adapter)
    assert manifest["loram"] == {"recovered": True, "prune_manifest": cut.digest}
    assert cut == read_prune_manifest(structured.copy)
    assert [layer for layer, kept in enumerate(cut.layers) if kept is not None] == [1, 2]
    assert {(len(kept.kv_heads), len(kept.ffn_channels)) for kept in cut.layers if kept} == {(1, 48)}
    assert (cut.criterion, cut.rule, cut.protected) == ("param_first", "loram", (1, 1))
    told = manifest["provenance"]["copy"]
    assert (told["fingerprint"], told["original_fingerprint"]) == (manifest["trained_on"], manifest["serves_on"])
    assert told["is_smaller"]
    assert manifest["provenance"]["settings"]["ratio"] == "1/2"
    assert inspect_adapter(structured.adapter, read_spec(structured.base)).spec.digest == structured.result.digest


def test_what_was_trained_is_what_is_written_on_the_kept_channels(structured: Done) -> None:
    written, trained = factors(structured.adapter), trained_factors(structured.folder)
    cut = read_prune_manifest(structured.adapter)
    for name, factor in trained.items():
        path, _, side = name.rpartition(".")
        whole = written[f"base_model.model.{path}.lora_{side[-1].upper()}.weight"]
        left = whole[whole.any(1)][:, whole.any(0)]
        assert torch.equal(left.reshape(factor.shape), factor), name
        assert (left.numel() < whole.numel()) == (side == ("lora_a" if "o_proj" in path or "down" in path else "lora_b")
                                                  and cut.layers[int(path.split(".")[2])] is not None)  # fmt: skip


def test_the_server_foretells_how_many_bytes_it_takes(structured: Done) -> None:
    asked = json.loads((structured.folder / "job.json").read_text())["spec"]
    spec = json_format.ParseDict(asked, training_pb2.TrainingSpec())
    assert least_adapter_bytes(spec, read_spec(structured.base)) == tensor_bytes(structured.adapter) > 0


def test_the_gate_measures_the_original_with_the_recovered_adapter(structured: Done) -> None:
    """Held against the adapter's definition, and against PEFT on transformers' own model."""
    original = load_job_base(structured.base, name="a", dtype="float32", device=CPU, quantization="none")
    spec = JobFiles(structured.folder).request().spec
    data = read_data(structured.folder / "data", spec, original.tokenizer, original.spec.context_length)
    measured = structured.result.evaluation
    assert mean_loss(original.model, data.held_out) == pytest.approx(measured.loss_before, rel=1e-6)
    with applied(original.model, (read_adapter(structured.adapter, original.spec), 1.0)):
        assert mean_loss(original.model, data.held_out) == pytest.approx(measured.loss_after, rel=1e-5)
    assert measured.loss_after != pytest.approx(measured.loss_before, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(load(structured.base), structured.adapter).eval()
    assert mean_loss(theirs, data.held_out) == pytest.approx(measured.loss_after, rel=1e-5)


def test_the_trainers_own_logits_are_pefts(structured: Done) -> None:
    original = load_job_base(structured.base, name="a", dtype="float32", device=CPU, quantization="none")
    settings = JobFiles(structured.folder).request().spec.settings
    told = structured.manifest["provenance"]["copy"]
    copy = PrunedCopy(structured.copy, told["fingerprint"], told["original_fingerprint"], told)
    attached = Loram(settings).attach(original.model, Context(original.spec, 7, lambda n: [], [], copy), None)
    with torch.no_grad():
        for name, factor in trained_factors(structured.folder).items():
            attached.parameters[name].copy_(factor)
    ours = logits(original.model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(PeftModel.from_pretrained(load(structured.base), structured.adapter).eval(), TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    with attached.disabled():
        assert (logits(original.model, TOKENS) - ours).abs().max() > 0.01


def test_on_the_masked_original_the_adapter_does_what_it_did_on_the_copy(structured: Done, tmp_path: Path) -> None:
    small = load_job_base(structured.copy, name="a", dtype="float32", device=CPU, quantization="none")
    settings = JobFiles(structured.folder).request().spec.settings
    attached = Loram(settings).attach(small.model, Context(small.spec, 7, lambda n: []), None)
    with torch.no_grad():
        for name, factor in trained_factors(structured.folder).items():
            attached.parameters[name].copy_(factor)
    masked = zero_checkpoint(structured.base, tmp_path / "masked", read_prune_manifest(structured.copy).layers)
    whole = load(masked).eval()
    adapter = read_adapter(structured.adapter, read_spec(structured.base))
    with applied(whole, (adapter, 1.0)):
        torch.testing.assert_close(logits(whole, TOKENS), logits(small.model, TOKENS), rtol=1e-5, atol=1e-4)


def test_another_seed_draws_another_copy_and_the_same_seed_the_same(base: Path, tmp_path: Path) -> None:
    drawn = [
        do(tmp_path / str(place), base, pruning="LORAM_PRUNING_RANDOM", ratio="0.3", seed=seed, steps=1).manifest
        for place, seed in enumerate(("7", "7", "8"))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["loram"]["prune_manifest"] != drawn[2]["loram"]["prune_manifest"]


def test_a_ratio_of_nothing_is_a_lora_bit_for_bit(base: Path, tmp_path: Path) -> None:
    lora = {"rank": 3, "dropout": 0.1}
    whole = do(tmp_path / "loram", base, ratio="0", lora=lora)
    (tmp_path / "lora").mkdir()
    plain = make_job(tmp_path / "lora", SAMPLES, base=base, lora=lora, **SPEC)
    result, events = ran(plain)
    assert whole.result == result
    assert (whole.adapter / "adapter_model.safetensors").read_bytes() == (
        plain / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert stages_of(whole.events) == stages_of(events)
    assert (whole.manifest["kind"], whole.manifest["provenance"]["method"]) == ("lora", "loram")
    assert not (whole.folder / "stages").exists()


# --- Single weights


@pytest.mark.parametrize(
    ("pruning", "settings"),
    [("UNSTRUCTURED", {"ratio": "0.6"}), ("SEMI_STRUCTURED", {"pattern": "2:4"})],
    ids=["unstructured", "semi_structured"],
)
def test_factors_of_a_masked_base_have_the_originals_shapes_and_serve_there_as_they_are(
    base: Path, tmp_path: Path, pruning: str, settings: dict[str, Any]
) -> None:
    done = do(tmp_path, base, pruning=f"LORAM_PRUNING_{pruning}", **settings)
    assert "saves no memory" in stages_of(done.events)[3]
    manifest, told = done.manifest, done.manifest["provenance"]["copy"]
    assert (manifest["kind"], manifest["loram"]) == ("loram", {"recovered": True, "prune_manifest": None})
    assert manifest["trained_on"] == fingerprint(done.copy) != manifest["serves_on"] == fingerprint(base)
    assert not (done.adapter / CUT_FILE).exists()
    assert (told["weights"], told["is_smaller"], told["layers"]) == ("adjusted", False, [1, 3])
    original, masked = load(base).state_dict(), load(done.copy).state_dict()
    zeros = {name: int((weight == 0).sum()) for name, weight in masked.items()}
    pruned = {name: count for name, count in zeros.items() if count > 1}
    assert {name.split(".")[2] for name in pruned} == {"1", "2"}
    assert len(pruned) == 14
    assert sum(pruned.values()) == told["num_zeros"]
    share = 0.6 if pruning == "UNSTRUCTURED" else 0.5
    assert told["num_zeros"] / told["num_pruned_weights"] == pytest.approx(share, abs=1e-3)
    assert all(weight.shape == original[name].shape for name, weight in masked.items())
    assert all(torch.equal(weight, original[name]) for name, weight in masked.items() if name not in pruned)
    written, trained = factors(done.adapter), trained_factors(done.folder)
    for name, factor in trained.items():
        path, _, side = name.rpartition(".")
        assert torch.equal(written[f"base_model.model.{path}.lora_{side[-1].upper()}.weight"], factor)
    with applied(whole := load(base).eval(), (read_adapter(done.adapter, read_spec(base)), 1.0)):
        spec = JobFiles(done.folder).request().spec
        tokenizer = load_job_base(base, name="a", dtype="float32", device=CPU, quantization="none").tokenizer
        data = read_data(done.folder / "data", spec, tokenizer, 256)
        assert mean_loss(whole, data.held_out) == pytest.approx(done.result.evaluation.loss_after, rel=1e-5)


# --- Alignment


@pytest.mark.parametrize("pruning", ["RANDOM", "UNSTRUCTURED"])
def test_an_aligned_copy_is_trained_on_and_its_origin_is_told(base: Path, tmp_path: Path, pruning: str) -> None:
    done = do(tmp_path, base, align={}, pruning=f"LORAM_PRUNING_{pruning}")
    told = done.manifest["provenance"]["copy"]
    aligned = tmp_path / "stages" / "aligned"
    assert done.manifest["trained_on"] == told["fingerprint"] == fingerprint(aligned)
    assert told["alignment"]["pruned_fingerprint"] == fingerprint(done.copy) != told["fingerprint"]
    assert told["original_fingerprint"] == fingerprint(base)
    assert (told["alignment"]["engine"], told["alignment"]["steps"]) == ("full_rank", 2)
    assert told["alignment"]["dataset"] in done.manifest["provenance"]["datasets"]
    assert not (tmp_path / "stages" / "aligning").exists(), "its checkpoints are worth nothing once it is done"
    before, after = load(done.copy).state_dict(), load(aligned).state_dict()
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == ["lm_head.weight"]
    if pruning == "UNSTRUCTURED":
        assert all(torch.equal(before[name] == 0, weight == 0) for name, weight in after.items())
    else:
        assert read_prune_manifest(done.adapter).pruned_fingerprint == told["fingerprint"]
        assert read_prune_manifest(done.adapter).layers == read_prune_manifest(done.copy).layers
    assert "aligning" in stages_of(done.events)


# --- The same cut


def with_adapter(folder: Path, adapter: Path) -> Path:
    shutil.copytree(adapter, folder / "adapters" / "0")
    return folder


def test_the_cut_of_another_adapter_is_made_again(structured: Done, tmp_path: Path) -> None:
    with_adapter(tmp_path, structured.adapter)
    done = do(tmp_path, structured.base, same_cut_as="other", seed="8", lora={"rank": 2})
    assert done.manifest["trained_on"] == structured.manifest["trained_on"]
    assert (done.adapter / CUT_FILE).read_bytes() == (structured.adapter / CUT_FILE).read_bytes()
    assert done.result.digest != structured.result.digest


def test_the_cut_of_a_lora_that_was_recovered_elsewhere_is_made_again(structured: Done, tmp_path: Path) -> None:
    make_adapter(structured.copy, tmp_path / "lora", seed=1)
    recover_directory(tmp_path / "lora", str(structured.base), str(structured.copy), tmp_path / "recovered")
    with_adapter(tmp_path / "job", tmp_path / "recovered")
    done = do(tmp_path / "job", structured.base, same_cut_as="other", seed="8", steps=1)
    assert done.manifest["trained_on"] == structured.manifest["trained_on"]


def test_a_cut_cannot_be_that_of_another_kind_or_base(structured: Done, tmp_path: Path) -> None:
    other_base = make_base(tmp_path / "base", seed=1)
    without = shutil.copytree(structured.adapter, tmp_path / "without")
    (without / CUT_FILE).unlink()
    lora = shutil.copytree(structured.adapter, tmp_path / "lora")
    (lora / "motley_manifest.json").unlink()
    changed = shutil.copytree(structured.adapter, tmp_path / "changed")
    (changed / CUT_FILE).write_text("{}")
    for number, (adapter, base, reason) in enumerate(
        (
            (structured.adapter, other_base, "BASE_MISMATCH"),
            (without, structured.base, "NO_CUT"),
            (lora, structured.base, "NOT_LORAM"),
            (changed, structured.base, "DIGEST_MISMATCH"),
        )
    ):
        folder = with_adapter(loram_job(tmp_path / str(number), base, same_cut_as="other"), adapter)
        with pytest.raises(TrainerError) as caught:
            ran(folder)
        assert (caught.value.reason, caught.value.field) == (reason, "loram.same_cut_as")


# --- Refused


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        ({"layers": "2:9"}, "LAYER_RANGE", "loram.layers"),
        ({"ratio": "0.99"}, "EMPTY_LAYER", "loram.ratio"),
        ({"pruning": "LORAM_PRUNING_UNSTRUCTURED", "ratio": "1/999999999"}, "NOTHING_TO_PRUNE", "loram.ratio"),
        ({"align": {"batch_size": 1000}}, "TOO_LITTLE_DATA", "loram.alignment.dataset"),
        ({"lora": {"rank": 40}, "align": {}}, "RANK_TOO_LARGE", "loram.lora.rank"),
        ({"lora": {"target_modules": ["c_attn"]}}, "NO_SUCH_MODULE", "loram.lora.target_modules"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_before_a_step_is_taken(
    base: Path, tmp_path: Path, settings: dict[str, Any], reason: str, field: str
) -> None:
    folder = loram_job(tmp_path, base, **settings)
    events: list[Any] = []
    with pytest.raises(TrainerError) as caught:
        run(folder, events.append)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert not any("progress" in event for event in events)
    if reason in ("LAYER_RANGE", "EMPTY_LAYER", "TOO_LITTLE_DATA"):
        assert stages_of(events) == ["reading data"]


def test_a_pruned_base_is_no_original(structured: Done, tmp_path: Path) -> None:
    with pytest.raises(TrainerError) as caught:
        ran(loram_job(tmp_path, structured.copy))
    assert caught.value.reason == "ALREADY_PRUNED"
    with pytest.raises(BaseError) as foreign:
        ran(loram_job(tmp_path / "foreign", make_base(tmp_path / "gemma", model_type="gemma2"), layers=LAYERS))
    assert foreign.value.reason == "NOT_PRUNABLE"


def test_the_recovered_adapter_is_refused_on_the_copy(structured: Done) -> None:
    with pytest.raises(AdapterMismatchError) as caught:
        inspect_adapter(structured.adapter, read_spec(structured.copy))
    assert caught.value.reason == "BASE_MISMATCH"
    assert decoder_shape(load(structured.copy).config) == decoder_shape(load(structured.base).config)
