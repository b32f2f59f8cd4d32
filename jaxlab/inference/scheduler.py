"""Which requests the next step of an engine reads and decodes: plain Python over page numbers.

Iteration-level scheduling (Orca, Yu et al., OSDI 2022). Whoever runs comes first, oldest first; what is left of the
step's tokens goes to waiting requests, first come, first served. Where pages run out the youngest gives up its own and
waits to be computed again.
"""

import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxlab.inference.paged import BlockAllocator, page_label


@dataclasses.dataclass(eq=False)
class Request:
    """A request in an engine.

    Attributes:
        id: its name.
        tokens: the prompt, then what was drawn.
        prompt_length: how many of them are the prompt.
        max_tokens: how many may be drawn.
        arrival: seconds.
        pages: that it holds, in order.
        computed: tokens whose keys and values are in the pages, those of the step under way included.
        labels: of its full pages, as far as they were needed.
        labelled: pages that were given their label, or have it from another request.
        runs: whether it holds, or may hold, pages; otherwise it waits.
        extra: what the engine keeps with it.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    arrival: float = 0.0
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    labels: list[bytes] = dataclasses.field(default_factory=list)
    labelled: int = 0
    runs: bool = False
    extra: Any = None

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next can be drawn; with one a request is decoded, with more read."""
        return len(self.tokens) - self.computed


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens `start` up to `stop` of a request, read in one step."""

    request: Request
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: the chunks are read, then each decoded request's last token is computed, and its next drawn."""

    chunks: list[Chunk]
    decoded: list[Request]


class Scheduler:
    """Requests that wait and requests that run, and their pages.

    Args:
        allocator: of the pages.
        page_size: tokens in a page.
        max_running: requests that hold pages, at most.
        prefill_tokens: read in one step, at most.
        prefill_rows: chunks in one step, at most.
        prefill_pages: pages of all chunks of a step (shared ones counted each time), at most.
        reserved_tokens: that whatever runs must have room to grow by when another is admitted.
        prefix_cache: whether full pages are shared.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        page_size: int,
        max_running: int,
        prefill_tokens: int,
        prefill_rows: int,
        prefill_pages: int,
        reserved_tokens: int,
        prefix_cache: bool = True,
    ):
        self.allocator = allocator
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._size, self._max_running = page_size, max_running
        self._prefill = prefill_tokens, prefill_rows, prefill_pages
        self._reserved, self._prefix_cache = reserved_tokens, prefix_cache

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self._size)

    def add(self, request: Request) -> None:
        """Lets a request wait. It must fit into the empty pool: `pages_for(prompt + max_tokens - 1)`."""
        self.waiting.append(request)

    def insert(self, request: Request) -> None:
        """Lets a request run that has been read elsewhere, and gives it the pages that what it has computed needs.

        Raises:
            MemoryError: there is no room for it, with what runs, to grow; or `max_running` requests run.
        """
        if len(self.running) >= self._max_running:
            raise MemoryError(f"expected fewer than {self._max_running} running requests")
        if self.running and self._room() < self._target(request):
            raise MemoryError(f"expected {self._target(request)} free pages, got {max(self._room(), 0)}")
        request.pages, request.runs = self.allocator.alloc(self.pages_for(request.computed)), True
        self.running.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its pages."""
        if request.runs:
            self._release(request)
        else:
            self.waiting.remove(request)

    def schedule(self) -> Plan:
        """Plans a step, takes its pages and counts its tokens as computed; whatever is decoded or read to its end must
        get its next token before the next call.
        """
        plan = Plan([], [])
        budget = list(self._prefill)
        before = self.preemptions
        for request in tuple(self.running):
            if request.runs:
                self._continue(request, plan, budget)
        if self.preemptions == before:
            self._admit(plan, budget)
        return plan

    def finished_computing(self, requests: Sequence[Request]) -> None:
        """After the step: labels the pages that decoding filled."""
        for request in requests:
            if request.computed % self._size == 0:
                self._label(request)

    def forget_prefixes(self) -> None:
        """Shares nothing of what was computed so far, nor of what those that run still add to it."""
        self.allocator.forget()
        for request in self.running:
            request.labelled = sys.maxsize

    def _continue(self, request: Request, plan: Plan, budget: list[int]) -> None:
        """Adds what a running request does next to the plan; it may be preempted instead."""
        decoded = request.pending == 1
        count = 1 if decoded else self._chunk(request, budget)
        if not count or not self._grow(request, request.computed + count):
            return
        start = request.computed
        request.computed += count
        if decoded:
            plan.decoded.append(request)
            return
        plan.chunks.append(Chunk(request, start, request.computed))
        budget[0] -= count
        budget[1] -= 1
        budget[2] -= self.pages_for(request.computed)
        self._label(request)  # chunks of the same step may read these pages: each layer writes before it reads

    def _chunk(self, request: Request, budget: list[int]) -> int:
        tokens, rows, pages = budget
        if rows < 1:
            return 0
        return max(0, min(request.pending, tokens, pages * self._size - request.computed))

    def _grow(self, request: Request, tokens: int) -> bool:
        """Gives a request pages for so many tokens, if need be those of younger ones; False if it was preempted."""
        missing = self.pages_for(tokens) - len(request.pages)
        while missing > self.allocator.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        if missing > 0:
            request.pages += self.allocator.alloc(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.computed = request.labelled = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.allocator.free(request.pages)
        request.pages, request.runs = [], False

    def _admit(self, plan: Plan, budget: list[int]) -> None:
        if not self.waiting:
            return
        room = self._room()
        while self.waiting and len(self.running) < self._max_running and budget[0] > 0 and budget[1] > 0:
            request = self.waiting[0]
            shared = self._shared(request)
            taken = self._target(request) - sum(map(self.allocator.is_held, shared))
            if self.running and taken > room:
                return
            room -= taken
            self.waiting.popleft()
            self.running.append(request)
            request.pages, request.runs = self.allocator.fork(shared), True
            request.computed, request.labelled = len(shared) * self._size, len(shared)
            self._continue(request, plan, budget)

    def _room(self) -> int:
        """Free pages beyond those that all that runs may soon need."""
        return self.allocator.num_free - sum(self._target(own) - len(own.pages) for own in self.running)

    def _target(self, request: Request) -> int:
        """Pages a request has when it has grown by the reserved tokens, or to its end."""
        end = max(request.prompt_length + request.max_tokens - 1, len(request.tokens))
        return self.pages_for(min(len(request.tokens) + self._reserved, end))

    def _shared(self, request: Request) -> list[int]:
        """Pages that hold the request's first tokens already, but for the last token, whose logits are wanted."""
        pages = []
        if self._prefix_cache:
            for index in range((len(request.tokens) - 1) // self._size):
                page = self.allocator.find(self._label_at(request, index))
                if page is None:
                    break
                pages.append(page)
        return pages

    def _label(self, request: Request) -> None:
        if self._prefix_cache:
            for index in range(request.labelled, request.computed // self._size):
                self.allocator.label(request.pages[index], self._label_at(request, index))
            request.labelled = max(request.labelled, request.computed // self._size)

    def _label_at(self, request: Request, index: int) -> bytes:
        labels = request.labels
        while len(labels) <= index:
            start = len(labels) * self._size
            labels.append(page_label(labels[-1] if labels else b"", request.tokens[start : start + self._size]))
        return labels[index]
