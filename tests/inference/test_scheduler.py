"""Pages and plans without a model: what is taken is given back, and whoever waits gets on."""

import collections
import random

import pytest

from jaxlab.inference.paged import BlockAllocator, page_label
from jaxlab.inference.scheduler import Request, Scheduler

SIZE = 4


def make(pages, *, running=8, tokens=16, reserved=2, prefix_cache=True):
    return Scheduler(
        BlockAllocator(pages),
        page_size=SIZE,
        max_running=running,
        prefill_tokens=tokens,
        prefill_rows=4,
        prefill_pages=pages,
        reserved_tokens=reserved,
        prefix_cache=prefix_cache,
    )


def request(name, prompt, new=4):
    return Request(name, list(prompt), len(prompt), new)


def run(scheduler, plan, draw=lambda request: 0):
    """Does what an engine does with a plan: every request read to its end, or decoded, gets a token, or ends."""
    scheduler.finished_computing(plan.decoded)
    ended = []
    for own in [*(chunk.request for chunk in plan.chunks), *plan.decoded]:
        if own.pending == 0:
            own.tokens.append(draw(own))
            if len(own.tokens) == own.prompt_length + own.max_tokens:
                scheduler.remove(own)
                ended.append(own)
    return ended


@pytest.mark.latest
def test_pages_are_counted():
    allocator = BlockAllocator(5)
    assert allocator.num_free == 4
    pages = allocator.alloc(3)
    assert 0 not in pages
    assert allocator.fork(pages[:2]) == pages[:2]
    with pytest.raises(MemoryError, match="1 free pages, got 2"):
        allocator.alloc(2)
    assert allocator.num_free == 1
    allocator.free(pages)
    assert allocator.num_free == 2
    allocator.free(pages[:2])
    assert allocator.num_free == 4
    with pytest.raises(ValueError, match="freed too often"):
        allocator.free(pages[:1])
    with pytest.raises(ValueError, match="freed too often"):
        allocator.free([0])
    with pytest.raises(ValueError, match="held or labelled"):
        allocator.fork(pages)
    (page,) = allocator.alloc(1)
    with pytest.raises(ValueError, match="freed too often"):
        allocator.free([page, page])
    assert allocator.is_held(page)
    with pytest.raises(ValueError, match="num_pages"):
        BlockAllocator(1)


def test_labelled_pages_are_free_until_they_are_needed():
    allocator = BlockAllocator(6)
    first, second, third = allocator.alloc(3)
    for page, label in ((first, b"a"), (second, b"b"), (third, b"c")):
        allocator.label(page, label)
    allocator.label(third, b"d")  # a page says one thing, and a thing is said once
    assert allocator.find(b"d") is None
    allocator.free([third])
    allocator.free([first, second])
    assert allocator.num_free == 5
    assert allocator.fork([allocator.find(b"a")]) == [first]
    assert allocator.num_free == 4
    allocator.free([first])
    taken = allocator.alloc(4)  # two that say nothing, then the longest unused: c, and b, freed before a
    assert {second, third} < set(taken)
    assert first not in taken
    assert allocator.find(b"b") is None
    assert allocator.find(b"c") is None
    assert allocator.find(b"a") == first
    allocator.forget()
    assert allocator.find(b"a") is None


def test_a_label_is_of_all_that_stands_before():
    assert page_label(b"", [1, 2]) == page_label(b"", [1, 2])
    assert page_label(b"", [1, 2]) != page_label(page_label(b"", [3, 4]), [1, 2])
    assert page_label(b"", [1, 2]) != page_label(b"", [2, 1])


def test_first_come_first_served_in_chunks():
    scheduler = make(64)
    long, short, other = request(0, range(30)), request(1, range(100, 103)), request(2, range(200, 220))
    for own in (long, short, other):
        scheduler.add(own)
    plans = []
    while scheduler.running or scheduler.waiting:
        plans.append(scheduler.schedule())
        run(scheduler, plans[-1])
    chunks = [[(chunk.request.id, chunk.start, chunk.stop) for chunk in plan.chunks] for plan in plans]
    assert chunks[:4] == [[(0, 0, 16)], [(0, 16, 30), (1, 0, 2)], [(2, 0, 16)], [(2, 16, 20)]]
    # 16 + 14 + 2 tokens were read; the last of the second prompt is decoded like any other.
    assert [[own.id for own in plan.decoded] for plan in plans[2:5]] == [[0, 1], [0, 1], [0, 1, 2]]
    assert scheduler.allocator.num_free == 63


def test_admission_leaves_room_to_grow():
    # Each prompt takes two pages and grows into a third.
    scheduler = make(7, reserved=4, prefix_cache=False)
    for name in range(3):
        scheduler.add(request(name, range(8), new=9))
    scheduler.schedule()
    assert [own.id for own in scheduler.running] == [0, 1]
    assert [own.id for own in scheduler.waiting] == [2]
    small = make(7, reserved=0, prefix_cache=False)
    for name in range(3):
        small.add(request(name, range(8), new=9))
    small.schedule()
    small.schedule()
    assert len(small.running) == 3


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler = make(7, reserved=0, prefix_cache=False)
    for name in range(3):
        scheduler.add(request(name, range(4), new=16))
    ended = []
    while scheduler.running or scheduler.waiting:
        preempted = scheduler.preemptions
        plan = scheduler.schedule()
        if scheduler.preemptions > preempted:
            order = [own.id for own in [*scheduler.running, *scheduler.waiting]]
            assert order == sorted(order)
            assert scheduler.waiting[0].computed == 0
            assert not scheduler.waiting[0].pages
        ended += run(scheduler, plan)
    assert [own.id for own in ended] == [0, 1, 2]
    assert scheduler.preemptions > 0
    assert scheduler.allocator.num_free == 6


def test_prompts_that_begin_alike_share_pages():
    scheduler = make(32, tokens=64)
    first, again = request(0, range(10)), request(1, range(10))
    scheduler.add(first)
    scheduler.add(again)
    plan = scheduler.schedule()
    # In the same step: the pages that the first fills are read by the second, but for its last tokens.
    assert [(chunk.request.id, chunk.start, chunk.stop) for chunk in plan.chunks] == [(0, 0, 10), (1, 8, 10)]
    assert again.pages[:2] == first.pages[:2]
    assert again.pages[2] != first.pages[2]
    assert scheduler.allocator.num_free == 31 - 4
    run(scheduler, plan, lambda own: 7)
    for _ in range(3):
        run(scheduler, scheduler.schedule(), lambda own: 7)
    assert scheduler.allocator.num_free == 31
    # What was drawn is shared as well; the last token is always computed, for its logits.
    longer, whole = request(2, [*range(10), 7, 7, 7]), request(3, range(8))
    scheduler.add(longer)
    scheduler.add(whole)
    plan = scheduler.schedule()
    assert [own.id for own in plan.decoded] == [2]
    assert longer.computed == 13
    assert [(chunk.request.id, chunk.start, chunk.stop) for chunk in plan.chunks] == [(3, 4, 8)]


def test_forgotten_prefixes_are_not_shared():
    scheduler = make(32)
    old = request(0, range(6), new=8)
    scheduler.add(old)
    run(scheduler, scheduler.schedule())
    scheduler.forget_prefixes()
    for name in (1, 2):
        scheduler.add(request(name, [*range(6), 0, 0, 0, 0]))
    (first, second) = scheduler.schedule().chunks
    assert (first.start, second.start) == (0, 8)  # nothing of the first request, all of each other
    run(scheduler, scheduler.schedule())
    assert scheduler.running[1].pages[:2] == scheduler.running[2].pages[:2] != old.pages[:2]
    assert len({*old.pages} & {*scheduler.running[1].pages}) == 0


def test_a_request_read_elsewhere_is_inserted_where_there_is_room():
    scheduler = make(6, running=2, reserved=4)
    own = request(0, range(8), new=5)
    own.tokens.append(1)
    own.computed = 8
    scheduler.insert(own)
    assert scheduler.allocator.num_free == 3
    other = request(1, range(8), new=5)
    other.tokens.append(1)
    other.computed = 8
    with pytest.raises(MemoryError, match="3 free pages, got 2"):
        scheduler.insert(other)
    assert scheduler.schedule().decoded == [own]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_no_page_leaks(prefix_cache):
    """10,000 random operations; what is held is what the running requests list, at any time."""
    stream = random.Random(0)
    scheduler = make(24, running=6, prefix_cache=prefix_cache)
    alive, ended, names = {}, 0, 0
    for _ in range(10_000):
        act = stream.random()
        if act < 0.25 and len(alive) < 30:
            # Few different tokens, so that prefixes are often shared.
            own = request(names, [stream.randrange(2)] * stream.randrange(1, 40), stream.randrange(1, 30))
            alive[names] = own
            scheduler.add(own)
            names += 1
        elif act < 0.32 and alive:
            own = alive.pop(stream.choice(sorted(alive)))
            scheduler.remove(own)
        else:
            plan = scheduler.schedule()
            assert len(scheduler.running) <= 6
            assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= 16
            for own in scheduler.running:
                assert len(own.pages) * SIZE - own.computed < SIZE  # less than a page is wasted
                assert len(set(own.pages)) == len(own.pages)
            if alive:
                assert plan.chunks or plan.decoded
            for own in run(scheduler, plan, lambda _: stream.randrange(2)):
                del alive[own.id]
                ended += 1
        held = collections.Counter(page for own in scheduler.running for page in own.pages)
        assert 0 not in held
        assert scheduler.allocator.num_free == 23 - len(held)
    assert ended > 300
    assert scheduler.preemptions > 20
    for own in alive.values():
        scheduler.remove(own)
    assert scheduler.allocator.num_free == 23
    assert sorted(scheduler.allocator.alloc(23)) == list(range(1, 24))
