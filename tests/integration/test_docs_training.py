"""docs/training.md as its reader runs it: a server, a worker, data, and the next request is served by the result.

One server and its workers stand for all tests here; what each test claims was seen while they ran.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shlex
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_servers import forked_server
from motley_adapters.export import export_s2ft_as_lora
from motley_bases.checkpoint import resolve_base
from motley_bases.loader import load_base
from motley_client import AsyncClient, Score
from motley_client.child_process import child_process
from page_runs import blocks, run
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE = "training.md"
WORDS = ("lantern", "kettle")  # one that nobody trained on, and one that somebody did
ANSWERS = (" onward", " upward")
MAX_LENGTH = 22
S2FT = (
    "motley train submit motto.jsonl --adapter rows --method s2ft --steps 4 --batch-size 8 --lr 4e-3 "
    f"--max-length {MAX_LENGTH} --over-length truncate --watch"
)
DIVERGING = (
    "motley train submit motto.jsonl --adapter burst --method lora --steps 6 --batch-size 8 --lr 1e9 "
    "--checkpoint-steps 1 --watch"
)


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """What was printed, job by job, and what the server had at the end; `folder` is the reader's.

    Semantics: `told` is what the commands for GOAT and LoRAM print, in the page's order. `jobs` are those that
    `show --json` shows, by adapter, that of the page's Python by its version.
    """

    folder: Path
    submitted: list[str]
    asked: list[str]
    looked: list[str]
    told: list[list[str]]
    scripted: list[str]
    diverged: list[str]
    jobs: dict[str, dict[str, Any]]
    manifests: dict[str, dict[str, Any]]
    scores: dict[str, list[Score]]


@asynccontextmanager
async def worker(command: str, folder: Path, *more: str) -> AsyncIterator[None]:
    """Run a worker as a page's command says, its directories in a folder."""
    arguments = [str(folder / word) if word.startswith("./") else word for word in shlex.split(command)[1:]]
    async with child_process([*arguments, *more], folder / "worker.log", grace_seconds=10) as process:
        assert process.stdout is not None
        yield


async def read(page: str, folder: Path) -> Seen:
    """Do what the page says, in its order, and then what every reader could do next."""
    make_data, make_text, from_python = blocks(page, "python")
    for name, script in (("data.py", make_data), ("text.py", make_text)):
        (folder / name).write_text(script, encoding="utf-8")
    serve, work = blocks(page, "text")[0].splitlines()
    submit, ask, look, *by_methods = blocks(page, "bash")
    data = ["--data-dir", str(folder / "data"), "--dtype", "float32"]
    second = folder / "second"
    second.mkdir()
    async with forked_server([*shlex.split(serve)[2:], *data], folder) as server:
        at = ("--server", server.address)
        async with worker(work, folder, *at), AsyncClient(server.address, timeout=60) as client:
            await run("python data.py", folder, server.address)
            submitted = await run(submit, folder, server.address)
            asked = await run(ask, folder, server.address)
            looked = await run(look, folder, server.address)
            (folder / "client.py").write_text(from_python.replace("127.0.0.1:8470", server.address), encoding="utf-8")
            await run("python text.py", folder, server.address)
            async with worker(work, second, *at, "--name", "second"):
                scripted, _, diverged, *told = await asyncio.gather(
                    run("python client.py", folder, server.address),
                    run(S2FT, folder, server.address),
                    run(DIVERGING, folder, server.address, status=5),
                    *(run(script, folder, server.address) for script in by_methods),
                )
            jobs = await jobs_by_adapter(folder, server.address)
            manifests, scores = {}, {}
            for name in ("motto@1", "rows"):
                target = folder / "fetched" / name
                await client.download_adapter(name, target)
                manifests[name] = json.loads((target / "motley_manifest.json").read_text())
                scores[name] = [await client.score(f"motto: {word} =", ANSWERS, adapters=[name]) for word in WORDS]
    return Seen(folder, submitted, asked, looked, told, scripted, diverged, jobs, manifests, scores)


async def jobs_by_adapter(folder: Path, address: str) -> dict[str, dict[str, Any]]:
    [line] = await run("motley train list --json", folder, address)
    jobs: dict[str, dict[str, Any]] = {}
    for one in json.loads(line)["jobs"]:
        name = one["spec"]["publish"]["adapter_name"]
        jobs[name if one["version"] is None else f"{name}@{one['version']['version']}"] = one
    return jobs


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(read(PAGE, tmp_path_factory.mktemp("reader")))


def test_the_page_runs_as_it_stands_and_the_next_request_is_served_by_the_result(seen: Seen) -> None:
    job = seen.jobs["motto@1"]
    assert seen.submitted[0] == job["id"]
    assert [line.split("  ", 1)[1] for line in seen.submitted[-2:]] == [
        f"published motto@1 {job['version']['digest']}", "succeeded",
    ]  # fmt: skip
    assert seen.asked == ["onward"]
    assert any("motto.jsonl" in line for line in seen.looked)
    assert any(line.startswith(job["id"]) and "40/40" in line for line in seen.looked)
    assert any("goat lora loram s2ft" in line and "free" in line for line in seen.looked)
    assert seen.scripted[-1] == "JobState.SUCCEEDED"
    assert seen.jobs["motto@2"]["progress"]["num_steps"] == 20


def test_the_job_tells_its_figures_and_the_manifest_says_how_the_adapter_came_to_be(seen: Seen) -> None:
    job, manifest = seen.jobs["motto@1"], seen.manifests["motto@1"]
    content = (seen.folder / "motto.jsonl").read_bytes()
    evaluation, provenance = job["evaluation"], manifest["provenance"]
    assert (job["data"]["num_samples"], job["data"]["num_held_out"]) == (10, 2)
    assert (job["progress"]["step"], job["attempts"]) == (40, 1)
    assert (evaluation["exact_match_before"], evaluation["exact_match_after"]) == (0.0, 1.0)
    assert evaluation["loss_after"] < 0.1 < 5 < evaluation["loss_before"]
    assert manifest["digest"] == job["version"]["digest"]
    assert manifest["trained_on"] == manifest["serves_on"] == job["base_fingerprint"]
    assert provenance["job"] == job["id"]
    assert provenance["datasets"] == [f"sha256:{hashlib.sha256(content).hexdigest()}"]
    assert (provenance["method"], provenance["steps"], provenance["settings"]["rank"]) == ("lora", 40, 8)
    assert provenance["evaluation"] == evaluation
    assert job["version"]["labels"] == {"motley.job": job["id"]}


@pytest.mark.parametrize("name", ["motto@1", "rows"])
def test_what_answers_is_what_the_job_made_and_peft_gives_it_the_same_logits(seen: Seen, name: str) -> None:
    digest = seen.jobs["rows@1" if name == "rows" else name]["version"]["digest"]
    served = {one.digest for score in seen.scores[name] for one in score.served_by.adapters}
    assert served == {digest}
    tiny, directory = resolve_base("tiny"), seen.folder / "fetched" / name
    if name == "rows":
        base = load_base(tiny, dtype="float32", device=torch.device("cpu"))
        export_s2ft_as_lora(directory, directory / "exported", base.spec)
        directory = directory / "exported"
    expected = peft_scores(tiny, directory)
    bare = peft_scores(tiny, None)
    for score, ours, without in zip(seen.scores[name], expected, bare, strict=True):
        for place in range(len(ANSWERS)):
            found = [token.chosen.logprob for token in score.scores[place].tokens]
            assert found == pytest.approx(ours[place], abs=1e-4)
            assert found != pytest.approx(without[place], abs=0.1), "nothing is proven by an adapter that does nothing"


def peft_scores(base: Path, adapter: Path | None) -> list[list[list[float]]]:
    """Return the log-probabilities that PEFT gives each token of each answer to each word's prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a key that PEFT misses or does not expect is a warning there
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    prompts: list[Sequence[int]] = [tokenizer(f"motto: {word} =").input_ids for word in WORDS]
    answers: list[Sequence[int]] = [tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    return [[logprobs(model.eval(), prompt, answer) for answer in answers] for prompt in prompts]


def logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(answer)), list(answer)].tolist()


def test_the_commands_for_goat_and_loram_train_adapters_of_their_kinds(seen: Seen) -> None:
    names = ("motto-goat", "motto-small", "motto-smaller")
    jobs = [seen.jobs[f"{name}@1"] for name in names]
    assert [job["version"]["kind"] for job in jobs] == ["goat", "loram", "loram"]
    assert [lines[0] for lines in seen.told] == [job["id"] for job in jobs]
    assert [lines[-1].split("  ", 1)[1] for lines in seen.told] == ["succeeded"] * 3
    assert [job["spec"].get("quantization") for job in jobs] == [None, None, "nf4"]
    assert ["pruning" in " ".join(lines) for lines in seen.told] == [False, True, True]
    assert ["aligning" in " ".join(lines) for lines in seen.told] == [False, False, True]


def test_the_line_on_routing_is_one_that_such_a_job_tells(seen: Seen) -> None:
    _, shown, *_ = blocks(PAGE, "text")
    told = [line.split("  ", 1)[1] for line in seen.told[0] if "routing:" in line]
    figure = re.compile(r"\d+\.\d%(?! *$)")  # but what is even, which follows from the number of experts
    assert told
    assert {figure.sub("X", line) for line in told} == {figure.sub("X", shown.strip())}
    assert shown.strip().endswith("over 56 modules; even is 25.0%")


def test_samples_that_are_too_long_are_cut_and_counted(seen: Seen) -> None:
    job = seen.jobs["rows@1"]
    samples = map(json.loads, (seen.folder / "motto.jsonl").read_text().splitlines())
    lengths = [len(one["prompt"] + one["completion"]) + 2 for one in samples]  # a token a byte, a begin and an end
    assert job["version"]["kind"] == "s2ft"
    assert job["data"]["num_truncated"] == sum(length > MAX_LENGTH for length in lengths) == 11
    assert job["evaluation"]["exact_match_after"] is None


def test_a_training_that_diverges_fails_with_its_reason_and_leaves_its_last_good_checkpoint(seen: Seen) -> None:
    job = seen.jobs["burst"]
    assert (job["state"], job["reason"]) == ("failed", "LOSS_NOT_FINITE")
    assert "diverged at step 2" in job["message"]
    assert "LOSS_NOT_FINITE" in seen.diverged[-1]
    left = list(seen.folder.rglob(f"jobs/{job['id']}/**/state.json"))
    assert [path.parent.name for path in left] == ["step-1"]
    assert job["evaluation"] is None
