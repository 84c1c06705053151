"""The one door: a directory becomes an adapter that is sound and fits the base.

Uploads, adapters named at start-up and what comes back from the blob store all pass here, so nothing is served that was
checked less. It owns the order of the checks and the choice of the kind. Reads files and computes for a while; any
thread but the event loop's and the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from motley_bases.spec import BaseSpec

from motley_adapters.identity import adapter_digest
from motley_adapters.kinds import goat, lora, loram, s2ft
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.manifest import check_base, check_digest, read_manifest
from motley_adapters.spec import Adapter, AdapterSpec, BaseTensor

KindReader = Callable[[KindSource], KindContent]

KIND_READERS: Mapping[str, KindReader] = MappingProxyType(
    {
        lora.KIND: lora.read_lora,
        s2ft.KIND: s2ft.read_s2ft,
        goat.KIND: goat.read_goat,
        loram.KIND: loram.read_loram,
    }
)


def read_adapter(
    directory: Path, base: BaseSpec, *, base_tensor: BaseTensor | None = None, residuals: Path | None = None
) -> Adapter:
    """Read an adapter's directory, check everything, and return it in host memory.

    Semantics: `base_tensor` is asked for the weight of the embedding or of lm_head, and only when the files hold a
    copy of one: equal, it is ignored; different, or with nothing to compare it to, the adapter is refused. `residuals`
    is a folder with GOAT residuals by digest, `DIGITS.safetensors`, for adapters that do not hold their own.
    Raises: AdapterFormatError for what is wrong with the files; AdapterMismatchError for what does not fit this
    base. Nothing else, whatever the files hold.
    """
    manifest = read_manifest(directory, KIND_READERS, default_kind=lora.KIND)
    check_base(manifest, base)
    content = KIND_READERS[manifest.kind](KindSource(directory, base, base_tensor, residuals, manifest.details))
    shared = tuple(part.digest for part in content.shared)
    digest = adapter_digest(manifest.kind, content.units, shared)
    check_digest(manifest, digest)
    spec = AdapterSpec(
        digest=digest,
        kind=manifest.kind,
        ranks={path: unit.rank for path, unit in content.units.items()},
        scalings={path: unit.scaling for path, unit in content.units.items()},
        trained_on=manifest.trained_on,
        nbytes=sum(unit.nbytes for unit in content.units.values()),
        shared=shared,
        serves_on=manifest.serves_on,
        channels=content.channels,
    )
    return Adapter(spec, content.units, content.shared)
