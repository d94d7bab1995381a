"""Counts and times of the server in the text format of Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxspec.serve.engine import Engine
from jaxspec.serve.job import Done, Event, Listener, Sound

_SECONDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
_FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)
_OUTCOMES = ("finished", "failed", "cancelled")
_COUNTS = {
    "tokens": "Tokens emitted.",
    "rounds": "Rounds that emitted a token, or plain steps.",
    "drafted": "Tokens drafted.",
    "accepted": "Drafted tokens accepted; over drafted it is the acceptance rate.",
    "audio_seconds": "Seconds of speech made.",
}


class Metrics:
    """What an engine has done, and how long requests waited."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine):
        self._engine, self._registry = engine, CollectorRegistry()
        self._first_audio = Histogram(
            "jaxspec_time_to_first_audio_seconds",
            "From a request to its first sound.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._rtf = Histogram(
            "jaxspec_real_time_factor",
            "Seconds of a request over seconds of its speech.",
            buckets=_FACTORS,
            registry=self._registry,
        )
        self._registry.register(self)

    def watching(self, listen: Listener) -> Listener:
        """A listener that takes the times of the events, which it passes on."""
        began, first = time.monotonic(), []

        def watched(event: Event) -> None:
            now = time.monotonic() - began
            if isinstance(event, Sound) and not first:
                first.append(now)
                self._first_audio.observe(now)
            if isinstance(event, Done) and event.counts["audio_seconds"]:
                self._rtf.observe(now / event.counts["audio_seconds"])
            listen(event)

        return watched

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts, for the registry."""
        totals = self._engine.totals
        requests = CounterMetricFamily("jaxspec_requests", "Requests by how they ended.", labels=["outcome"])
        for outcome in _OUTCOMES:
            requests.add_metric([outcome], totals[outcome])
        yield requests
        for name, about in _COUNTS.items():
            yield CounterMetricFamily(f"jaxspec_{name}", about, value=totals[name])
        for name, value in self._engine.gauges().items():
            yield GaugeMetricFamily(f"jaxspec_{name}_now", f"The {name.replace('_', ' ')} at this moment.", value=value)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)
