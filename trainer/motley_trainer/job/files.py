"""A job's folder: what it is asked, what it has done so far, and what came of it.

Every file appears whole. A job that is started again finds here how far it was. Knows nothing of models. Runs on the
thread that trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motley_adapters.formats import MANIFEST_FILE

from motley_trainer.files.durable import sweep, write_folder, write_json
from motley_trainer.job.evaluation import Evaluation, Measured
from motley_trainer.job.made_base import TrainedBase, read_trained_base
from motley_trainer.spec.json_fields import JsonFields
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import LoqtSettings, TrainingSpec

DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("none", "nf4", "int8")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job is asked.

    Semantics: `base` is a checkpoint's directory; `served_quantization` is how a server holds it. `spectra` is a
    directory in which spectra of its weights are kept over jobs, None where nobody keeps them.
    """

    job_id: str
    spec: TrainingSpec
    base: Path
    base_name: str
    dtype: str
    served_quantization: str
    device: str
    spectra: Path | None = None

    @property
    def trained_quantization(self) -> str:
        """Return how the base is held in training: as it is served unless the spec says; LoQT's Linears are in NF4."""
        default = "nf4" if isinstance(self.spec.settings, LoqtSettings) else self.served_quantization
        return self.spec.quantization or default


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job: an adapter or a base, and whether it has passed its gate.

    Semantics: `digest` is the adapter's, or the base's fingerprint.
    """

    digest: str
    evaluation: Evaluation
    passed: bool
    reason: str
    message: str
    base: TrainedBase | None = None


class JobFiles:
    """The files of one job."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.data = directory / "data"
        self.checkpoints = directory / "checkpoints"
        self.stages = directory / "stages"
        self.adapter = directory / "adapter"
        self.base = directory / "base"
        self._before = directory / "before.json"
        self._evaluation = directory / "evaluation.json"
        self._result = directory / "result.json"

    def sweep(self) -> None:
        """Remove what an interrupted write left."""
        sweep(self._directory)

    def request(self) -> JobRequest:
        """Read what the job is asked.

        Raises: SettingsError with reason BAD_SPEC, naming the field.
        """
        fields = JsonFields(_read(self._directory / "job.json"), "")
        request = JobRequest(
            job_id=fields.text("job_id"),
            spec=read_spec(fields.get("spec")),
            base=Path(fields.text("base")),
            base_name=fields.text("base_name"),
            dtype=fields.one_of("dtype", DTYPES),
            served_quantization=fields.one_of("served_quantization", QUANTIZATIONS),
            device=fields.one_of("device", DEVICES),
            spectra=Path(fields.text("spectra")) if "spectra" in fields else None,
        )
        fields.end()
        return request

    def adapters(self) -> list[Path]:
        """Return the directories of the adapters that the settings name, in their order."""
        return sorted((self._directory / "adapters").glob("[0-9]*"), key=lambda path: int(path.name))

    def before(self, binding: Mapping[str, str]) -> Measured | None:
        """Return what was measured before training, None if that was not yet, or for another training."""
        found = _read(self._before)
        if found is None or found.pop("binding") != binding:
            return None
        return Measured(**found)

    def write_before(self, measured: Measured, binding: Mapping[str, str]) -> None:
        """Keep what was measured before training."""
        write_json(self._before, {**asdict(measured), "binding": dict(binding)})

    def evaluation(self) -> Evaluation | None:
        """Return the evaluation, None if there is none yet."""
        found = _read(self._evaluation)
        return None if found is None else Evaluation(**found)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Keep the evaluation."""
        write_json(self._evaluation, asdict(evaluation))

    def adapter_digest(self) -> str | None:
        """Return the digest that the adapter's manifest names, None if there is no adapter yet."""
        found = _read(self.adapter / MANIFEST_FILE)
        return None if found is None else str(found["digest"])

    def write_adapter(self, write: Callable[[Path], str]) -> str:
        """Have the adapter written, and return its digest."""
        digests: list[str] = []
        write_folder(self.adapter, lambda aside: digests.append(write(aside)))
        return digests[0]

    def trained_base(self) -> TrainedBase | None:
        """Return the base that was made, None if there is none yet."""
        return read_trained_base(self.base)

    def result(self) -> Result | None:
        """Return what came of the job, None if it has not ended."""
        found = _read(self._result)
        if found is None:
            return None
        names = Evaluation.__dataclass_fields__
        evaluation = Evaluation(**{name: found["evaluation"].get(name) for name in names})
        base = None if found.get("base") is None else TrainedBase(**found["base"])
        return Result(found["digest"], evaluation, found["passed"], found["reason"], found["message"], base)

    def write_result(self, result: Result) -> None:
        """Say what came of the job: its last file."""
        content = {**asdict(result), "evaluation": result.evaluation.to_json()}
        if result.base is None:
            del content["base"]
        write_json(self._result, content)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a JSON object that one of us wrote, None if it is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found
