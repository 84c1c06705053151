"""Publications: which version of an adapter a job has made.

A version says who made it: a key, or a job by the token of its lease. It knows no wire and no SQL. It blocks: it runs
on the database's threads.
"""

from __future__ import annotations

from contextlib import suppress

from motley_server.errors import FailedPreconditionError, NotFoundError
from motley_server.registry.adapters import Adapters
from motley_server.registry.job_records import JobRecord
from motley_server.registry.records import AdapterVersion

NUM_LOOKED_AT = 1000
"""Versions, the newest first: it was made a moment ago."""


def find_published(adapters: Adapters, job: JobRecord) -> AdapterVersion:
    """Return the version that a job has made.

    Raises: FailedPreconditionError (reason=NOT_PUBLISHED) if it has made none, or it was deleted.
    """
    if job.adapter_name is not None:
        with suppress(NotFoundError):
            for version in adapters.list_versions(job.owner, job.owner, job.adapter_name, NUM_LOOKED_AT).items:
                if version.created_by == job.id:
                    return version
    message = f"{job.id} has published no version of adapter {job.adapter_name!r}, and so it has not succeeded"
    raise FailedPreconditionError(message, reason="NOT_PUBLISHED", field="ending.state")
