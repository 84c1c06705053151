"""Orders for training: from a spec that was asked for to a job in the queue, or to what is wrong with it.

Brings together the spec's own checks with what it names: datasets and adapters of the caller's. Runs on the event
loop's thread; the registry works on the database's.
"""

from __future__ import annotations

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec

from motley_server.asked import Caller
from motley_server.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from motley_server.library.sets import read_reference
from motley_server.registry.adapters import Adapters
from motley_server.registry.dataset_records import DatasetFormat
from motley_server.registry.job_records import JobRecord, NewJob
from motley_server.registry.ownership import adapter_not_found
from motley_server.rpc.convert_training import MAKE_BASES, text_of
from motley_server.rpc.training_sizes import least_adapter_bytes
from motley_server.rpc.training_spec import ALIGNMENT, NamedAdapter, adapters_of, check_spec, datasets_of
from motley_server.training.opening import Training

Spec = training_pb2.TrainingSpec


class TrainingOrders:
    """Queue what tenants ask to be trained."""

    def __init__(self, training: Training, adapters: Adapters, base: BaseSpec) -> None:
        self._run = training.database.run
        self._datasets = training.datasets
        self._jobs = training.job_desk
        self._adapters = adapters
        self._base = base

    async def order(self, spec: Spec, caller: Caller, *, request_id: str, scope: str) -> JobRecord:
        """Check a spec and what it names, and queue a job by it.

        Raises: what `check_spec` and `Jobs.create` do; NotFoundError (reason=DATASET_NOT_FOUND or ADAPTER_NOT_FOUND);
        InvalidArgumentError (reason=KIND_MISMATCH, FORMAT_MISMATCH or NO_ANSWERS); FailedPreconditionError
        (reason=NO_CHAT_TEMPLATE).
        """
        method = check_spec(spec, self._base)
        named: dict[str, str] = {}
        for digest, field in datasets_of(spec):
            named.setdefault(digest, field)
            await self._check_dataset(spec, caller.tenant_id, digest, field)
        read = tuple(adapters_of(spec))
        for adapter in read:
            await self._check_adapter(caller.tenant_id, adapter)
        job = NewJob(
            owner=caller.tenant_id,
            created_by=caller.key_id,
            method=method,
            adapter_name=None if spec.method in MAKE_BASES else spec.publish.adapter_name,
            datasets=tuple(named),
            reads=tuple(adapter.name for adapter in read),
            base_fingerprint=self._base.fingerprint,
            spec=text_of(spec),
        )
        try:
            return await self._jobs.create(
                job, caller.quota, least_adapter_bytes(spec, self._base), request_id=request_id, scope=scope
            )
        except NotFoundError as error:
            error.field = _field_of(error.field, list(named.values()))
            raise

    async def _check_dataset(self, spec: Spec, owner: str, digest: str, field: str) -> None:
        record = await self._run(self._datasets.find, owner, digest)
        if record is None:  # the registry says so, unless this repeats what it has answered already
            return
        if field == ALIGNMENT and record.format is not DatasetFormat.TEXT:
            message = f"the dataset's samples are of format {record.format.value}, and alignment is on plain text"
            raise InvalidArgumentError(message, reason="FORMAT_MISMATCH", field=field)
        if record.format is DatasetFormat.CHAT and not self._base.has_chat_template:
            message = f"{self._base.name} has no chat template, and the dataset's samples are conversations"
            raise FailedPreconditionError(message, reason="NO_CHAT_TEMPLATE", field=field)
        is_measured = digest == (spec.gate.dataset or spec.dataset)
        if record.format is DatasetFormat.TEXT and is_measured and spec.gate.HasField("min_exact_match"):
            message = "samples of plain text have no answers that could match: leave it unset"
            raise InvalidArgumentError(message, reason="NO_ANSWERS", field="spec.gate.min_exact_match")

    async def _check_adapter(self, tenant_id: str, named: NamedAdapter) -> None:
        version = await self._run(self._adapters.resolve, tenant_id, read_reference(named.name, named.field))
        if version is None:
            raise adapter_not_found(named.name, named.field)
        if version.kind != named.kind:
            message = f"adapter {named.name!r} is of kind {version.kind}, and {named.purpose} of {named.kind} alone"
            raise InvalidArgumentError(message, reason="KIND_MISMATCH", field=named.field)


def _field_of(field: str | None, named: list[str]) -> str | None:
    """Return what the spec calls a dataset that the registry calls `datasets[i]`."""
    return next((own for number, own in enumerate(named) if field == f"datasets[{number}]"), field)
