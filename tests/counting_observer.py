"""An observer that counts, for tests that want to know what really happened."""

from __future__ import annotations

from motley_server.engine.observer import RequestReport, StepReport


class CountingObserver:
    """Keep every report (see `EngineObserver`)."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.requests: list[RequestReport] = []
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.load_seconds: list[float] = []
        self.num_evictions = 0
        self.num_failed_loads = 0
        self.first_token_seconds: list[float] = []
        self.next_token_seconds: list[float] = []

    def step_finished(self, report: StepReport) -> None:
        self.steps.append(report)

    def prefix_looked_up(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        self.num_queried_tokens += num_queried_tokens
        self.num_hit_tokens += num_hit_tokens

    def sequence_preempted(self) -> None:
        self.num_preemptions += 1

    def first_token_made(self, seconds: float) -> None:
        self.first_token_seconds.append(seconds)

    def next_token_made(self, seconds: float) -> None:
        self.next_token_seconds.append(seconds)

    def request_finished(self, report: RequestReport) -> None:
        self.requests.append(report)

    def part_loaded(self, seconds: float) -> None:
        self.load_seconds.append(seconds)

    def part_evicted(self) -> None:
        self.num_evictions += 1

    def load_failed(self) -> None:
        self.num_failed_loads += 1
