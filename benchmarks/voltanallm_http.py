"""The OpenAI-compatible server beside the engine it serves: what HTTP costs, and how soon a stream begins.

Clients live in a process of their own, as they would elsewhere; on few cores they, too, take time from the engine.
"""

import asyncio
import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Case, interleaved

SYSTEM = "voltanallm"
BAR = 0.8  # of the engine's tokens a second: the specification allows HTTP 20 %
FIRST_S, WHOLE_S = 0, 1


@functools.cache
def _session(url: str, concurrency: int) -> tuple[asyncio.Runner, Any]:
    """An event loop and a client with connections that stay open."""
    from jaxlab.inference import AsyncClient

    async def client() -> AsyncClient:
        return AsyncClient(f"{url}/v1", model="m", concurrency=concurrency, max_retries=0)

    runner = asyncio.Runner()
    return runner, runner.run(client())


def _ask_all(url: str, prompts: list[list[int]], new: int, streamed: bool) -> list[tuple[float, float]]:
    """Asks for all at once; the seconds to each one's first piece and to its end."""
    runner, client = _session(url, len(prompts))

    async def one(prompt: list[int]) -> tuple[float, float]:
        options = {"max_tokens": new, "temperature": 0.0}
        started = time.perf_counter()
        if not streamed:
            await client.complete(prompt, **options)
            return (time.perf_counter() - started,) * 2
        first = None
        async for _ in client.stream_complete(prompt, **options):
            first = first or time.perf_counter() - started
        return first or 0.0, time.perf_counter() - started

    async def all_of_them() -> list[tuple[float, float]]:
        return await asyncio.gather(*map(one, prompts))

    return runner.run(all_of_them())


def cases(quick: bool) -> Iterator[Case]:
    """Bars of the specification's section 7 that concern HTTP."""
    from benchmarks.voltanallm_engine import NEW, REQUESTS, _engine, _prompts
    from jaxlab.inference import SamplingParams
    from jaxlab.voltanallm import create_app, served

    engine, prompts = _engine(REQUESTS, (REQUESTS,)), _prompts(REQUESTS)
    new, repeats = 16 if quick else NEW, 3 if quick else 5
    sampling = SamplingParams(max_tokens=new, temperature=0.0)
    app = create_app(engine, model_name="m")
    loop, made = app.state.engine_loop, len(prompts) * new
    spawn = multiprocessing.get_context("spawn")
    with served(app) as url, concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as clients:
        for streamed in (False, True):
            told: list[list[tuple[float, float]]] = []

            def ours(streamed=streamed, told=told):
                told.append(clients.submit(_ask_all, url, prompts, new, streamed).result())

            def peer():
                return loop.call(lambda: engine.generate(prompts, sampling)).result()

            seconds, alone = interleaved(ours, peer, repeats=repeats)
            label = f"HTTP, {len(prompts)} requests at once, {'streams' if streamed else 'whole answers'}"
            yield Case(
                SYSTEM, label, "tokens/s", made / seconds, made / alone, "the engine alone", BAR, higher_is_better=True
            )
        last = told[-1]
        yield Case(
            SYSTEM, "first piece of a stream beside its end", "s", max(each[FIRST_S] for each in last),
            min(each[WHOLE_S] for each in last), "the first stream to end", 1.0,
        )  # fmt: skip
