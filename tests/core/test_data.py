import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from jaxlab.core import DataUnavailable, data, data_path

_CONTENT = b"real data\n"
_SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A registry of four files, a server that has one of them, and places to look in that are all ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/good": _CONTENT, "/bad": b"something else"}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    base = f"http://localhost:{server.server_port}"
    digest = hashlib.sha256(_CONTENT).hexdigest()
    urls = {
        "set/a.txt": f"{base}/good",
        "set/deep/b.txt": f"{base}/good",
        "bad.txt": f"{base}/bad",
        "gone.txt": f"{base}/x",
        "none.txt": None,
    }
    files = {name: data.DataFile(name, digest, "CC0", "made here", url) for name, url in urls.items()}
    monkeypatch.setattr(data, "registry", lambda: files)
    monkeypatch.setattr(data, "_places", lambda: [("$JAXLAB_DATA", tmp_path / "own"), ("cache", tmp_path / "cache")])
    monkeypatch.setattr(data, "_cache", lambda: tmp_path / "cache")
    yield tmp_path
    server.shutdown()
    server.server_close()


def _put(path, content=_CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_places_come_in_order(places):
    _put(places / "cache" / "none.txt")
    assert data_path("none.txt") == places / "cache" / "none.txt"
    _put(places / "own" / "none.txt", b"damaged")
    assert data_path("none.txt") == places / "cache" / "none.txt"
    _put(places / "own" / "none.txt")
    assert data_path("none.txt") == places / "own" / "none.txt"


def test_downloads_into_the_cache(places):
    with pytest.raises(DataUnavailable, match="download: not asked for"):
        data_path("set/a.txt", download=False)
    path = data_path("set/a.txt")
    assert path == places / "cache" / "set" / "a.txt"
    assert path.read_bytes() == _CONTENT
    assert data_path("set/a.txt", download=False) == path
    assert data_path("set") == places / "cache" / "set"  # a folder: whatever of it is missing is fetched
    assert (places / "cache" / "set" / "deep" / "b.txt").read_bytes() == _CONTENT


@pytest.mark.parametrize(("name", "reason"), [("bad.txt", "hash"), ("gone.txt", "404"), ("none.txt", "no URL")])
def test_unavailable_lists_the_places(places, name, reason):
    _put(places / "own" / name, b"damaged")
    with pytest.raises(DataUnavailable) as caught:
        data_path(name)
    for word in ["$JAXLAB_DATA", str(places / "own" / name), "SHA-256", str(places / "cache" / name), "absent", reason]:
        assert word in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    assert not (places / "cache" / name).exists()


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"unknown data file 'math/gsm8k_tst\.jsonl'; did you mean 'math/gsm8k_test\.jsonl'"
    ):
        data_path("math/gsm8k_tst.jsonl")
    with pytest.raises(ValueError, match="unknown data file"):
        data_path("../pyproject.toml")


def test_the_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLAB_DATA", str(tmp_path))
    places = list(data._places())
    assert places[0] == ("$JAXLAB_DATA", tmp_path)
    assert [place for place, _ in places] == ["$JAXLAB_DATA", "../shared/data", "cache"]
    assert places[1][1] == _SHARED


def test_the_registry_is_whole():
    files = data.registry()
    assert len(files) > 100
    for file in files.values():
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.licence
        assert file.origin
        assert file.url is None or file.url.startswith("https://")
        assert not Path(file.name).is_absolute()
    text = Path(data.__file__).with_name("data_registry.json").read_text()
    names = [name for source in json.loads(text) for name in source["files"]]
    assert len(names) == len(set(names))


def test_every_shared_file_is_registered():
    if not _SHARED.is_dir():
        pytest.skip("../shared/data is not on this machine")
    there = {
        str(path.relative_to(_SHARED)) for path in _SHARED.rglob("*") if path.is_file() and path.name != "README.md"
    }
    assert there <= set(data.registry())
    for folder in ("af3", "math", "splats", "traces"):
        assert data_path(folder, download=False) == _SHARED / folder  # checks every SHA-256
