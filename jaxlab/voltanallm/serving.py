"""Putting a server on a port: until it is told to end, or as long as a `with` block lasts."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxlab.core.errors import require


def serve(
    app: Any, host: str = "127.0.0.1", port: int = 8000, *, drain_s: float = 30.0, log_level: str = "info"
) -> None:
    """Serves until Ctrl-C or SIGTERM; answers under way may finish, then clocks are reset.

    The port opens when the engine is compiled. A second Ctrl-C does not wait.

    Args:
      app: of `create_app`.
      host: only this machine can reach the default; "0.0.0.0" is every address, for which `api_key` is advised.
      port: see above.
      drain_s: how long answers may take once the server is told to end; those that take longer fail with 503.
      log_level: "critical", "error", "warning", "info", "debug" or "trace".

    Raises:
      MissingExtra: uvicorn is not installed.
      RuntimeError: the engine cannot be compiled.
    """
    require("uvicorn", "serving")
    from jaxlab.voltanallm.http_server import Server

    loop = app.state.engine_loop
    with contextlib.suppress(KeyboardInterrupt):
        try:
            loop.start()
            while not loop.ready.wait(0.2):
                pass
            if loop.failure is not None:
                raise RuntimeError(loop.unavailable) from loop.failure
            Server(app, host, port, drain_s=drain_s, log_level=log_level).run()
        finally:
            loop.close(timeout_s=5.0)


@contextlib.contextmanager
def served(
    app: Any, host: str = "127.0.0.1", port: int = 0, *, drain_s: float = 5.0, log_level: str = "warning"
) -> Iterator[str]:
    """Serves on a thread as long as the block lasts; gives the address, such as "http://127.0.0.1:43210".

    Args:
      app: of `create_app`.
      host: as in `serve`.
      port: 0: any that is free.
      drain_s: as in `serve`.
      log_level: as in `serve`.

    Raises:
      MissingExtra: uvicorn is not installed.
      OSError: the port is taken.
      RuntimeError: the engine cannot be compiled.
    """
    require("uvicorn", "serving")
    from jaxlab.voltanallm.http_server import Server

    server = Server(app, host, port, drain_s=drain_s, log_level=log_level)
    with socket.create_server((host, port)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="jaxlab-http")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            failure = app.state.engine_loop.failure
            if not server.started or failure is not None:
                raise RuntimeError("the server did not start") from failure
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
