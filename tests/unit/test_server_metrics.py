"""Metrics: what is told is what is shown, and the document lists exactly what there is."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
from motley_server.config_values import Address
from motley_server.engine.api import EngineStats
from motley_server.engine.observer import RequestReport, StepReport
from motley_server.metrics import OUTCOMES, Metrics
from motley_server.quotas import REASON_OF_QUOTA
from motley_server.registry.job_records import JobState
from motley_server.rpc.convert_training import METHODS as WIRE_METHODS
from motley_server.training_metrics import ENDS, METHODS
from rpc_harness import make_base

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"\| `(motley_\w+)` \| (counter|gauge|histogram|info) \| ([^|]*) \| (.+) \|")


def make_metrics() -> Metrics:
    metrics = Metrics("1.2.3", make_base())
    metrics.follow(lambda: EngineStats(4, 2, 30, 120, 16, 1000, 1, 7, 512, 2048), lambda: 777)
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def exported(metrics: Metrics) -> set[tuple[str, str, str]]:
    """Return (name, type, labels) of every series, the name as a query writes it."""
    found = set()
    metrics.rpc_finished("/a/B", "OK", 0.1)
    for family in metrics.registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found.add((family.name + suffix, family.type, ", ".join(f"`{label}`" for label in sorted(labels))))
    return found


def test_the_document_lists_exactly_what_is_exported() -> None:
    rows = [row for row in ROW.findall(DOCUMENT.read_text(encoding="utf-8")) if "_worker_" not in row[0]]
    assert len(rows) == len({row[0] for row in rows})
    assert {(name, kind, labels.strip()) for name, kind, labels, _ in rows} == exported(make_metrics())


def test_a_step_is_counted_once_everywhere() -> None:
    metrics = make_metrics()
    metrics.step_finished(StepReport(0.02, 40, 5, 3, 5, 0, 10, 120))
    assert value(metrics, "motley_forward_passes_total") == 1
    assert value(metrics, "motley_step_seconds_sum") == 0.02
    assert value(metrics, "motley_batch_tokens_sum") == 40
    assert value(metrics, "motley_batch_size_sum") == 5
    assert value(metrics, "motley_batch_distinct_adapters_sum") == 3
    assert value(metrics, "motley_batch_distinct_adapters_bucket", le="2.0") == 0


def test_requests_are_counted_by_outcome_from_the_start() -> None:
    metrics = make_metrics()
    assert {outcome: value(metrics, "motley_requests_total", outcome=outcome) for outcome in OUTCOMES} == (
        dict.fromkeys(OUTCOMES, 0.0)
    )
    metrics.request_finished(RequestReport("stop", 10, 4, 6, 0.1, 0.9))
    metrics.request_finished(RequestReport("deadline", 3, 0, 1, 0.2, 1.0))
    metrics.request_refused()
    assert value(metrics, "motley_requests_total", outcome="stop") == 1
    assert value(metrics, "motley_requests_total", outcome="deadline") == 1
    assert value(metrics, "motley_requests_total", outcome="rejected") == 1
    assert value(metrics, "motley_prompt_tokens_total") == 13
    assert value(metrics, "motley_generation_tokens_total") == 7
    assert value(metrics, "motley_request_queue_time_seconds_sum") == pytest.approx(0.3)
    assert value(metrics, "motley_e2e_request_latency_seconds_count") == 2


def test_tokens_prefixes_and_preemptions_are_counted() -> None:
    metrics = make_metrics()
    metrics.prefix_looked_up(32, 16)
    metrics.sequence_preempted()
    metrics.first_token_made(0.5)
    metrics.next_token_made(0.01)
    assert value(metrics, "motley_prefix_cache_queries_total") == 32
    assert value(metrics, "motley_prefix_cache_hits_total") == 16
    assert value(metrics, "motley_preemptions_total") == 1
    assert value(metrics, "motley_time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "motley_inter_token_latency_seconds_count") == 1


def test_loads_and_evictions_of_adapters_are_counted() -> None:
    metrics = make_metrics()
    metrics.part_loaded(0.25)
    metrics.part_loaded(0.5)
    metrics.part_evicted()
    metrics.load_failed()
    assert value(metrics, "motley_adapter_loads_total") == 2
    assert value(metrics, "motley_adapter_load_seconds_sum") == 0.75
    assert value(metrics, "motley_adapter_evictions_total") == 1
    assert value(metrics, "motley_adapter_load_failures_total") == 1


def test_refusals_are_counted_by_quota_from_the_start() -> None:
    metrics = make_metrics()
    metrics.quota_exceeded("tokens_per_minute")
    found = {quota: value(metrics, "motley_quota_refusals_total", quota=quota) for quota in REASON_OF_QUOTA}
    assert found == {"requests_in_flight": 0.0, "requests_per_minute": 0.0, "tokens_per_minute": 1.0}


def test_the_engines_state_is_read_at_the_scrape() -> None:
    metrics = make_metrics()
    assert value(metrics, "motley_requests_running") == 4
    assert value(metrics, "motley_requests_waiting") == 2
    assert value(metrics, "motley_kv_cache_usage_ratio") == 0.25
    assert value(metrics, "motley_adapter_cache_bytes") == 777
    assert value(metrics, "motley_requests_waiting_for_adapters") == 1
    assert value(metrics, "motley_adapter_resident_parts") == 7
    assert value(metrics, "motley_adapter_arena_used_bytes") == 512
    assert value(metrics, "motley_adapter_arena_bytes") == 2048
    assert value(metrics, "motley_build_info", version="1.2.3") == 1


def test_two_servers_in_one_process_do_not_share_series() -> None:
    first, second = make_metrics(), make_metrics()
    first.sequence_preempted()
    assert value(second, "motley_preemptions_total") == 0


def test_the_endpoint_shows_the_registry_until_it_is_stopped() -> None:
    metrics = make_metrics()
    endpoint = metrics.serve(Address("127.0.0.1", 0))
    url = f"http://127.0.0.1:{endpoint.port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert b"motley_requests_running 4.0" in answer.read()
    endpoint.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_jobs_are_counted_by_method_and_end_from_the_start() -> None:
    metrics = make_metrics()
    metrics.job_ended("lora", "failed")
    ended = {
        (method, state): value(metrics, "motley_training_jobs_ended_total", method=method, state=state)
        for method in METHODS
        for state in ENDS
    }
    assert ended == dict.fromkeys(ended, 0.0) | {("lora", "failed"): 1.0}
    metrics.training_counted(3, 2, 1)
    metrics.job_leased(4.5)
    metrics.dataset_bytes_uploaded(70)
    assert [value(metrics, "motley_training_jobs", state=state) for state in ("queued", "running")] == [3, 2]
    assert value(metrics, "motley_training_workers") == 1
    assert value(metrics, "motley_training_wait_seconds_sum") == 4.5
    assert value(metrics, "motley_training_dataset_bytes_total") == 70


def test_the_methods_and_ends_that_are_counted_are_those_that_there_are() -> None:
    assert set(METHODS) == set(WIRE_METHODS.values())
    assert set(ENDS) == {state.value for state in JobState if state.is_end}
