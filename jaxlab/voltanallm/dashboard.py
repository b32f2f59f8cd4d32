"""A live page about a server: clocks, batches, latencies against their objectives, power and energy.

The page is one HTML file with everything in it, which asks for what is new once a second.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxlab.voltanallm.control_loop import WorkerView

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
"""Content-Security-Policy of the page: it loads nothing, and asks nobody but its own server."""

_PART = Path(__file__).with_name("_dashboard.html")
_SAMPLES = 360
_EVERY_S = 0.5
_RECENT_S = 5.0  # over which a sample's latencies and joules per token are taken


def page(model: str) -> str:
    """The page; `model` is what it is about."""
    html, css, script = (_PART.with_suffix(kind).read_text(encoding="utf-8") for kind in (".html", ".css", ".js"))
    return html.replace("/* css */", css).replace("/* script */", script).replace("{model}", escape(model))


class Board:
    """What the page shows: the last minutes as samples, and what is now.

    Args:
      model: its name.
      loop: the `EngineLoop`.
      telemetry: of the server.
      workers: gives a `WorkerView` of each worker.
    """

    def __init__(self, model: str, loop: Any, telemetry: Any, workers: Callable[[], Sequence[WorkerView]]):
        self._model, self._loop, self._telemetry, self._workers = model, loop, telemetry, workers
        self._samples: collections.deque[dict[str, Any]] = collections.deque(maxlen=_SAMPLES)
        self._spent: collections.deque[tuple[float, float, int]] = collections.deque()  # time, joules, tokens
        self._started = time.monotonic()

    async def keep(self) -> None:
        """Takes samples until it is cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(_EVERY_S)

    def sample(self) -> None:
        """Takes one sample."""
        now, workers = time.monotonic(), self._workers()
        ttft_slo, itl_slo = _objectives(workers)
        joules = sum(worker.energy_j or 0.0 for worker in workers)
        self._spent.append((now, joules, self._telemetry.generated))
        while self._spent[0][0] < now - _RECENT_S:
            self._spent.popleft()
        (then, joules_then, tokens_then), generated = self._spent[0], self._telemetry.generated
        tokens, seconds = generated - tokens_then, now - then
        metered = any(worker.energy_j is not None for worker in workers)
        self._samples.append(
            {
                "t": now - self._started,
                "tokens_per_s": tokens / seconds if seconds > 0 else None,
                "joules_per_token": (joules - joules_then) / tokens if metered and tokens else None,
                "waiting": 0 if self._loop.snapshot is None else self._loop.snapshot[0].waiting,
                "ttft": self._telemetry.ttft.summary(ttft_slo, seconds=_RECENT_S),
                "itl": self._telemetry.itl.summary(itl_slo, seconds=_RECENT_S),
                "workers": [[worker.freq_mhz, worker.running, worker.power_w] for worker in workers],
            }
        )

    def data(self, since: float) -> dict[str, Any]:
        """Samples after a time, and the present.

        Args:
          since: `now` of an earlier answer; 0: everything there is.
        """
        workers = self._workers()
        ttft_slo, itl_slo = _objectives(workers)
        free_pages = None if self._loop.snapshot is None else self._loop.snapshot[1]
        metered = [worker.energy_j for worker in workers if worker.energy_j is not None]
        return {
            "model": self._model,
            "now": time.monotonic() - self._started,
            "trouble": self._loop.unavailable,
            "under_way": self._loop.under_way,
            "finished": self._telemetry.finished,
            "generated": self._telemetry.generated,
            "free_pages": free_pages,
            "energy_j": sum(metered) if metered else None,
            "simulated": any(worker.simulated for worker in workers),
            "objectives": {"ttft_ms": ttft_slo, "itl_ms": itl_slo},
            "ttft": self._telemetry.ttft.summary(ttft_slo),
            "itl": self._telemetry.itl.summary(itl_slo),
            "workers": [dataclasses.asdict(worker) for worker in workers],
            "samples": [sample for sample in self._samples if sample["t"] > since],
        }


def _objectives(workers: Sequence[WorkerView]) -> tuple[float | None, float | None]:
    """Of time to first token and inter-token latency: those of the workers that make them."""

    def strictest(*phases: str) -> float | None:
        found = [worker.slo_ms for worker in workers if worker.phase in phases and worker.slo_ms is not None]
        return min(found, default=None)

    return strictest("prefill"), strictest("decode", "both")
