"""The order in which INT8 weights lie in a checkpoint, as bitsandbytes stores it beside them: row by row, or refused.

transformers reads these numbers and takes no notice of them: weights laid out for the matrix units of an old GPU would
be taken for rows. Reads safetensors files byte by byte. Runs on the thread that loads the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from motley_bases.errors import UnsupportedBaseError
from motley_bases.fingerprint import TensorHeader, read_header

SUFFIX = ".weight_format"
ROW_BY_ROW = "0"


def check_row_by_row(files: Iterable[Path]) -> None:
    """Refuse INT8 weights that are stored in another order than row by row; those that do not say are.

    Raises: UnsupportedBaseError with reason WEIGHT_FORMAT and the tensor; UnreadableBaseError for files that are not
    safetensors.
    """
    for path in files:
        with path.open("rb") as file:
            for header in read_header(path, file):
                if header.name.endswith(SUFFIX) and (found := _stored(file, header)) != ROW_BY_ROW:
                    message = f"{header.name} is {found}: INT8 weights are served that lie row by row, {ROW_BY_ROW}"
                    raise UnsupportedBaseError(message, reason="WEIGHT_FORMAT", field=header.name)


def _stored(file: BinaryIO, header: TensorHeader) -> str:
    """Return the number in words, or what there is in place of one byte, which is 0 in every type of a byte."""
    if header.end - header.begin != 1:
        return f"{list(header.shape)} of {header.dtype}"
    file.seek(header.begin)
    return str(file.read(1)[0])
