"""Training jobs as a worker would run them, but in this process, and samples as a job reads them.

Owns the folder of a job and nothing of what a job does: data, steps, gate and adapter are the trainer's own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from embedded import Line
from motley_bases.loader import PlainBase
from motley_trainer.data.lines import read_passages
from motley_trainer.data.samples import Sample, encode_passages
from motley_trainer.job.base import load_job_base
from motley_trainer.job.files import Result
from motley_trainer.job.run import run
from motley_trainer.pruning.surgery import num_parameters as num_base_parameters
from motley_trainer.spec.settings import OverLength
from subject import Subject, current
from transformers import PreTrainedTokenizerBase

DTYPE = "float32"
MAX_LENGTH = 512  # tokens, the base's context


def open_base() -> PlainBase:
    """Return the subject as jobs load it, once in a process, to measure adapters on."""
    torch.set_num_threads(1)
    return _opened(current())


@cache
def _opened(subject: Subject) -> PlainBase:
    return load_subject(subject)


def load_subject(subject: Subject) -> PlainBase:
    """Load the subject as jobs do."""
    device = torch.device(subject.device)
    return load_job_base(subject.directory, name=subject.name, dtype=DTYPE, device=device, quantization="none")


def subject_facts() -> dict[str, Any]:
    """Return what a result file says of the subject it was measured on."""
    base, subject = open_base(), current()
    return {
        "name": subject.name,
        "fingerprint": base.spec.fingerprint,
        "parameters": num_base_parameters(base.model),
        "layers": base.model.config.num_hidden_layers,
        "hidden": base.model.config.hidden_size,
        "device": subject.device,
    }


def run_job(
    spec: Mapping[str, Any],
    learned: Iterable[Line],
    asked: Iterable[Line],
    adapter: Path,
    apart_from: Sequence[Path] = (),
) -> Result:
    """Train an adapter, and keep its directory.

    Semantics: `spec` is the JSON of a TrainingSpec without its datasets: what is learned, and what the gate measures.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        for place, other in enumerate(apart_from):
            shutil.copytree(other, job / "adapters" / str(place))
        write_job(job, spec, learned, asked)
        result = run(job, lambda event: None)
        shutil.move(job / "adapter", adapter)
    return result


def write_job(
    job: Path, spec: Mapping[str, Any], learned: Iterable[Line], asked: Iterable[Line], base: Path | None = None
) -> None:
    """Write what a job is asked, and its data.

    Semantics: `spec` as for `run_job`; `base` is the subject unless told.
    """
    data = {
        "dataset": write_dataset(job / "data", learned),
        "gate": {**spec.get("gate", {}), "dataset": write_dataset(job / "data", asked)},
    }
    subject = current()
    request = {
        "job_id": "job-0",
        "spec": {**spec, **data},
        "base": str(base or subject.directory),
        "base_name": subject.name,
        "dtype": DTYPE,
        "served_quantization": "none",
        "device": subject.device,
    }
    (job / "job.json").write_text(json.dumps(request))


def write_dataset(folder: Path, lines: Iterable[Line]) -> str:
    """Write lines under their digest, and return it."""
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest}.jsonl").write_bytes(content)
    return f"sha256:{digest}"


def read_samples(lines: Iterable[Line], tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, ...]:
    """Return lines as a job makes samples of them, whole."""
    with tempfile.TemporaryDirectory() as folder:
        digest = write_dataset(Path(folder), lines)
        path = Path(folder, f"{digest.removeprefix('sha256:')}.jsonl")
        passages = read_passages(path, digest, tokenizer, "dataset")
        encoded = encode_passages(
            passages, tokenizer, max_length=MAX_LENGTH, over_length=OverLength.REFUSE, field="dataset"
        )
    return encoded.samples


def num_parameters(adapter: Path) -> int:
    """Return how many numbers an adapter's directory holds; which channels they belong to is not among them."""
    files = list(adapter.glob("*.safetensors"))
    tensors = (tensor for file in files for tensor in safetensors.torch.load_file(file).values())
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
