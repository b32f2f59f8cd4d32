"""A page that shows a scene in the browser, beside what became of it: `view`.

The page is this library's; what draws the Gaussians in it is the PlayCanvas engine (MIT), as published: one file of
2.5 MB that is downloaded when it is first needed, and whose checksum is known. The page loads nothing from elsewhere.
"""

import contextlib
import functools
import json
import math
import mmap
import os
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.core import DataUnavailable, data_path
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.compressed import CompressedScene, dequantize
from jaxlab.flexgaussian.compression import open_scene
from jaxlab.flexgaussian.container import to_bytes
from jaxlab.flexgaussian.formats import ply
from jaxlab.flexgaussian.metrics import psnr
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.scene import GaussianScene, checked, padded

Answers = dict[str, tuple[str, bytes | mmap.mmap | Callable[[], bytes]]]
"""Path -> media type and content, or what makes the content."""
Source = str | os.PathLike | GaussianScene | CompressedScene

ENGINE = "viewer/playcanvas-2.23.3"
"""The folder of `jaxlab.core.data_path` that has the engine and its licence."""
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; worker-src blob:; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy of the page: it loads nothing and asks nobody but its own server."""
_PART = Path(__file__).with_name("_viewer.html")
_NAMES = ("localhost", "127.0.0.1", "[::1]")
_ELEVATION, _VIEWS = 20.0, 8
_BACK = 1.25  # how much further away than `orbit_cameras`, which see the middle nine tenths
_PIECE = 1 << 20


class _Shown(NamedTuple):
    scene: GaussianScene
    name: str
    bytes: int


def view(
    original: Source,
    compressed: Source | None = None,
    *,
    port: int = 0,
    open_browser: bool = True,
    viewer_js: str | os.PathLike | None = None,
) -> None:
    """Shows a scene in the browser until Ctrl-C, and beside it what became of it, with a divider to draw across.

    Args:
      original: a file of any readable format, or a scene.
      compressed: the same, what `compress` wrote or `quantize` made; None: the original alone.
      port: of the server, which answers to this machine alone; 0: one that is free.
      open_browser: whether to open the page; its address is printed either way.
      viewer_js: the PlayCanvas engine as a module, where it cannot be downloaded.

    Raises:
      ValueError: a port that is not 0 to 65535, or is taken; what `load_scene` raises.
      FileNotFoundError: a file is not there.
      DataUnavailable: the engine is neither here nor can be downloaded; the message tells how to get it.
    """
    with serve(original, compressed, port=port, viewer_js=viewer_js) as url:
        print(f"{url} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


@contextlib.contextmanager
def serve(
    original: Source, compressed: Source | None = None, *, port: int = 0, viewer_js: str | os.PathLike | None = None
) -> Iterator[str]:
    """The page's address, for as long as the context lasts; see `view`."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    engine = _engine(viewer_js)
    shown = {"original": _opened(original)}
    if compressed is not None:
        shown["compressed"] = _opened(compressed)
    answers: Answers = {
        "/": ("text/html; charset=utf-8", page(shown["original"].name).encode()),
        "/playcanvas.mjs": ("text/javascript", engine.read_bytes()),
        "/about.json": ("application/json", json.dumps(_about(shown)).encode()),
    }
    if len(shown) == 2:
        answers["/quality.json"] = ("application/json", _once(functools.partial(_quality, *shown.values())))
    for role, one in shown.items():
        answers[f"/{role}.ply"] = ("application/octet-stream", _on_disk(ply.write(one.scene)))
    with _Server(port, answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def page(title: str) -> str:
    """The page; `title` is what it is about."""
    html, css, script = (_PART.with_suffix(kind).read_text(encoding="utf-8") for kind in (".html", ".css", ".js"))
    return html.replace("/* css */", css).replace("/* script */", script).replace("{title}", escape(title))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, answers: Answers):
        try:
            super().__init__(("127.0.0.1", port), functools.partial(_Handler, answers))
        except OSError as error:
            raise ValueError(f"port: {port} is not to be had: {error.strerror}") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers a fixed set of paths to this machine only; nothing that is asked for becomes the name of a file."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "jaxlab", ""
    timeout = 60

    def __init__(self, answers: Answers, *connection: Any):
        self._answers = answers
        super().__init__(*connection)

    def do_GET(self) -> None:
        # A page of another site can make a name of its own point here; it cannot make the browser ask under ours.
        host = self.headers.get("Host", "")
        if (host if host.endswith("]") else host.rsplit(":", 1)[0]) not in _NAMES:
            return self.send_error(421)
        found = self._answers.get(self.path)
        if found is None:
            return self.send_error(404)
        kind, content = found
        content = memoryview(content() if callable(content) else content)
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            for start in range(0, len(content), _PIECE):
                self.wfile.write(content[start : start + _PIECE])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def _engine(path: str | os.PathLike | None) -> Path:
    if path is None:
        try:
            return data_path(ENGINE) / "playcanvas.min.mjs"
        except DataUnavailable as error:
            name, version = ENGINE.removeprefix("viewer/").rsplit("-", 1)
            raise DataUnavailable(
                f"{error}\nIt is package/build/playcanvas.min.mjs of what `npm pack {name}@{version}` downloads: "
                f"hand over its path as viewer_js (--viewer-js)"
            ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"viewer_js: there is no file {path}")
    return Path(path)


def _opened(source: Source) -> _Shown:
    if isinstance(source, GaussianScene):
        return _Shown(checked(source), "in memory", source.num_bytes)
    if isinstance(source, CompressedScene):
        return _Shown(dequantize(source), "in memory", len(to_bytes(source)))
    path = Path(source)
    return _Shown(open_scene(path), path.name, path.stat().st_size)


def _about(shown: Mapping[str, _Shown]) -> dict[str, Any]:
    """Where to look from and what the labels say."""
    first, opposite = orbit_cameras(shown["original"].scene, 2, elevation=0)
    plain = shown["original"].scene.num_bytes
    return {
        "target": ((first.center + opposite.center) / 2).tolist(),
        "distance": _BACK * float(np.linalg.norm(first.center - opposite.center)) / 2,
        "elevation": _ELEVATION,
        "fov": math.degrees(2 * math.atan(min(first.width, first.height) / 2 / first.fx)),
        "scenes": [
            {
                "role": role,
                "file": f"{role}.ply",
                "name": one.name,
                "bytes": one.bytes,
                "times_less": plain / one.bytes if role == "compressed" else None,
                "num_gaussians": one.scene.num_gaussians,
                "degree": one.scene.degree,
            }
            for role, one in shown.items()
        ],
    }


def _quality(original: _Shown, compressed: _Shown) -> bytes:
    """PSNR over the views that `compress` takes; both scenes are filled up to one size, to share a program."""
    count = max(original.scene.num_gaussians, compressed.scene.num_gaussians)
    a, b = (padded(one.scene, count) for one in (original, compressed))
    cameras = orbit_cameras(original.scene, _VIEWS, elevation=_ELEVATION)
    ratios = [psnr(np.asarray(render(b, camera)), np.asarray(render(a, camera))) for camera in cameras]
    return json.dumps({"psnr": float(np.mean(ratios)), "views": len(cameras)}).encode()


def _once(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """`make`, called once even if several ask at the same time."""
    lock, made = threading.Lock(), functools.cache(make)

    def get() -> bytes:
        with lock:
            return made()

    return get


def _on_disk(content: bytes) -> mmap.mmap:
    """Content that need not stay in memory, in a file without a name, which is gone however the process ends."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
