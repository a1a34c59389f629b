"""What a server counts, for Prometheus: requests, times, and what the batcher has to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES = {
    "slots": "Answers that can be made at once.",
    "busy": "Answers being made.",
    "queued": "Answers waiting for a slot.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were in a cache already.",
    "new_tokens": "Tokens generated.",
    "guessed_tokens": "Tokens guessed ahead, with --look-up or --draft.",
    "right_tokens": "Tokens guessed ahead that were right.",
}


class Metrics:
    """One server's counters. `stats` gives the batcher's, or None while there is none."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gemmary_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
        )
        self.seconds = self._histogram("gemmary_request_seconds", "From a request's head to its answer's end.")
        self.first_token_seconds = self._histogram("gemmary_first_token_seconds", "From a request to its first token.")
        self.token_seconds = self._histogram(
            "gemmary_token_seconds", "From a token to the next, the mean of each answer."
        )
        self._registry.register(_Batcher(stats))

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _Batcher(Collector):
    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"gemmary_{name}", what, value=getattr(stats, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"gemmary_{name}", what, value=getattr(stats, name))
