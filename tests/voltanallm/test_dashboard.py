"""The dashboard: its data, and the page in a headless browser beside a live server."""

import shutil
import struct
import subprocess

import pytest

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")

from jaxlab.voltanallm import SimulatedGPU
from jaxlab.voltanallm.dashboard import page
from tests.voltanallm.servers import ask, live, until
from tests.voltanallm.test_control_loop import CLOCKS, controller

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def board(engine):
    with live(engine, gpu=SimulatedGPU(CLOCKS), controller=controller(), api_key=None) as (app, client):
        ask(client, max_tokens=20)
        yield app, client


def test_data(board):
    _, client = board
    until(lambda: len(client.get("/dashboard/data").json()["samples"]) >= 2)
    data = client.get("/dashboard/data").json()
    assert (data["model"], data["trouble"], data["simulated"], data["under_way"]) == ("toy", None, True, 0)
    assert data["objectives"] == {"ttft_ms": None, "itl_ms": 20.0}
    assert (data["generated"], data["finished"], data["ttft"]["count"], data["itl"]["count"]) == (20, 1, 1, 19)
    assert 0 <= data["itl"]["within"] <= 1
    assert data["itl"]["p50_ms"] <= data["itl"]["p95_ms"] <= data["itl"]["p99_ms"]
    worker = data["workers"][0]
    assert (worker["id"], worker["phase"], worker["mode"]) == ("engine", "both", "auto")
    assert worker["freqs_mhz"] == list(CLOCKS)
    assert data["energy_j"] > 0
    later = client.get("/dashboard/data", params={"since": data["now"]}).json()["samples"]
    assert all(sample["t"] > data["now"] for sample in later)
    assert all(len(sample["workers"]) == 1 for sample in data["samples"])


def test_the_page_is_whole_and_asks_nobody_else(board):
    got = board[1].get("/")
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in got.headers["content-security-policy"]
    assert "http://" not in got.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in got.text
    assert "<h1>a&lt;b&gt;</h1>" in page("a<b>")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(board, tmp_path):
    url = f"{board[1].base_url}/"

    def browse(*what):
        flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
        quiet = ("disable-background-networking", "disable-component-update", "virtual-time-budget=2500")
        options = (
            f"--{flag}" for flag in (*flags, *quiet, f"user-data-dir={tmp_path / 'profile'}", "window-size=1240,1000")
        )
        done = subprocess.run([BROWSER, *options, *what, url], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.decode()

    text = browse("--dump-dom", f"--screenshot={tmp_path / 'page.png'}")
    for told in (
        "serving",
        "engine",
        "prefill and decode",
        "controller",
        "1,005",
        "MHz",
        "≤ 20 ms",
        "tokens/s",
        "modelled",
    ):
        assert told in text, told
    assert text.count('class="card"') == 4  # two latencies, energy, one worker
    assert 'class="clock" d="M' in text
    picture = (tmp_path / "page.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1240, 1000)
    assert len(picture) > 20_000
