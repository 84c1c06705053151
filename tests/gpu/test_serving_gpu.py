"""The whole engine on a GPU: the embedded base under its adapters answers as the same engine does on the CPU."""

from __future__ import annotations

from pathlib import Path

import motley_adapters
import motley_bases
import pytest
import torch
from engine_harness import Answer, Harness, make_harness
from motley_bases.loader import load_base
from motley_kernels.paged_attention import triton_impl
from transformers import AutoTokenizer

BASE = Path(motley_bases.__file__).parent / "assets" / "tiny"
ADAPTERS = {
    path.name: path
    for path in sorted((Path(motley_adapters.__file__).parent / "assets" / "tiny").iterdir())
    if (path / "adapter_model.safetensors").exists()
}
WORDS = ("kettle", "stone", "owl", "baker", "quiet", "lamp", "ladder")
CRAMPED = {"block_size": 4, "token_budget": 24, "max_running": 12}


def ask_everything(harness: Harness) -> dict[str, Answer]:
    """Ask every skill of every word in one batch: of the base, of each adapter, and of two of them at once."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    sets: list[tuple[str | tuple[str, float], ...]] = [(), *((name,) for name in ADAPTERS)]
    sets.append((("sort", 0.75), ("reverse", -0.5)))
    skills = ["upper", *ADAPTERS]
    requests = [
        harness.request(
            f"{skill} {word} {members}",
            tokenizer(f"{skill}: {word} =")["input_ids"],
            *members,
            max_new_tokens=12,
            logprobs=0,
        )
        for index, word in enumerate(WORDS)
        for skill in skills
        for members in sets
        if members == () or (skill,) == members or (index + len(skill)) % 3 == 0
    ]
    return harness.run(requests)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, Answer]:
    return ask_everything(make_harness(BASE, ADAPTERS))


@pytest.mark.parametrize("settings", [{}, CRAMPED], ids=["roomy", "cramped"])
def test_greedy_answers_in_float32_equal_the_cpus(
    on_cpu: dict[str, Answer], settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, calls = triton_impl.launches, []
    monkeypatch.setattr(triton_impl, "launches", lambda *args, **how: calls.append(1) or launches(*args, **how))
    base = load_base(BASE, dtype="float32", device=torch.device("cuda"))
    answers = ask_everything(make_harness(BASE, ADAPTERS, base=base, **settings))
    assert calls, "attention did not run the kernels"
    assert answers.keys() == on_cpu.keys()
    for request_id, expected in on_cpu.items():
        answer = answers[request_id]
        assert answer.token_ids == expected.token_ids, request_id
        logprobs = [entry.logprob for entry in expected.logprobs[0]]
        assert [entry.logprob for entry in answer.logprobs[0]] == pytest.approx(logprobs, abs=1e-3), request_id


def test_bfloat16_teaches_the_same_skills(on_cpu: dict[str, Answer]) -> None:
    base = load_base(BASE, dtype="bfloat16", device=torch.device("cuda"))
    answers = ask_everything(make_harness(BASE, ADAPTERS, base=base))
    own = [request_id for request_id in on_cpu if request_id.startswith(tuple(f"{n} " for n in ADAPTERS))]
    own = [request_id for request_id in own if request_id.endswith(f"('{request_id.split()[0]}',)")]
    assert len(own) == len(ADAPTERS) * len(WORDS)
    equal = [answers[request_id].token_ids == on_cpu[request_id].token_ids for request_id in own]
    assert sum(equal) >= 0.9 * len(equal)
