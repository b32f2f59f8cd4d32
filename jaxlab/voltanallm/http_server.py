"""Uvicorn with patience that ends: for clients that do not finish their headers, and for answers at its shutdown."""

import asyncio
import math
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxlab.voltanallm.limits import Limits


def _patient_protocol(header_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol over h11, closing connections whose next request's headers do not come whole in time."""

    class Patient(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            # Between requests uvicorn's own limit for idle connections holds, until the first byte.
            if self.conn.their_state is not h11.IDLE or self.timeout_keep_alive_task is not None:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(header_s, self.transport.close)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Patient


class Server(uvicorn.Server):
    """A server that, told to end, lets answers under way finish for a while, and fails those that do not.

    Args:
      app: of `create_app`.
      host: address.
      port: its port.
      drain_s: how long answers may take once the server is told to end.
      log_level: of uvicorn.
    """

    def __init__(self, app: Any, host: str, port: int, *, drain_s: float, log_level: str):
        limits: Limits = app.state.limits
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_patient_protocol(limits.header_s),
                ws="none",
                lifespan="on",
                log_level=log_level,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=math.ceil(limits.header_s),
                # Beyond `drain_s`, so that clients are told before they are cut off.
                timeout_graceful_shutdown=math.ceil(drain_s) + 5,
            )
        )
        self._engine_loop, self._drain_s = app.state.engine_loop, drain_s

    async def shutdown(self, sockets: Any = None) -> None:
        """Uvicorn's, with the engine told."""
        self._engine_loop.refuse()
        overdue = asyncio.get_running_loop().call_later(self._drain_s, self._engine_loop.fail_all)
        try:
            await super().shutdown(sockets)
        finally:
            overdue.cancel()
