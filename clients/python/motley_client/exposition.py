"""Numbers out of a Prometheus text exposition, for showing a few of them.

Owns the reading of the text format as far as counters and histograms need it. Knows no metric by name.
"""

from __future__ import annotations

import http.client
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_BOUND = re.compile(r'(?:^|,)le="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Exposition:
    """One scrape: each sample's value by its name and labels as they were written."""

    samples: Mapping[tuple[str, str], float]

    def __sub__(self, earlier: Exposition) -> Exposition:
        """Return what was counted since an earlier scrape of the same server; meaningless for gauges."""
        return Exposition({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def total(self, name: str) -> float:
        """Return a counter's value, summed over all its labels; 0 if there is none of that name."""
        return sum(value for (found, _), value in self.samples.items() if found == name)

    def mean(self, name: str) -> float:
        """Return a histogram's mean; NaN if it has observed nothing."""
        count = self.total(f"{name}_count")
        return self.total(f"{name}_sum") / count if count else math.nan

    def bounds(self, name: str) -> list[tuple[float, float]]:
        """Return a histogram's upper bounds in ascending order, each with what was observed in that bucket alone."""
        cumulative: dict[float, float] = {}
        for (found, labels), value in self.samples.items():
            match = _BOUND.search(labels)
            if found == f"{name}_bucket" and match is not None:
                bound = float(match[1])
                cumulative[bound] = cumulative.get(bound, 0.0) + value
        alone, below = [], 0.0
        for bound in sorted(cumulative):
            alone.append((bound, cumulative[bound] - below))
            below = cumulative[bound]
        return alone


def parse(text: str) -> Exposition:
    """Read the text format; comments and timestamps are left out."""
    matches = (_SAMPLE.match(line) for line in text.splitlines())
    return Exposition({(match["name"], match["labels"] or ""): float(match["value"]) for match in matches if match})


def scrape(host: str, port: int, timeout_seconds: float = 5.0) -> Exposition:
    """Fetch and read `/metrics`, blocking.

    Raises: OSError if nobody answers there or the answer is no exposition.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        body = response.read().decode()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"/metrics answered {response.status}")
        return parse(body)
    except http.client.HTTPException as error:
        raise OSError(f"/metrics is no HTTP: {error}") from error
    finally:
        connection.close()
