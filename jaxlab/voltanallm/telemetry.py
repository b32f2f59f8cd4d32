"""What a server measures: for Prometheus as sums since the start, for the dashboard as the last minute."""

import bisect
import collections
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_KEPT = 20_000  # latencies in a window, at most
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
_PREFIX = "jaxlab_"


class Window:
    """Latencies of the last seconds; at most so many that a look at them costs little."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._values: collections.deque[tuple[float, float]] = collections.deque(maxlen=_KEPT)

    def add(self, when: float, value: float) -> None:
        """Takes a latency in seconds."""
        self._values.append((when, value))

    def summary(self, slo_ms: float | None, *, seconds: float | None = None) -> dict[str, float | int | None]:
        """Count, p50_ms, p95_ms, p99_ms, and the share within an objective; None where there is nothing."""
        oldest = time.monotonic() - (seconds or self._seconds)
        values = sorted(
            1000 * value
            for when, value in itertools.takewhile(lambda entry: entry[0] >= oldest, reversed(self._values))
        )
        told: dict[str, float | int | None] = {"count": len(values), "within": None}
        for share in (50, 95, 99):
            told[f"p{share}_ms"] = values[min(len(values) - 1, len(values) * share // 100)] if values else None
        if values and slo_ms is not None:
            told["within"] = bisect.bisect_right(values, slo_ms) / len(values)
        return told


class Telemetry:
    """Counts and measures; told by the service, read by `/metrics` and the dashboard.

    Args:
      loop: of the engine.
      workers: gives a `WorkerView` of each worker.
    """

    def __init__(self, loop: Any, workers: Any):
        self._loop, self._workers = loop, workers
        self.registry = prometheus_client.CollectorRegistry()
        self.ttft, self.itl = Window(60.0), Window(60.0)
        self.generated = self.finished = 0

        def made(kind: Any, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
            return kind(_PREFIX + name, text, labels, registry=self.registry, **more)

        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        self._requests = made(counter, "requests", "Answers (prompts times n) by outcome", ["outcome"])
        self._refused = made(counter, "refused", "HTTP requests answered with an error", ["status"])
        tokens = made(counter, "tokens", "Tokens of prompts and of answers", ["kind"])
        self._ttft = made(histogram, "time_to_first_token_seconds", "Request to first token", buckets=_TTFT_S)
        self._itl = made(histogram, "inter_token_latency_seconds", "From token to token", buckets=_ITL_S)
        self._prompt_tokens, self._generated = (tokens.labels(kind) for kind in ("prompt", "generated"))
        self.registry.register(self)
        for outcome in ("stop", "length", "cancelled", "failed"):
            self._requests.labels(outcome)

    def prompt_tokens(self, count: int) -> None:
        """Prompts have come."""
        self._prompt_tokens.inc(count)

    def tokens(self, count: int, seconds: float, when: float, *, first: bool) -> None:
        """Tokens of one answer have come, so long after the request or after those before."""
        self._generated.inc(count)
        self.generated += count
        if first:
            self._ttft.observe(seconds)
            self.ttft.add(when, seconds)
            return
        for _ in range(count):
            self._itl.observe(seconds / count)
            self.itl.add(when, seconds / count)

    def ended(self, outcome: str, count: int = 1) -> None:
        """Answers have ended: "stop", "length", "cancelled" or "failed"."""
        self._requests.labels(outcome).inc(count)
        self.finished += count

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(str(status)).inc()

    def collect(self) -> Iterator[Any]:
        """What is read when it is asked for, as `prometheus_client` wants it."""

        def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
            return GaugeMetricFamily(_PREFIX + name, text, value=value)

        yield gauge("requests_under_way", "Answers let in and not ended", self._loop.under_way)
        if self._loop.snapshot is not None:
            metrics, free_pages, preemptions = self._loop.snapshot
            yield gauge("requests_running", "Requests that hold pages", metrics.running)
            yield gauge("requests_waiting", "Requests that wait for pages", metrics.waiting)
            yield gauge("kv_tokens", "Tokens of running requests", metrics.tokens)
            yield gauge("free_pages", "Free pages of keys and values", free_pages)
            yield CounterMetricFamily(_PREFIX + "preemptions", "Requests computed again", value=preemptions)
        yield from self._of_workers()

    def _of_workers(self) -> Iterator[Any]:
        states = self._workers()
        kinds: tuple[tuple[Any, str, str, str], ...] = (
            (GaugeMetricFamily, "sm_clock_mhz", "Clock of a worker's GPU", "freq_mhz"),
            (GaugeMetricFamily, "power_watts", "Power of a worker's GPU", "power_w"),
            (CounterMetricFamily, "energy_joules", "Energy of a worker's GPU", "energy_j"),
            (CounterMetricFamily, "clock_switches", "Changes of a worker's clock", "switches"),
            (GaugeMetricFamily, "worker_running", "Requests in a worker's last iteration", "running"),
            (GaugeMetricFamily, "objective_ms", "Objective of a worker's controller", "slo_ms"),
        )
        for family, name, text, attribute in kinds:
            made = family(_PREFIX + name, text, labels=["worker", "phase"])
            for state in states:
                value = getattr(state, attribute)
                if value is not None:
                    made.add_metric([state.id, state.phase], value)
            if made.samples:
                yield made

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return prometheus_client.generate_latest(self.registry)
