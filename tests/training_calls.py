"""Calls of TrainingService and WorkerService that several tests make, and the data and specs that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from adapter_calls import Metadata
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2, tenant_pb2, training_pb2
from rpc_harness import Shell, make_base
from upload_streams import paper_files, whole

pb = training_pb2
Upload = training_pb2.UploadDatasetRequest
FINGERPRINT = make_base().fingerprint
FINISH = Upload(finish=pb.DatasetFinish())
NO_KEY: Metadata = ()


def samples(num: int = 4, seed: int = 0) -> bytes:
    """Return a dataset of prompts with completions, one of its own for each seed."""
    lines = [json.dumps({"prompt": f"{seed}: {number} + 1 = ", "completion": str(number + 1)}) for number in range(num)]
    return "".join(f"{line}\n" for line in lines).encode()


def digest_of(data: bytes) -> str:
    """Return what a dataset is called."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


DATA = samples()


def header_of(data: bytes, **fields: Any) -> Upload:
    """Return the header that announces a dataset."""
    said = {"digest": digest_of(data), "size_bytes": len(data)} | fields
    return Upload(header=pb.DatasetHeader(**said))


def chunk_of(offset: int, data: bytes) -> Upload:
    """Return one chunk."""
    return Upload(chunk=pb.DatasetChunk(offset=offset, data=data))


def chunks_of(data: bytes, begin: int = 0, size_bytes: int = 64) -> list[Upload]:
    """Return the chunks of a dataset from an offset on."""
    return [chunk_of(start, data[start : start + size_bytes]) for start in range(begin, len(data), size_bytes)]


def whole_dataset(data: bytes, **fields: Any) -> list[Upload]:
    """Return the stream of a whole dataset."""
    return [header_of(data, **fields), *chunks_of(data, size_bytes=1 << 20), FINISH]


async def send(shell: Shell, messages: Iterable[Upload], **options: Any) -> pb.Dataset:
    """Send a dataset, and return what it became."""
    return (await shell.jobs.UploadDataset(iter(messages), **options)).dataset


def spec_with(
    lora: Mapping[str, Any] | None = None,
    publish: Mapping[str, Any] | None = None,
    **fields: Any,
) -> pb.TrainingSpec:
    """Return a spec that is right but for what is said; an adapter `trained` of DATA."""
    spec: dict[str, Any] = {
        "method": pb.TRAINING_METHOD_LORA,
        "dataset": digest_of(DATA),
        "publish": pb.PublishSettings(**{"adapter_name": "trained", **(publish or {})}),
    }
    if lora is not None:
        spec["lora"] = pb.LoraSettings(**lora)
    return pb.TrainingSpec(**spec | fields)


async def create(
    shell: Shell, spec: pb.TrainingSpec | None = None, request_id: str = "", **options: Any
) -> pb.TrainingJob:
    """Queue a job."""
    request = pb.CreateTrainingJobRequest(spec=spec or spec_with(), request_id=request_id)
    return (await shell.jobs.CreateTrainingJob(request, **options)).job


async def queue(shell: Shell, spec: pb.TrainingSpec | None = None, **options: Any) -> pb.TrainingJob:
    """Upload DATA, and queue a job that trains on it."""
    await send(shell, whole_dataset(DATA), **options)
    return await create(shell, spec, **options)


async def get(shell: Shell, id: str, **options: Any) -> pb.TrainingJob:
    """Return a job as it is."""
    return (await shell.jobs.GetTrainingJob(pb.GetTrainingJobRequest(id=id), **options)).job


async def cancel(shell: Shell, id: str, request_id: str = "", **options: Any) -> pb.TrainingJob:
    """End a job."""
    request = pb.CancelTrainingJobRequest(id=id, request_id=request_id)
    return (await shell.jobs.CancelTrainingJob(request, **options)).job


async def register(shell: Shell, name: str = "worker-1", **options: Any) -> pb.RegisterWorkerResponse:
    """Say that a worker does everything."""
    methods = pb.TrainingMethod.values()[1:]
    request = pb.RegisterWorkerRequest(name=name, methods=methods, base_fingerprint=FINGERPRINT, device="cpu")
    return await shell.workers.RegisterWorker(request, **options)


async def lease(shell: Shell, worker: str = "worker-1", wait: float = 0.0, **options: Any) -> pb.Lease | None:
    """Ask for a job."""
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=wait))
    answer = await shell.workers.LeaseJob(pb.LeaseJobRequest(worker=worker, wait=duration), **options)
    return answer.lease if answer.HasField("lease") else None


def bearing(held: pb.Lease) -> Metadata:
    """Return what shows a lease's token."""
    return (("authorization", f"Bearer {held.token}"),)


@dataclass(frozen=True, slots=True)
class Hands:
    """A worker that has a job."""

    shell: Shell
    held: pb.Lease

    @property
    def token(self) -> Metadata:
        return bearing(self.held)

    async def report(self, *events: pb.JobEvent, num_reported: int = 0, **fields: Any) -> pb.ReportJobResponse:
        request = pb.ReportJobRequest(events=events, num_reported=num_reported, **fields)
        return await self.shell.workers.ReportJob(request, metadata=self.token)

    async def end(self, state: Any, reason: str = "", message: str = "", num_reported: int = 0) -> pb.ReportJobResponse:
        ending = pb.JobEnding(state=state, reason=reason, message=message)
        return await self.report(ending=ending, num_reported=num_reported)

    async def publish(self, seed: int = 0, name: str = "trained", **fields: Any) -> adapter_pb2.AdapterVersion:
        stream = whole(paper_files(seed=seed), upload_id=self.held.upload_id, name=name, **fields)
        return (await self.shell.adapters.UploadAdapter(iter(stream), metadata=self.token)).version

    async def fetch(self, digest: str = digest_of(DATA), offset: int = 0) -> bytes:
        request = pb.FetchDatasetRequest(digest=digest, offset=offset)
        return b"".join([part.data async for part in self.shell.workers.FetchDataset(request, metadata=self.token)])


async def hands_of(shell: Shell, worker: str = "worker-1", **options: Any) -> Hands:
    """Register a worker and lease it the job that is queued."""
    await register(shell, worker, **options)
    held = await lease(shell, worker, **options)
    assert held is not None
    return Hands(shell, held)


async def at_work(shell: Shell, spec: pb.TrainingSpec | None = None, **options: Any) -> Hands:
    """Queue a job, and put it into a worker's hands, by the worker's own key if one is given."""
    await queue(shell, spec)
    return await hands_of(shell, **options)


async def worker_key(shell: Shell) -> Metadata:
    """Make a key of role worker, of the tenant `local`."""
    request = tenant_pb2.CreateKeyRequest(tenant_id="local", role=tenant_pb2.ROLE_WORKER)
    return (("authorization", f"Bearer {(await shell.tenants.CreateKey(request)).secret}"),)


def let_pass(shell: Shell, seconds: float) -> None:
    """Move the registry's clock on."""
    shell.library.clock.moved += timedelta(seconds=seconds)
