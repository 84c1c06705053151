"""What LoQT has merged and made, in a few words: lines of `motley train watch` and `show`.

Pure functions.
"""

from __future__ import annotations

import shlex

from motley_client.types_training import MergeReport, TrainedBase

SHOWN_STEPS = 8  # of one line


def merges_words(report: MergeReport) -> str:
    """Write at which steps factors were merged, and the digest of the weights after the last of them."""
    if not report.merges:
        return "merged: nothing"
    steps = [str(merge.step) for merge in report.merges]
    if len(steps) > SHOWN_STEPS:
        where = f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    else:
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(steps[:-1])} and {steps[-1]}"
    return f"merged at {where}; the weights are then {report.merges[-1].digest}"


def base_words(base: TrainedBase) -> str:
    """Write what was made, where it lies, and how it is served."""
    origin = f"from {base.original_fingerprint}" if base.original_fingerprint else "from scratch"
    merges = f"{base.num_merges} merge{'' if base.num_merges == 1 else 's'}"
    serve = f"motley serve --base {shlex.quote(base.directory)}"
    return f"{base.fingerprint}, {origin} by {merges}, {base.size_bytes} bytes; serve it where its worker is: {serve}"
