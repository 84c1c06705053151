"""An admission with everything around it: a scripted engine, counted leases and refusals, and a clock that stands."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from motley_server.admission import Admission, AdmissionLimits
from motley_server.asked import AskedAdapter, AskedGeneration, AskedSampling, Caller, TextPrompt
from motley_server.quotas import Quotas
from motley_server.registry.records import Quota
from paper_library import LeaseBook, PaperLibrary
from rpc_harness import CONTEXT, LetterTokenizer, make_base
from scripted_engine import ScriptedEngine


class Refusals:
    """Count refusals."""

    def __init__(self) -> None:
        self.number = 0
        self.by_quota: Counter[str] = Counter()

    def request_refused(self) -> None:
        self.number += 1

    def bytes_uploaded(self, num_bytes: int) -> None:
        raise AssertionError("nothing is uploaded here")

    def bytes_collected(self, num_bytes: int) -> None:
        raise AssertionError("nothing is collected here")

    def quota_exceeded(self, quota: str) -> None:
        self.by_quota[quota] += 1


@dataclasses.dataclass
class Door:
    """An admission with everything around it."""

    engine: ScriptedEngine
    tokenizer: LetterTokenizer
    leases: LeaseBook
    refusals: Refusals
    quotas: Quotas
    library: PaperLibrary
    admission: Admission
    folder: TemporaryDirectory[str]

    async def close(self) -> None:
        """Give back what it stands on."""
        self.admission.close()
        await self.library.stop()
        self.folder.cleanup()


def open_door(*, has_template: bool = True) -> Door:
    """Make one on the running event loop."""
    engine, leases, refusals, folder = ScriptedEngine(), LeaseBook(), Refusals(), TemporaryDirectory()
    limits = AdmissionLimits(CONTEXT, max_prompt_bytes=1000, default_max_new_tokens=8)
    tokenizer = LetterTokenizer(has_template=has_template)
    library, quotas = PaperLibrary(Path(folder.name), engine, leases, refusals), Quotas(refusals, lambda: 0)
    admission = Admission(engine, make_base(), tokenizer, library.sets, limits, refusals, quotas)
    return Door(engine, tokenizer, leases, refusals, quotas, library, admission, folder)


def caller(deadline: float | None = None, quota: Quota | None = None) -> Caller:
    """Return somebody of the local tenant."""
    return Caller("call", "local", frozenset(), deadline, quota or Quota())


def asking(
    *adapters: tuple[str, float | None], text: str = "hi", sampling: AskedSampling | None = None
) -> AskedGeneration:
    """Ask for a text to be continued."""
    return AskedGeneration(TextPrompt(text), tuple(AskedAdapter(*one) for one in adapters), sampling or AskedSampling())
