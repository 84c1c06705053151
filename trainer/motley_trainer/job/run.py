"""One job, from its folder: `python -m motley_trainer.job DIRECTORY`, or `run` in this process.

A job makes an adapter or a base, which is measured and held against its gate. Each stage leaves in the folder what the
next needs, so a job that is started again goes on where it was. It reads the base and that folder, writes that folder,
and knows no network. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from motley_trainer.job.adapter_job import AdapterJob
from motley_trainer.job.base_job import BaseJob
from motley_trainer.job.evaluation import judge
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.reporting import Emit, Reporter
from motley_trainer.job.workbench import Workbench
from motley_trainer.spec.settings import LoqtSettings


def run(directory: Path, emit: Emit, should_stop: Callable[[], bool] = lambda: False) -> Result:
    """Do what is left to do of a job, and return what came of it.

    Semantics: `emit` gets the JSON of the wire's JobEvents; `should_stop` is asked after every step and between stages.
    Raises: TrainerError, BaseError or AdapterError for what will not do, however often it is tried; JobCancelledError
    if it was asked to stop.
    """
    files = JobFiles(directory)
    files.sweep()
    result = files.result()
    if result is not None:
        return result
    request, evaluation = files.request(), files.evaluation()
    bench = Workbench(files, request, Reporter(emit, should_stop))
    is_base = isinstance(request.spec.settings, LoqtSettings)
    base = files.trained_base() if is_base else None
    digest = files.adapter_digest() if base is None else base.fingerprint
    if evaluation is None or digest is None:
        if isinstance(request.spec.settings, LoqtSettings):
            evaluation, base = BaseJob(bench, request.spec.settings).make()
            digest = base.fingerprint
        else:
            evaluation, digest = AdapterJob(bench).make()
    verdict = judge(request.spec.gate, evaluation)
    result = Result(digest, evaluation, verdict.passed, verdict.reason, verdict.message, base)
    files.write_result(result)
    return result
