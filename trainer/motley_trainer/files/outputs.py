"""Directories that are made: shown in one rename when all is there, and what a base takes over from its original.

Knows nothing of what is put into them. Runs on the calling thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from motley_trainer.errors import OutputError

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a directory to fill, which becomes `out` in one rename when all went well, and vanishes otherwise.

    Raises: OutputError with reason OUTPUT_EXISTS if something is at `out`, OUTPUT_UNWRITABLE if it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already, and not empty", reason="OUTPUT_EXISTS", field="out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}", reason="OUTPUT_UNWRITABLE", field="out") from error
    try:
        yield aside
        _show(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _show(aside: Path, out: Path) -> None:
    try:
        aside.chmod(0o755)  # made for their owner alone, as temporary files are
        for path in aside.iterdir():
            path.chmod(0o644)
        os.replace(aside, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}", reason="OUTPUT_UNWRITABLE", field="out") from error
