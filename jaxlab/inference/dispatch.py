"""The way of requests through the workers of a disaggregated engine: routes, hand-overs, retries, failures."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlab.inference.crew import Crew, Slot, WorkerLost, WorkerStatus
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.roles import DrawnTokens
from jaxlab.inference.serving import StepOutput
from jaxlab.inference.text import RowText
from jaxlab.inference.transfer import KVTransferError, Offer, RequestFailed

Route = Callable[[int, int, list[WorkerStatus]], str]

_POLL_S = 0.01  # how long to wait for news
_BEFORE_DECODE = ("waiting", "prefill", "offered")
_GRACE_S = 1.0  # how long the news of a worker's death may come after that of its broken connection


@dataclasses.dataclass(frozen=True)
class FailedOutput(StepOutput):
    """The end of a request through no fault of its own; `finish_reason` is "abort".

    Attributes:
        error: why: a `RequestFailed`, for which a server answers 503.
    """

    error: Exception | None = None


@dataclasses.dataclass(eq=False)
class Journey:
    """A request and where it is.

    Attributes:
        id: its name.
        prompt: ids.
        sampling: with a seed.
        arrival: by `time.monotonic`.
        drawn: tokens so far, all of them reported.
        stage: "waiting" for workers, "prefill", "offered" (for a decode worker to be found), "moving", "broken" (it
            may be that its prefill worker is dead) or "decode".
        attempt: counts them; part of its key.
        retries: left.
        prefill: the slot it was given to.
        decode: the slot it is meant for, or was given to.
        offer: of its keys and values.
        known: how many tokens were drawn before this attempt.
        broken: when to fail and with what, unless its prefill worker turns out to be dead.
    """

    id: int
    prompt: list[int]
    sampling: SamplingParams
    arrival: float
    drawn: DrawnTokens = dataclasses.field(default_factory=DrawnTokens)
    stage: str = "waiting"
    attempt: int = 0
    retries: int = 1
    prefill: Slot | None = None
    decode: Slot | None = None
    offer: Offer | None = None
    known: int = 0
    broken: tuple[float, KVTransferError] = (0.0, KVTransferError(""))

    @property
    def key(self) -> str:
        """The name of this attempt."""
        return f"{self.id}.{self.attempt}"

    @property
    def length(self) -> int:
        """Tokens of the prompt and drawn."""
        return len(self.prompt) + len(self.drawn.ids)

    @property
    def decodes(self) -> bool:
        """Whether it may need a decode worker still."""
        return self.stage == "offered" or self.sampling.max_tokens - len(self.drawn.ids) > 1


class Dispatcher:
    """Journeys, moved on by what workers tell.

    Args:
        crew: the workers.
        route_prefill: `(request id, prompt tokens, list of WorkerStatus) -> worker id`.
        route_decode: the same for decode workers.
        reader: `SamplingParams -> RowText`, None without a tokenizer.

    Attributes:
        journeys: of the requests that live, by id.
        outputs: that nobody has taken yet.
        kv_bytes_moved: keys and values that decode workers have received.
    """

    def __init__(
        self, crew: Crew, route_prefill: Route, route_decode: Route, reader: Callable[[SamplingParams], RowText | None]
    ):
        self.journeys: dict[int, Journey] = {}
        self.outputs: list[StepOutput] = []
        self.kv_bytes_moved = 0
        self._crew, self._reader = crew, reader
        self._routes = {"prefill": route_prefill, "decode": route_decode}
        self._numbers = itertools.count()
        self._answers: dict[int, Any] = {}

    def add(self, journey: Journey) -> None:
        """Sends a request on its way.

        Raises:
            ValueError: a route names no worker; the request is not taken.
        """
        self.journeys[journey.id] = journey
        try:
            self._dispatch(journey)
        except ValueError:
            self.drop(journey)
            raise

    def drop(self, journey: Journey) -> None:
        """Ends a request and frees what it holds anywhere."""
        self._end(journey)
        for slot in (journey.prefill, journey.decode):
            if slot is not None:
                slot.order("abort", journey.key)

    def absorb(self, timeout_s: float = _POLL_S) -> None:
        """Lets workers in this process go on, waits a little for news, and takes it in."""
        for slot, event, arguments in self._crew.poll(timeout_s):
            handler = getattr(self, f"_on_{event}", None)
            if handler is not None:
                handler(slot, *arguments)
        for journey in [journey for journey in self.journeys.values() if journey.stage == "broken"]:
            when, error = journey.broken
            if time.monotonic() >= when:
                self._fail(journey, error)

    def ask(self, slots: list[Slot], method: str, *arguments: Any, timeout_s: float = 600.0) -> list[Any]:
        """Has a method called of several workers' engines.

        Raises:
            WorkerLost: there is none, or one does not answer.
        """
        if not slots:
            raise WorkerLost(f"{method}: no worker is left")
        asked = {next(self._numbers): (slot, slot.worker) for slot in slots}
        for number, (_, worker) in asked.items():
            worker.ask(number, method, *arguments)
        until = time.monotonic() + timeout_s
        while asked.keys() - self._answers.keys():
            self.absorb()
            for number, (slot, worker) in asked.items():
                if number not in self._answers and (slot.worker is not worker or time.monotonic() > until):
                    raise WorkerLost(f"{method}: worker {slot.id} has not answered")
        answers = [self._answers.pop(number) for number in asked]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _on_answer(self, slot: Slot, number: int, answer: Any) -> None:
        del slot
        self._answers[number] = answer

    def _on_ready(self, slot: Slot, model_config: Any) -> None:
        del slot, model_config
        for journey in list(self.journeys.values()):
            if journey.stage == "waiting":
                self._dispatch_or_fail(journey)
            elif journey.stage == "offered":
                self._send_on(journey)

    def _on_output(self, slot: Slot, key: str, output: StepOutput) -> None:
        journey = self._journey(key)
        if journey is None:
            return
        known = len(journey.drawn.ids)
        journey.drawn.extend(output)
        reason = output.finish_reason
        if reason is None and slot.mode == "prefill" and known and journey.sampling.stop:
            # Its engine has not seen the tokens of the attempt before, where the string may begin.
            reader = self._reader(journey.sampling)
            if reader is not None and reader.completed(np.array(journey.drawn.ids), known) is not None:
                reason = "stop"
        self.outputs.append(dataclasses.replace(output, request_id=journey.id, finish_reason=reason))
        if reason is not None:
            self._end(journey)

    def _on_offered(self, slot: Slot, key: str, offer: Offer) -> None:
        journey = self._journey(key)
        if journey is None:
            slot.order("abort", key)
            return
        journey.offer, journey.stage = offer, "offered"
        self._send_on(journey)

    def _on_received(self, slot: Slot, key: str, size: int) -> None:
        del slot
        self.kv_bytes_moved += size
        journey = self._journey(key)
        if journey is not None and journey.prefill is not None:
            journey.stage = "decode"
            journey.prefill.order("received", key)
            journey.prefill.requests.discard(journey.id)

    def _on_lost(self, slot: Slot, key: str, message: str, peer_lost: bool) -> None:
        del slot
        journey = self._journey(key)
        if journey is not None:
            grace_s = _GRACE_S if peer_lost else 0.0
            journey.stage, journey.broken = "broken", (time.monotonic() + grace_s, KVTransferError(message))

    def _on_refused(self, slot: Slot, key: str, message: str) -> None:
        journey = self._journey(key)
        if journey is not None:
            self._fail(journey, RequestFailed(f"request {journey.id}: worker {slot.id} refuses it: {message}"))

    def _on_died(self, slot: Slot, how: str) -> None:
        for journey in [self.journeys[request_id] for request_id in sorted(slot.requests)]:
            if slot is not journey.decode or journey.stage not in _BEFORE_DECODE:
                self._retry(journey, f"worker {slot.id} died ({how})")
            elif journey.stage == "offered":
                self._send_on(journey)
        if not self._crew.of(slot.mode):
            for journey in list(self.journeys.values()):
                if journey.stage == "waiting" or (
                    slot.mode == "decode" and journey.stage in _BEFORE_DECODE and journey.decodes
                ):
                    self._fail(journey, _none_left(journey, slot.mode))

    def _journey(self, key: str) -> Journey | None:
        """The journey whose present attempt has this key."""
        journey = self.journeys.get(int(key.partition(".")[0]))
        return journey if journey is not None and journey.key == key else None

    def _dispatch(self, journey: Journey) -> None:
        """Gives a request to a prefill worker and names its decode worker; where none is ready it waits."""
        modes = ["prefill", "decode"] if journey.decodes else ["prefill"]
        for mode in modes:
            if not self._crew.of(mode):
                self._fail(journey, _none_left(journey, mode))
                return
        if not all(self._crew.of(mode, ready=True) for mode in modes):
            return
        slots = [self._chosen(mode, journey) for mode in modes]
        for slot in slots:
            slot.requests.add(journey.id)
        journey.prefill, journey.decode = slots[0], slots[-1] if journey.decodes else None
        journey.stage, journey.known = "prefill", len(journey.drawn.ids)
        left = journey.sampling.max_tokens - journey.known
        tokens, sampling = [*journey.prompt, *journey.drawn.ids], dataclasses.replace(journey.sampling, max_tokens=left)
        slots[0].order("add", journey.key, tokens, sampling)

    def _dispatch_or_fail(self, journey: Journey) -> None:
        try:
            self._dispatch(journey)
        except ValueError as error:
            self._fail(journey, RequestFailed(f"request {journey.id}: {error}"))

    def _chosen(self, mode: str, journey: Journey) -> Slot:
        slots = {slot.id: slot for slot in self._crew.of(mode, ready=True)}
        chosen = self._routes[mode](journey.id, journey.length, [slot.status() for slot in slots.values()])
        if chosen not in slots:
            raise ValueError(f"route_{mode}: expected one of {', '.join(slots)}, got {chosen!r}")
        return slots[chosen]

    def _send_on(self, journey: Journey) -> None:
        """Tells the decode worker where the pages are; if that one is gone another, or none until one is ready."""
        if journey.decode is None or not journey.decode.ready:
            if journey.decode is not None:
                journey.decode.requests.discard(journey.id)
                journey.decode = None
            if not self._crew.of("decode"):
                self._fail(journey, _none_left(journey, "decode"))
                return
            if not self._crew.of("decode", ready=True):
                return
            try:
                journey.decode = self._chosen("decode", journey)
            except ValueError as error:
                self._fail(journey, RequestFailed(f"request {journey.id}: {error}"))
                return
            journey.decode.requests.add(journey.id)
        journey.stage = "moving"
        before = journey.drawn.first(journey.known)
        journey.decode.order("fetch", journey.key, journey.offer, journey.prompt, journey.sampling, before)

    def _retry(self, journey: Journey, why: str) -> None:
        if not journey.retries:
            self._fail(journey, WorkerLost(f"request {journey.id}: {why}, as the worker that had it before"))
            return
        self.drop(journey)
        self.journeys[journey.id] = journey
        journey.retries -= 1
        journey.attempt += 1
        journey.stage, journey.prefill, journey.decode, journey.offer = "waiting", None, None, None
        self._dispatch_or_fail(journey)

    def _fail(self, journey: Journey, error: RequestFailed) -> None:
        self.drop(journey)
        self.outputs.append(FailedOutput(journey.id, [], "abort", error=error))

    def _end(self, journey: Journey) -> None:
        del self.journeys[journey.id]
        for slot in (journey.prefill, journey.decode):
            if slot is not None:
                slot.requests.discard(journey.id)


def at_random(request_id: int, prompt_tokens: int, workers: list[WorkerStatus]) -> str:
    """Any of the workers, evenly."""
    del request_id, prompt_tokens
    return random.choice(workers).id


def fewest_requests(request_id: int, prompt_tokens: int, workers: list[WorkerStatus]) -> str:
    """The worker with the fewest requests, the first of equals."""
    del request_id, prompt_tokens
    return min(workers, key=lambda worker: worker.in_flight).id


def _none_left(journey: Journey, mode: str) -> WorkerLost:
    return WorkerLost(f"request {journey.id}: no {mode} worker is left")
