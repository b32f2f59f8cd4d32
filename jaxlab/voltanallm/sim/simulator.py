"""The cluster, event by event: arrival, prefill, transfer of the KV cache, decode iterations until the last token.

Queues and batches feed back: at a lower clock requests stay longer, so batches and their KV caches grow. A request's KV
room on its decode worker is kept for its final length before its cache is moved, so none is ever evicted; the engine,
which cannot know that length, preempts instead.
"""

import heapq
import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from jaxlab.voltanallm.config import ControllerConfig
from jaxlab.voltanallm.router import RequestInfo, Router, WorkerState
from jaxlab.voltanallm.sim.cluster import ClusterConfig
from jaxlab.voltanallm.sim.latency import scalar
from jaxlab.voltanallm.sim.metrics import Moment, SimResult
from jaxlab.voltanallm.sim.models import SimModels
from jaxlab.voltanallm.sim.traces import Trace
from jaxlab.voltanallm.sim.workers import Clock, Iteration, Noise, Role, Worker

_PREFILL_END, _ENTER, _START, _DECODE_END, _IDLE = range(5)
_PLACES, _NOISE = 1, 2  # streams of random numbers


class Simulator:
    """What a trace costs on a cluster, and how well objectives are kept.

    Example:
        lengths = sharegpt()
        trace = Trace.from_lengths(lengths.prompt, lengths.output, rate=50, num_requests=3000)
        controller = ControllerConfig("ecofreq", freqs=(1005, 1410), prefill_slo_ms=800, decode_slo_ms=50)
        models = SimModels.preset("llama-3.1-8b-a100")
        result = Simulator(ClusterConfig(2, 2), trace, "tile_aware", controller, models).run()

    Prompts go to prefill workers at random; the same ones whatever the policy.

    Args:
      cluster: workers, memory, links.
      trace: what arrives.
      policy: a name that `Router` knows, for the choice of a decode worker; or a router.
      controller: of the clocks, one for each worker; or a pair, of those that prefill and of those that decode.
      models: latencies and power of the GPUs, and what controllers and router believe of them.
      seed: of the noise and of the random choices.

    Raises:
      ValueError: an unknown policy, a clock that a model does not know, or a table that a policy or controller lacks.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        trace: Trace,
        policy: str | Router,
        controller: ControllerConfig | tuple[ControllerConfig, ControllerConfig],
        models: SimModels,
        seed: int = 0,
    ) -> None:
        self.cluster, self.trace, self.policy = cluster, trace, policy
        self.controllers = controller if isinstance(controller, tuple) else (controller, controller)
        self.models, self.seed = models, seed
        _Run(self, False)  # finds what does not fit together

    def run(self, until_s: float | None = None, *, record: bool = False) -> SimResult:
        """Simulates all requests, or those until a time; a second call gives the same result.

        Args:
          until_s: what happens later is not simulated; requests under way then count as aborted, and those that have
            not arrived by then do not count.
          record: whether to keep every iteration's clock and batch.

        Raises:
          ValueError: a time that is not positive.
        """
        if until_s is not None and not until_s > 0:
            raise ValueError(f"until_s: expected a positive time, got {until_s}")
        return _Run(self, record).go(math.inf if until_s is None else until_s)


class _Run:
    """One run's state."""

    def __init__(self, given: Simulator, record: bool) -> None:
        cluster, models = given.cluster, given.models
        self.cluster = cluster
        prefill, decode = given.controllers
        self.ttft_ms, self.itl_ms = prefill.prefill_slo_ms, decode.decode_slo_ms
        self.arrival, self.prompt, self.output = (
            column.tolist() for column in (given.trace.arrival_s, given.trace.prompt_tokens, given.trace.output_tokens)
        )
        number = len(self.arrival)
        self.rejected = [most > cluster.kv_tokens for most in map(lambda p, o: p + o - 1, self.prompt, self.output)]
        self.first, self.finish = [math.nan] * number, [math.nan] * number
        power: dict[tuple[int, str], float] = {}
        for phase in ("prefill", "decode"):
            power |= {
                (mhz, phase): float(models.power.power_w(mhz, phase, 1.0)) for mhz in prefill.freqs + decode.freqs
            }
        self.idle_w = float(models.power.idle_w)
        shared = cluster.num_prefill == 0
        self.prefill_ms = {mhz: scalar(models.prefill, mhz) for mhz in (decode if shared else prefill).freqs}
        self.decode_ms = {mhz: scalar(models.decode, mhz) for mhz in decode.freqs}

        def worker(index: int, name: str, role: Role) -> Worker:
            phase, controller = ("prefill", prefill) if role == "prefill" else ("decode", decode)
            clock = Clock(_first(controller), cluster.switch_ms / 1000, power)
            noise = Noise(models.noise_sigma, (given.seed, _NOISE, index))
            decides = None if controller.kind == "static" else models.controller(controller, phase)
            counts = controller.tps_threshold is not None or controller.rps_threshold is not None
            return Worker(name, role, clock, decides, noise, controller.window_s if counts else 0.0)

        self.prefills = [worker(i, f"prefill{i}", "prefill") for i in range(cluster.num_prefill)]
        self.decodes = [
            worker(cluster.num_prefill + i, f"decode{i}", "both" if shared else "decode")
            for i in range(cluster.num_decode)
        ]
        self.index: dict[Hashable, int] = {decode.id: index for index, decode in enumerate(self.decodes)}
        self.seen = [WorkerState(decode.id, 0, decode.clock.mhz, 0, 0.0, 0.0) for decode in self.decodes]
        places = np.random.default_rng((given.seed, _PLACES))
        self.places = places.integers(max(1, cluster.num_prefill), size=number).tolist()
        self.router = models.router(given.policy, decode, given.seed)
        self.home: list[Any] = [None] * number
        self.polled = -math.inf
        self.poll_s = cluster.poll_ms / 1000
        self.heap: list[tuple[float, int, int, Worker, int]] = []
        self.pushed = 0
        self.moments: list[Moment] | None = [] if record else None
        self.slo_s = self.itl_ms / 1000
        self.tokens_in_time = self.decoded = self.decode_iterations = self.peak_kv = 0
        self.done = self.aborted = 0
        self.last = 0.0  # completion

    def go(self, until: float) -> SimResult:
        arrival, heap, number = self.arrival, self.heap, len(self.arrival)
        ends = {_PREFILL_END: self.end_prefill, _ENTER: self.enter, _DECODE_END: self.end_decode, _IDLE: self.rest}
        ends[_START] = self.wake
        following = 0
        while self.done + self.aborted < number:
            now = arrival[following] if following < number else math.inf
            if heap and heap[0][0] < now:
                now = heap[0][0]
                if now > until:
                    break
                _, _, kind, worker, request = heapq.heappop(heap)
                ends[kind](worker, request, now)
                continue
            if now > until:
                break
            came = set()
            while following < number and arrival[following] == now:
                if (worker := self.arrive(following, now)) is not None:
                    came.add(worker)
                following += 1
            for worker in sorted(came, key=lambda worker: worker.id):
                if not worker.stretches:
                    self.start(worker, now)
        return self.result(following, until)

    def arrive(self, request: int, now: float) -> Worker | None:
        """Dispatches a request; the worker that is to compute its prompt, if the request can ever fit."""
        prompt = self.prompt[request]
        if self.rejected[request]:
            self.aborted += 1
            self.last = now
            return None
        if now - self.polled >= self.poll_s:
            self.poll(now)
        chosen = self.index[self.router.route(RequestInfo(request, prompt), self.seen, now)]
        decode = self.home[request] = self.decodes[chosen]
        self.count(chosen, 1)
        worker = self.prefills[self.places[request]] if self.prefills else decode
        worker.queue.append(request)
        for told in {worker, decode}:
            if told.window_s:
                told.arrivals.append((now, prompt))
        return worker

    def poll(self, now: float) -> None:
        """The front's view of clocks, loads and times."""
        self.polled = now
        for index, worker in enumerate(self.decodes):
            worker.clock.settle(now)
            in_flight = self.seen[index].in_flight
            self.seen[index] = WorkerState(worker.id, in_flight, worker.clock.mhz, worker.load, worker.last_itl_ms, now)

    def count(self, index: int, more: int) -> None:
        """The front's own count of what is in flight at a worker."""
        was = self.seen[index]
        self.seen[index] = WorkerState(was.id, was.in_flight + more, was.freq, was.load, was.last_itl_ms, was.timestamp)

    def start(self, worker: Worker, now: float) -> None:
        """The next iteration of a worker, or idleness."""
        if worker.queue and worker.role != "decode" and self.start_prefill(worker, now):
            return
        if worker.entering or worker.running:
            self.start_decode(worker, now)
            return
        worker.stretches = []
        worker.idle_since = now
        if worker.controller is not None:
            self.push(now + worker.controller.idle_s + 1e-6, _IDLE, worker, 0)

    def start_prefill(self, worker: Worker, now: float) -> bool:
        """Forms a batch, first come first served; False where none fits."""
        queue, prompt = worker.queue, self.prompt
        most = self.cluster.max_prefill_requests or len(queue)
        batch: list[int] = []
        tokens = 0
        while (
            queue and len(batch) < most and (not batch or tokens + prompt[queue[0]] <= self.cluster.max_prefill_tokens)
        ):
            if worker.role == "both" and not self.reserve(worker, queue[0]):
                break
            request = queue.popleft()
            batch.append(request)
            tokens += prompt[request]
        if not batch:
            return False
        worker.batch = batch
        if worker.role == "prefill" and worker.controller is not None:  # told before the batch runs, so acts on it
            waits = tuple([now - self.arrival[request] for group in (batch, queue) for request in group])
            number = len(batch)
            self.decide(worker, Iteration(now, number, number + len(queue), tokens, len(queue), waits), now)
        self.begin(worker, "prefill", len(batch), tokens, now)
        return True

    def start_decode(self, worker: Worker, now: float) -> None:
        """Lets in what has come, and begins an iteration of the whole batch."""
        joined, worker.entering = worker.entering, []
        for request in joined:
            worker.kv += self.prompt[request]
            worker.leaving.setdefault(worker.iterations + self.output[request] - 1, []).append(request)
        worker.running += len(joined)
        worker.joined = joined
        self.begin(worker, "decode", worker.running, worker.kv, now)

    def begin(self, worker: Worker, phase: str, batch: int, tokens: int, now: float) -> None:
        """Puts an iteration on the calendar."""
        table = self.decode_ms if phase == "decode" else self.prefill_ms
        factor = worker.noise.draw() / 1000
        clock = worker.clock
        if clock.pending:
            worker.stretches = clock.run(now, lambda mhz: table[mhz](batch, tokens) * factor)
            length = sum([seconds for _, seconds in worker.stretches])
        else:
            length = table[clock.mhz](batch, tokens) * factor
            worker.stretches = [(clock.mhz, length)]
        worker.phase, worker.started = phase, now
        if self.moments is not None:
            self.moments.append(Moment(now, worker.id, clock.mhz, batch))
        self.push(now + length, _DECODE_END if phase == "decode" else _PREFILL_END, worker, 0)

    def end_prefill(self, worker: Worker, _: int, now: float) -> None:
        """First tokens are there; the caches move on."""
        worker.clock.spend(worker.stretches, "prefill")
        for request in worker.batch:
            self.first[request] = now
            if self.output[request] == 1:
                self.complete(request, now)
                if worker.role == "both":
                    worker.reserved -= self.prompt[request]
                continue
            home = self.home[request]
            home.load += self.prompt[request]
            if worker.role == "both":
                worker.entering.append(request)
            else:
                home.unplaced.append(request)
                self.place(home, now)
        worker.batch = []
        self.start(worker, now)

    def reserve(self, worker: Worker, request: int) -> bool:
        """Keeps room in the KV pool for the whole of a request, if there is some."""
        size = self.prompt[request] + self.output[request] - 1
        if worker.reserved + size > self.cluster.kv_tokens:
            return False
        worker.reserved += size
        return True

    def place(self, worker: Worker, now: float) -> None:
        """Sends the caches off for which there is room."""
        while worker.unplaced and self.reserve(worker, worker.unplaced[0]):
            request = worker.unplaced.popleft()
            self.push(now + self.cluster.transfer_s(self.prompt[request]), _ENTER, worker, request)

    def enter(self, worker: Worker, request: int, now: float) -> None:
        """A cache has arrived; its request joins at the next iteration."""
        worker.entering.append(request)
        if not worker.stretches:
            self.push(now, _START, worker, 0)  # behind the caches that come at the same time

    def wake(self, worker: Worker, _: int, now: float) -> None:
        """Begins to work, unless it has begun."""
        if not worker.stretches:
            self.start(worker, now)

    def end_decode(self, worker: Worker, _: int, now: float) -> None:
        """One more token for every request of the batch."""
        worker.clock.spend(worker.stretches, "decode")
        running, tokens, joined, slo = worker.running, worker.kv, worker.joined, self.slo_s
        worker.iterations += 1
        self.decode_iterations += 1
        gap = now - worker.last_end
        if gap <= slo:
            self.tokens_in_time += running - len(joined)
        for request in joined:
            if now - self.first[request] <= slo:
                self.tokens_in_time += 1
        worker.last_end = now
        self.decoded += running
        worker.kv += running
        worker.load += running
        if worker.kv > self.peak_kv:
            self.peak_kv = worker.kv
        left = worker.leaving.pop(worker.iterations, None)
        if left:
            for request in left:
                size = self.prompt[request] + self.output[request] - 1
                worker.kv -= size
                worker.load -= size
                worker.reserved -= size
                self.complete(request, now)
            worker.running -= len(left)
            if worker.unplaced:
                self.place(worker, now)
        worker.last_itl_ms = 1000 * (now - worker.started)
        if worker.controller is not None:
            waiting = len(worker.unplaced)
            total = running + len(worker.entering) + waiting
            self.decide(worker, Iteration(now, running, total, tokens, waiting), now)
        self.start(worker, now)

    def decide(self, worker: Worker, metric: Iteration, now: float) -> None:
        arrivals = worker.arrivals
        if arrivals:
            while arrivals and now - arrivals[0][0] >= worker.window_s:
                arrivals.popleft()
        target = worker.controller.decide((metric,), arrivals, now)
        if target is not None:
            worker.clock.settle(now)
            worker.clock.set(target, now)

    def rest(self, worker: Worker, _: int, now: float) -> None:
        """Wakes the controller of a worker that has had nothing to do."""
        if not worker.stretches and now >= worker.idle_since + worker.controller.idle_s:
            target = worker.controller.decide((), worker.arrivals, now)
            if target is not None:
                worker.clock.settle(now)
                worker.clock.set(target, now)

    def complete(self, request: int, now: float) -> None:
        self.finish[request] = self.last = now
        self.done += 1
        self.count(self.index[self.home[request].id], -1)

    def push(self, when: float, kind: int, worker: Worker, request: int) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (when, self.pushed, kind, worker, request))

    def result(self, arrived: int, until: float) -> SimResult:
        """Closes the books."""
        end = self.last if self.done + self.aborted == arrived and arrived == len(self.arrival) else until
        workers = [*self.prefills, *self.decodes]
        for worker in workers:
            if worker.stretches:  # cut short by the end
                worker.clock.spend(_until(worker.stretches, end - worker.started), worker.phase)
        clocks = [worker.clock for worker in workers]
        idle_j = np.array([self.idle_w * (end - sum(clock.busy_s.values())) for clock in clocks])
        energy = idle_j + np.array([clock.busy_j for clock in clocks])
        busy_by_clock: dict[int, float] = {}
        for clock in clocks:
            for mhz, seconds in clock.busy_s.items():
                busy_by_clock[mhz] = busy_by_clock.get(mhz, 0.0) + seconds
        arrival, first, finish = (np.array(column) for column in (self.arrival, self.first, self.finish))
        output = np.array(self.output)
        ttft = 1000 * (first - arrival)
        itl = np.full(len(output), np.nan)
        several = output > 1
        itl[several] = 1000 * (finish - first)[several] / (output[several] - 1)
        came, done = np.arange(len(output)) < arrived, np.isfinite(finish)
        left = np.where(done, finish, np.where(self.rejected, arrival, end))
        return SimResult(
            energy_j=float(energy.sum()),
            energy_per_gpu_j=energy,
            idle_energy_j=float(idle_j.sum()),
            duration_s=end,
            num_done=self.done,
            num_aborted=arrived - self.done,
            output_tokens=int(np.isfinite(first).sum()) + self.decoded,
            mean_in_flight=float((left - arrival)[came].sum() / end) if end > 0 else 0.0,
            busy_s_by_clock=dict(sorted(busy_by_clock.items())),
            clock_switches=sum(clock.switches for clock in clocks),
            decode_iterations=self.decode_iterations,
            peak_kv_tokens=self.peak_kv,
            first_token_s=first,
            finish_s=finish,
            ttft_ms=ttft,
            ttft_attainment=_share(int((ttft[done] <= self.ttft_ms).sum()), arrived),
            itl_token_attainment=_share(self.tokens_in_time, int((output[came] - 1).sum())),
            itl_request_attainment=_share(int((itl[done] <= self.itl_ms).sum()), int((several & came).sum())),
            itl_ms=itl,
            moments=tuple(self.moments or ()),
        )


def _share(hits: int, of: int) -> float:
    return hits / of if of else 1.0


def _until(stretches: list[tuple[int, float]], seconds: float) -> list[tuple[int, float]]:
    """The first so many seconds of stretches."""
    kept = []
    for mhz, length in stretches:
        kept.append((mhz, min(length, seconds)))
        seconds -= length
        if seconds <= 0:
            break
    return kept


def _first(controller: ControllerConfig) -> int:
    """The clock a worker starts at."""
    if controller.kind != "static":
        return controller.freqs[0]
    return controller.freqs[-1] if controller.static_freq is None else controller.static_freq
