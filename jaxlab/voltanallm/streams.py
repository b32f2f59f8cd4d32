"""Server-sent events whose client may leave, or stop to read."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse


class _EventStream(StreamingResponse):
    """See `event_stream`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], stall_s: float):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._end, self._stall_s = end, stall_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def patient(message: Any) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            # What is not sent in time leaves the answer incomplete, upon which the connection is closed.
            with contextlib.suppress(TimeoutError):
                await super().__call__(scope, receive, patient)
        finally:
            self._end()


def event_stream(
    first: bytes, events: AsyncGenerator[bytes, None], end: Callable[[], None], stall_s: float
) -> StreamingResponse:
    """A response of events, the first of which has come already.

    Args:
      first: the first event.
      events: the others.
      end: called when all is sent, the client has left, or it has not read for too long.
      stall_s: how long that is.
    """

    async def all_events() -> AsyncIterator[bytes]:
        yield first
        async for event in events:
            yield event

    return _EventStream(all_events(), end, stall_s)
