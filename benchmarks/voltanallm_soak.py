"""A server under more requests than it takes, some of them bad, whose clients leave and whose workers are killed.

Every request has one outcome here, and every answer is compared with that of the quiet server.
"""

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil

ANSWERED, LEFT, LOST, WRONG = "answered", "disconnected", "lost", "other tokens"
REFUSED = (400, 404, 413, 429, 503)
"""What a server may say instead of an answer; anything else is a request lost."""

_QUIET_S = 120.0  # for a server to come to rest
_ANSWER_S = 120.0  # for an answer, after which a request counts as lost


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """What a server has to bear.

    Attributes:
      seconds: in which requests come.
      burst: requests that come at once.
      burst_s: from burst to burst.
      prompts: different ones.
      tokens: of an answer, at most.
      bad: share of requests that cannot be answered.
      leaving: share of clients that hang up in the middle of their answer.
      kill_s: from one kill of a worker process to the next, the longest-lived first; infinite: none.
      sample_s: from one look at the processes' memory to the next.
      seed: of all that is drawn.
    """

    seconds: float = 600.0
    burst: int = 24
    burst_s: float = 1.0
    prompts: int = 12
    tokens: int = 48
    bad: float = 0.1
    leaving: float = 0.15
    kill_s: float = 55.0
    sample_s: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SoakResult:
    """What became of it.

    Attributes:
      outcomes: how many requests ended how: "answered", "disconnected", "lost", "other tokens", or the status of the
        refusal.
      kills: worker processes killed.
      memory: `{process id: [[seconds, bytes], ...]}` of this process, the server's, and of the workers.
      troubles: of lost requests, what happened.
    """

    outcomes: dict[str, int]
    kills: int
    memory: dict[int, list[list[float]]]
    troubles: tuple[str, ...]

    @property
    def sent(self) -> int:
        """Requests."""
        return sum(self.outcomes.values())

    @property
    def refused(self) -> int:
        """Requests that were told why they are not answered."""
        return sum(self.outcomes.get(str(status), 0) for status in REFUSED)

    def growth(self, pid: int) -> float:
        """Bytes a second by which a process grows, by least squares over the second half of what was seen of it."""
        seen = np.array(self.memory[pid])
        seconds, size = seen[len(seen) // 2 :].T
        return float(np.polyfit(seconds - seconds[0], size, 1)[0]) if len(seconds) > 2 else 0.0


def workers() -> list[psutil.Process]:
    """Worker processes of this process, the longest-lived first."""
    found = []
    for child in psutil.Process().children():
        try:
            if "jaxlab.inference.worker" in child.cmdline():
                found.append((child.create_time(), child))
        except psutil.Error:  # it has just ended
            continue
    return [child for _, child in sorted(found, key=lambda each: each[0])]


def soak(url: str, model: str, vocab_size: int, config: SoakConfig, at_rest: Callable[[], bool]) -> SoakResult:
    """Has a server bear it, waits until it is at rest, and tells what became of each request.

    Args:
      url: of the server, without a path; it runs in this process.
      model: its name there.
      vocab_size: of the model.
      config: see there.
      at_rest: whether nothing is under way, and all pages are free.

    Raises:
      TimeoutError: the server does not come to rest.
    """
    return asyncio.run(_soak(url, model, vocab_size, config, at_rest))


async def _soak(url: str, model: str, vocab_size: int, config: SoakConfig, at_rest: Callable[[], bool]) -> SoakResult:
    import httpx

    draws = np.random.default_rng(config.seed)
    bodies = [
        {
            "model": model,
            "prompt": draws.integers(1, vocab_size, draws.integers(2, 40)).tolist(),
            "max_tokens": int(draws.integers(2, config.tokens + 1)),
            "temperature": 0.0,
        }
        for _ in range(config.prompts)
    ]
    bad = _bad(bodies[0], vocab_size)
    outcomes: collections.Counter[str] = collections.Counter()
    memory: dict[int, list[list[float]]] = collections.defaultdict(list)
    troubles: list[str] = []
    kills = 0
    options = {"timeout": _ANSWER_S, "trust_env": False, "limits": httpx.Limits(max_connections=None)}
    async with httpx.AsyncClient(base_url=url, **options) as client:
        expected = [await _text(client, body) for body in bodies]

        async def one(chance: np.random.Generator) -> None:
            row, kind = int(chance.integers(len(bodies))), chance.random()
            try:
                if kind < config.bad:
                    content = bad[int(chance.integers(len(bad)))]
                    answer = await client.post("/v1/completions", content=content)
                    outcome = str(answer.status_code)
                elif kind < config.bad + config.leaving:
                    pieces = int(chance.integers(0, 1 + bodies[row]["max_tokens"] // 2))
                    outcome = await _stream(client, bodies[row], expected[row], leave_after=pieces)
                elif kind < 0.5 + config.bad / 2 + config.leaving / 2:
                    outcome = await _stream(client, bodies[row], expected[row])
                else:
                    answer = await client.post("/v1/completions", json=bodies[row])
                    outcome = str(answer.status_code)
                    if answer.status_code == 200:
                        same = answer.json()["choices"][0]["text"] == expected[row]
                        outcome = ANSWERED if same else WRONG
            except (httpx.HTTPError, ValueError, KeyError) as error:
                outcome = LOST
                troubles.append(f"{type(error).__name__}: {error}")
            if outcome not in (ANSWERED, LEFT, LOST, WRONG, *map(str, REFUSED)):
                troubles.append(f"HTTP {outcome}")
                outcome = LOST
            outcomes[outcome] += 1

        start, tasks = time.monotonic(), []
        next_kill, next_sample = config.kill_s, 0.0
        while (now := time.monotonic() - start) < config.seconds:
            tasks = [task for task in tasks if not task.done()]
            tasks += [asyncio.create_task(one(child)) for child in draws.spawn(config.burst)]
            if now >= next_kill and workers():
                workers()[0].kill()
                kills, next_kill = kills + 1, next_kill + config.kill_s
            if now >= next_sample:
                for process in (psutil.Process(), *workers()):
                    memory[process.pid].append([now, _resident(process)])
                next_sample += config.sample_s
            await asyncio.sleep(config.burst_s)
        await asyncio.gather(*tasks)
        async with asyncio.timeout(_QUIET_S):
            while not await asyncio.to_thread(at_rest):
                await asyncio.sleep(0.05)
    return SoakResult(dict(outcomes), kills, dict(memory), tuple(troubles))


def _bad(body: dict[str, Any], vocab_size: int) -> Sequence[bytes]:
    """Bodies that no server can answer."""
    broken = (
        {"prompt": []},
        {"prompt": [vocab_size]},
        {"max_tokens": -1},
        {"max_tokens": 10**6},
        {"temperature": -1.0},
        {"model": "another"},
        {"prompt": [1] * 10**5},
    )
    whole = [json.dumps(body | changes).encode() for changes in broken]
    return [*whole, b"", b"[" * 1000, whole[0][:-2], b"\xff\xfe"]


async def _text(client: Any, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


async def _stream(client: Any, body: dict[str, Any], expected: str, leave_after: int | None = None) -> str:
    """The outcome of a stream, which is left after so many events."""
    text, events = "", 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return str(answer.status_code)
        async for line in answer.aiter_lines():
            if leave_after is not None and events >= leave_after:
                return LEFT
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return ANSWERED if text == expected else WRONG
            event = json.loads(line[6:])
            if "error" in event:
                return "503"  # told in the stream, as its status has gone out
            text += event["choices"][0]["text"]
            events += 1
    return LOST


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss)
    except psutil.Error:  # it has just ended
        return float("nan")
