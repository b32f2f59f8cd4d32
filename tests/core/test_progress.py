import os
import pty
import subprocess
import sys

from jaxlab.core import progress


def test_quiet_without_a_terminal(capsys):
    assert list(progress(range(3), "Counting")) == [0, 1, 2]
    assert list(progress(iter([]), "Nothing")) == []
    assert capsys.readouterr() == ("", "")


def _on_a_terminal(code, **environment):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    )
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0
    return text.decode()


_SLOW = """
import time, jaxlab.core.progress as module
import sys; module = sys.modules["jaxlab.core.progress"]
module._PATIENCE_S = 0.0
for outer in module.progress(range(3), "Outer"):
    for inner in module.progress(iter("ab"), "Inner"):
        time.sleep(0.05)
"""


def test_a_bar_with_rate_and_time_left():
    text = _on_a_terminal(_SLOW)
    assert "Outer" in text
    assert "3/3" in text
    assert "/s" in text
    assert "left 00:00" in text
    assert "Inner" in text


def test_no_bar_for_quick_work_or_other_processes():
    assert (
        _on_a_terminal("from jaxlab.core import progress\nassert list(progress(range(9), 'Quick')) == [*range(9)]")
        == ""
    )
    other = {"JAX_PROCESS_ID": "1"}
    assert _on_a_terminal(_SLOW, **other) == ""
