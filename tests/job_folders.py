"""Folders of training jobs, as a worker makes them, and the data in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parents[1] / "bases" / "motley_bases" / "assets" / "tiny"


def write_dataset(folder: Path, samples: Iterable[Mapping[str, Any] | str]) -> str:
    """Write samples, or lines as they are, under their digest, and return it."""
    lines = [sample if isinstance(sample, str) else json.dumps(sample, ensure_ascii=False) for sample in samples]
    content = "".join(f"{line}\n" for line in lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest}.jsonl").write_bytes(content)
    return f"sha256:{digest}"


def reversals(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Make different lines of a skill that the tiny base lacks."""
    words = [f"{number:03d}"[::-1].translate(str.maketrans("0123456789", "abcdefghij")) for number in range(1000)]
    return [{"prompt": f"reverse: {word} =", "completion": f" {word[::-1]}"} for word in words[start : start + count]]


def make_job(
    folder: Path,
    samples: Iterable[Mapping[str, Any] | str],
    *,
    method: str = "LORA",
    gate_samples: Iterable[Mapping[str, Any] | str] | None = None,
    base: Path = TINY,
    served: str = "none",
    dtype: str = "float32",
    **spec: Any,
) -> Path:
    """Write a job's folder, its data and its job.json; `spec` is of the TrainingSpec's JSON."""
    gate = dict(spec.pop("gate", {}))
    if gate_samples is not None:
        gate["dataset"] = write_dataset(folder / "data", gate_samples)
    full = {
        "method": f"TRAINING_METHOD_{method}",
        "dataset": write_dataset(folder / "data", samples),
        "gate": gate,
        "publish": {"adapter_name": "learned"},
        **spec,
    }
    job = {
        "job_id": "job-0123456789abcdef",
        "spec": full,
        "base": str(base),
        "base_name": "tiny",
        "dtype": dtype,
        "served_quantization": served,
        "device": "cpu",
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return folder
