"""The terms under which workers train: what they are told when they register, and its digest, which leases repeat.

A worker may have registered at the same server when that was started otherwise; by the digest it notices before it
trains. Pure; runs on the event loop's thread.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta

from motley.v1 import training_pb2
from motley_bases.spec import BaseSpec


def terms_of(base: BaseSpec, lease_duration: timedelta) -> training_pb2.RegisterWorkerResponse:
    """Return what a worker is told: how the base is held, how long a lease lasts, and the digest of that."""
    terms = training_pb2.RegisterWorkerResponse(quantization=base.quantization, dtype=base.dtype)
    terms.lease_duration.FromTimedelta(lease_duration)
    said = [base.fingerprint, base.quantization, base.dtype, terms.lease_duration.ToNanoseconds()]
    terms.terms_digest = f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"
    return terms
