"""Counters and histograms out of the text format."""

from __future__ import annotations

import math

from motley_client.exposition import parse

TEXT = """\
# HELP motley_steps_total Forward passes.
# TYPE motley_steps_total counter
motley_steps_total 7.0
motley_requests_total{outcome="stop"} 4.0
motley_requests_total{outcome="length, or } so"} 1e1 1700000000
motley_batch_size_bucket{le="1.0"} 2.0
motley_batch_size_bucket{le="4.0"} 5.0
motley_batch_size_bucket{le="+Inf"} 6.0
motley_batch_size_count 6.0
motley_batch_size_sum 15.0
"""


def test_a_counter_is_summed_over_its_labels() -> None:
    found = parse(TEXT)

    assert found.total("motley_steps_total") == 7
    assert found.total("motley_requests_total") == 14
    assert found.total("motley_requests") == 0


def test_a_histogram_gives_its_mean_and_each_bucket_alone() -> None:
    found = parse(TEXT)

    assert found.mean("motley_batch_size") == 2.5
    assert math.isnan(found.mean("nothing"))
    assert found.bounds("motley_batch_size") == [(1.0, 2.0), (4.0, 3.0), (math.inf, 1.0)]


def test_a_difference_counts_from_the_earlier_scrape_and_new_samples_from_zero() -> None:
    earlier = parse("motley_steps_total 3\n")

    since = parse(TEXT) - earlier

    assert since.total("motley_steps_total") == 4
    assert since.total("motley_requests_total") == 14
