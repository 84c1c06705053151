"""Identities of adapters, of sets of them and of caches: content, never names.

Two names for the same content share an identity, and one name whose content changes does not keep it, so no cache can
answer with what another adapter, another base or another tenant left behind. Pure functions; any thread, but hashing an
adapter's tensors takes time.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping

import torch
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

from motley_adapters.errors import AdapterSetError
from motley_adapters.tensor_file import in_pieces

SetIdentity = tuple[tuple[str, float], ...]


def adapter_digest(kind: str, units: Mapping[str, DeltaUnit], shared: Iterable[str] = ()) -> str:
    """Return "sha256:..." over what an adapter does, not over how it is written down.

    Semantics: kind, digests of shared parts, and by module path in order: path, resolved scaling as a double, shape and
    values of every tensor that the unit has (floats as little-endian float32, channels as int32) or that it has none,
    top_k. So file order, stored dtype where it is exact, the spelling of target_modules and patterns, and every name
    and label are left out; everything that moves a logit is in. Fields are framed by their lengths, so that no two
    contents share a stream of bytes.
    """
    digest = hashlib.sha256()
    _feed(digest, b"motley adapter 2")
    _feed(digest, kind.encode())
    _feed_units(digest, units)
    for part in sorted(shared):
        _feed(digest, part.encode())
    return f"sha256:{digest.hexdigest()}"


def part_digest(units: Mapping[str, DeltaUnit]) -> str:
    """Return "sha256:..." over a part that several adapters may share; see `adapter_digest`."""
    digest = hashlib.sha256()
    _feed(digest, b"motley part 1")
    _feed_units(digest, units)
    return f"sha256:{digest.hexdigest()}"


def set_identity(pairs: Iterable[tuple[str, float]]) -> SetIdentity:
    """Return the canonical form of a weighted set of adapters.

    Semantics: pairs are (digest, weight), sorted by digest, which also fixes the order of summation; a weight of 0 is
    absence, so the empty set is the base alone.
    Raises: AdapterSetError with reason DUPLICATE_ADAPTER or INVALID_WEIGHT.
    """
    weights: dict[str, float] = {}
    for digest, weight in pairs:
        if digest in weights:
            message = f"{digest} is named twice; name it once with the sum of its weights"
            raise AdapterSetError(message, reason="DUPLICATE_ADAPTER", field="adapters")
        if not math.isfinite(weight):
            raise AdapterSetError(f"the weight of {digest} is not finite", reason="INVALID_WEIGHT", field="adapters")
        weights[digest] = float(weight)
    return tuple((digest, weight) for digest, weight in sorted(weights.items()) if weight != 0)


def cache_seed(identity: SetIdentity, base_fingerprint: str, tenant_salt: bytes) -> bytes:
    """Return the first link of a chain of hashes over prompt blocks.

    Semantics: what cached keys and values depend on besides the tokens goes in: the adapters and their weights,
    because they change every key and value after the first layer; the base, and with it whatever changes its
    numbers (the caller joins quantization and prune manifest to the fingerprint where there are any); the tenant,
    because a hit that is faster than a miss would tell one tenant what another one asked. A cache that leaves one
    of them out answers with somebody else's attention. `identity` must come from `set_identity`.
    """
    digest = hashlib.sha256()
    _feed(digest, b"motley cache 1")
    _feed(digest, base_fingerprint.encode())
    _feed(digest, tenant_salt)
    for adapter, weight in identity:
        _feed(digest, adapter.encode())
        _feed(digest, struct.pack("<d", weight))
    return digest.digest()


def _feed_units(digest: hashlib._Hash, units: Mapping[str, DeltaUnit]) -> None:
    _feed(digest, struct.pack("<q", len(units)))
    for path in sorted(units):
        unit = units[path]
        _feed(digest, path.encode())
        _feed(digest, struct.pack("<d", unit.scaling))
        for tensor in (unit.a, unit.b, unit.inputs, unit.outputs):
            _feed_tensor(digest, tensor)
        _feed_tensor(digest, None if unit.gate is None else unit.gate.router)
        _feed(digest, struct.pack("<q", 0 if unit.gate is None else unit.gate.top_k))


def _feed_tensor(digest: hashlib._Hash, tensor: Tensor | None) -> None:
    if tensor is None:
        _feed(digest, b"none")
        return
    _feed(digest, struct.pack(f"<{tensor.ndim}q", *tensor.shape))  # eight bytes a dimension: never as long as "none"
    digest.update(struct.pack("<Q", 4 * tensor.numel()))
    for piece in in_pieces(tensor):
        digest.update(_little_endian(piece))


def _feed(digest: hashlib._Hash, field: bytes | memoryview) -> None:
    digest.update(struct.pack("<Q", len(field)))
    digest.update(field)


def _little_endian(tensor: Tensor) -> memoryview:
    dtype, spelled = (torch.float32, "<f4") if tensor.is_floating_point() else (torch.int32, "<i4")
    array = tensor.detach().to("cpu", dtype).contiguous().numpy().astype(spelled, copy=False)
    return array.data.cast("B")
