import subprocess
import sys
import time

import jax
import psutil
import pytest

from jaxlab.core import distributed

_HELLO = """
import os, sys, time
print("out", os.environ["JAX_PROCESS_ID"], os.environ["XLA_FLAGS"])
print("err", file=sys.stderr)
"""


def test_alone():
    distributed.initialize()
    assert distributed.is_main()
    assert not jax.distributed.is_initialized()


def test_output_by_process(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text(_HELLO)
    results = distributed.run_local([script], processes=3, devices=2)
    assert [result.returncode for result in results] == [0, 0, 0]
    for index, result in enumerate(results):
        assert result.stdout.startswith(f"out {index} ")
        assert "device_count=2" in result.stdout
        assert "device_count=8" not in result.stdout  # that of this process is not handed on
        assert result.stderr == "err\n"
        assert result.args[0] == sys.executable


def test_a_failure_ends_all():
    code = "import os, time, sys\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit('no')\ntime.sleep(600)"
    started = time.monotonic()
    first, second = distributed.run_local([sys.executable, "-c", code])
    assert time.monotonic() - started < 20
    assert first.returncode == -9
    assert (second.returncode, second.stderr) == (1, "no\n")


def test_a_time_limit_ends_all(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        distributed.run_local(["-c", code], timeout_s=1.5)
    assert "[process 0]" in caught.value.output
    children = [psutil.Process(int(word)) for word in caught.value.output.split() if psutil.pid_exists(_number(word))]
    assert psutil.wait_procs(children, timeout=5)[1] == []


def _number(word):
    return int(word) if word.isdecimal() else 0


def test_bad_arguments():
    for arguments, words in [({"processes": 0}, "processes"), ({"devices": 0}, "devices")]:
        with pytest.raises(ValueError, match=words):
            distributed.run_local(["x.py"], **arguments)
    with pytest.raises(ValueError, match="argv"):
        distributed.run_local([])
    with pytest.raises(FileNotFoundError):
        distributed.run_local(["/no/such/program"])
