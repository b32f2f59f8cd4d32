"""What importing the system costs, and what it asks to be installed."""

import subprocess
import sys

import pytest

from jaxlab.core.errors import MissingExtra
from jaxlab.voltanallm import create_app, serve

EXTRAS = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "pynvml", "zeus", "httpx")


def test_importing_brings_no_extra():
    code = (
        "import sys, jaxlab.voltanallm, jaxlab.inference\n"
        "from jaxlab.voltanallm import create_app, serve, served, Limits\n"
        f"print([name for name in {EXTRAS} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match="'serving'"):
        create_app(None, model_name="m")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match="'serving'"):
        serve(None)
