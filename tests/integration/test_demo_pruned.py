"""What `motley demo --pruned` makes before it serves: the embedded base pruned, adapters that still do their part."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_harness import make_harness
from motley_bases.checkpoint import resolve_base
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_base
from motley_bases.prune_manifest import read_prune_manifest
from motley_client import demo_child, demo_scene
from motley_client.demo_child import DemoError
from motley_client.demo_scene import KINDS_ON_PRUNED, Scene, find_calibration, pruned_scene
from motley_client.demo_wave import BASE_SKILL, SKILLS, WORD
from motley_trainer.commands.base import base
from transformers import AutoTokenizer
from typer.testing import CliRunner

HELD_OUT = (WORD, "kettle", "sailor", "turnip", "onion")  # by recipes/tiny/skills.py


async def run_base(*arguments: str) -> str:
    """Run `motley base` as the demo's child does, without the seconds in which a new process imports torch."""
    result = CliRunner().invoke(base, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


async def run_each_base(commands: Iterable[tuple[str, ...]]) -> None:
    for command in commands:
        await run_base(*command)


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> Scene:
    """Set the demo's scene by the real commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_scene, "run_base", run_base)
        patch.setattr(demo_scene, "run_each_base", run_each_base)
        return asyncio.run(pruned_scene(tmp_path_factory.mktemp("demo"), "nf4", told.append))


def base_of(scene: Scene) -> Path:
    return Path(scene.server_arguments[scene.server_arguments.index("--base") + 1])


def adapters_of(scene: Scene) -> dict[str, Path]:
    named = (value.partition("=") for flag, value in pairwise(scene.server_arguments) if flag == "--adapter")
    return {name: Path(folder) for name, _, folder in named}


def test_adapters_of_the_whole_base_still_answer_right_on_the_pruned_one(scene: Scene) -> None:
    copy, adapters = base_of(scene), adapters_of(scene)
    loaded = load_base(copy, dtype="auto", device=torch.device("cpu"))
    harness = make_harness(copy, adapters, base=loaded, max_running=32)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    asked = {
        f"{skill}: {word} =": ([] if skill == BASE_SKILL else [skill], SKILLS[skill](word))
        for skill in (*adapters, BASE_SKILL)
        for word in HELD_OUT
    }
    answers = harness.run(
        harness.request(prompt, tokenizer.encode(prompt), *worn, max_new_tokens=16)
        for prompt, (worn, _) in asked.items()
    )
    given = {prompt: tokenizer.decode(answer.token_ids[0]) for prompt, answer in answers.items()}
    wrong = [prompt for prompt, (_, right) in asked.items() if given[prompt] != f" {right}<eos>"]
    assert len(wrong) <= 1  # reversing takes the most attention, and half of a layer's is gone
    assert all(prompt.startswith("reverse") and WORD not in prompt for prompt in wrong)


def test_the_scene_serves_the_copy_and_what_was_cut_to_it(scene: Scene, told: list[str]) -> None:
    copy, adapters = base_of(scene), adapters_of(scene)
    assert copy.name == "tiny-pruned"
    assert scene.base_fingerprint == fingerprint(copy)
    manifest = read_prune_manifest(copy)
    assert manifest.original_fingerprint == fingerprint(resolve_base("tiny"))
    kept = {layer: (len(keep.kv_heads), len(keep.ffn_channels)) for layer, keep in enumerate(manifest.layers) if keep}
    assert kept == {3: (1, 256)}, "one of two heads, half of the channels"
    assert list(adapters) == list(scene.kinds) == list(KINDS_ON_PRUNED)
    assert {folder.parent for folder in adapters.values()} == {copy.parent}
    assert scene.server_arguments[-2:] == ("--quantize", "nf4")
    assert told[1].startswith("3,198,720 parameters became 3,002,112 (93.9%)")
    assert told[1].endswith(scene.base_fingerprint.removeprefix("sha256:")[:8])
    assert max(map(len, (*told, f"starting a server with {scene.summary} ..."))) <= 80


def test_a_calibration_text_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "motley_bases").mkdir()
    (tmp_path / "motley_bases" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "motley_bases")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DemoError, match="no embedded calibration text"):
        find_calibration()


def test_every_child_is_gone_when_one_of_them_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are short shell scripts: one says why it fails at once, the other ends a little later."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ncase $4 in slow) sleep 0.3; touch "$5";; *) echo "error: no $4" >&2; exit 1;; esac\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DemoError, match="`motley base quick` failed: no quick"):
        asyncio.run(demo_child.run_each_base([("quick",), ("slow", str(tmp_path / "ended"))]))
    assert (tmp_path / "ended").exists()
