"""What every kind's reader is given, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import FileReader, read_file
from motley_adapters.manifest_object import ManifestObject
from motley_adapters.spec import BaseTensor, Channels, Part


@dataclass(frozen=True, slots=True)
class KindSource:
    """A directory to read, the base to hold it against, and the object under the kind's name in its manifest.

    Semantics: `residuals` is a folder of shared residual files by digest, for directories that hold none; `read` is how
    tensor files are read.
    """

    directory: Path
    base: BaseSpec
    base_tensor: BaseTensor | None = None
    residuals: Path | None = None
    manifest_details: ManifestObject | None = None
    read: FileReader = read_file

    def details(self, kind: str) -> ManifestObject:
        """Return the manifest's object for the kind.

        Raises: AdapterFormatError with reason MISSING_FIELD.
        """
        if self.manifest_details is None:
            name = f"motley_manifest.{kind}"
            raise AdapterFormatError(f"{name} is missing", reason="MISSING_FIELD", field=name)
        return self.manifest_details


@dataclass(frozen=True, slots=True)
class KindContent:
    """An adapter's own units by module path, the parts it shares, and for S2FT the channels it changes.

    Semantics: tensors have the dtypes of the file and mostly are views of it; a mapping may make a unit anew each time
    it is asked for one. So whoever keeps a unit copies it.
    """

    units: Mapping[str, DeltaUnit]
    shared: tuple[Part, ...] = ()
    channels: Mapping[str, Channels] = field(default_factory=dict)
