"""The one file of figures that the scripts of this folder write and the card quotes: `results.json`.

Owns the file and how a machine is named in it. A section is replaced whole by the script that measures it.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results.json"


def results() -> dict[str, Any]:
    """Read every section written so far."""
    read: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return read


def record(section: str, values: dict[str, Any]) -> None:
    """Replace one section and print it."""
    RESULTS.write_text(json.dumps(results() | {section: values}, indent=2, sort_keys=True) + "\n")
    print(f"{section}: {json.dumps(values)}", flush=True)


def machine() -> str:
    """Name the processor, the number of cores and the versions that a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
