"""What the token of a lease is good for beyond whether it may call a method: one adapter, one upload, its own reading.

A worker that is mistaken, or worse, can do to the tenant whose job it has nothing but publish that job's adapter, as
the job says; of a job that makes a base not even that. Pure checks; run on the event loop's thread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from motley_server.errors import PermissionDeniedError
from motley_server.library.publishing import AskedUpload
from motley_server.registry.dataset_records import dataset_not_found
from motley_server.registry.job_records import LeaseScope
from motley_server.registry.names import DEFAULT_ALIAS
from motley_server.rpc.convert_training import spec_of

JOB_LABEL: Final = "motley.job"


def check_adapter(lease: LeaseScope, owner: str, name: str, field: str) -> None:
    """Refuse any adapter but that of the lease's job.

    Raises: PermissionDeniedError (reason=OUTSIDE_LEASE), as most here.
    """
    if (owner, name) != (lease.owner, lease.adapter_name):
        allowed = "no adapter" if lease.adapter_name is None else f"adapter {lease.adapter_name!r}"
        raise _outside(f"adapter {f'{owner}/{name}'[:140]!r}", allowed, field)


def check_upload(lease: LeaseScope, upload_id: str, field: str = "upload_id") -> None:
    """Refuse any upload but the one that publishes what the lease's job makes."""
    if upload_id != lease.upload_id:
        raise _outside(f"upload {upload_id[:80]!r}", f"upload {lease.upload_id!r}", field)


def check_download(lease: LeaseScope, text: str) -> None:
    """Refuse any adapter, as it is written, but those that the lease's job reads."""
    if text not in lease.reads:
        reads = f"adapters {', '.join(lease.reads)}" if lease.reads else "no adapter"
        raise _outside(f"adapter {text[:140]!r}", reads, "name")


def check_dataset(lease: LeaseScope, digest: str) -> None:
    """Refuse any dataset but those of the lease's job, in the words for what is not there.

    Raises: NotFoundError (reason=DATASET_NOT_FOUND).
    """
    if digest not in lease.datasets:
        raise dataset_not_found()


def narrowed(lease: LeaseScope, asked: AskedUpload) -> AskedUpload:
    """Return an upload with the aliases and labels that the lease's job says; it may ask for some of them, or none."""
    check_upload(lease, asked.upload_id)
    publish = spec_of(lease.spec).publish
    aliases = () if publish.keep_aliases else tuple(publish.aliases) or (DEFAULT_ALIAS,)
    if asked.aliases != (DEFAULT_ALIAS,):  # what a header without any means
        for index, alias in enumerate(asked.aliases):
            if alias not in aliases:
                allowed = f"aliases {', '.join(aliases)}" if aliases else "no alias"
                raise _outside(f"alias {alias[:140]!r}", allowed, f"aliases[{index}]")
    labels = {**publish.labels, JOB_LABEL: lease.job_id}
    for key, value in asked.labels.items():
        if labels.get(key) != value:
            raise _outside(f"label {key[:140]!r} with that value", "its job's labels", "labels")
    return replace(asked, aliases=aliases, labels=labels)


def _outside(what: str, allowed: str, field: str) -> PermissionDeniedError:
    message = f"this lease is not for {what}, but for {allowed}"
    return PermissionDeniedError(message, reason="OUTSIDE_LEASE", field=field)
