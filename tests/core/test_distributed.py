import signal
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


def test_launched_processes_speak_by_index(capfd):
    code = "import os\nprint('hello from', os.environ['JAX_PROCESS_ID'], flush=True)"
    assert distributed.launch(["-c", code], processes=3, devices=1) == 0
    out, err = capfd.readouterr()
    assert out == "hello from 0\n"
    assert sorted(err.splitlines()) == ["[1] hello from 1", "[2] hello from 2"]


def test_only_the_first_launched_process_reads_the_terminal(tmp_path):
    code = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "index, other = os.environ['JAX_PROCESS_ID'], Path(sys.argv[1])\n"
        "while index == '0' and not other.exists():\n    time.sleep(0.02)\n"  # it would have been read by then
        "print(index, repr(sys.stdin.read()))\nother.touch()"
    )
    other = str(tmp_path / "other")
    started = f"from jaxlab.core import distributed\ndistributed.launch(['-c', {code!r}, {other!r}])"
    done = subprocess.run([sys.executable, "-c", started], input="hello", capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0 'hello'\n", "[1] 1 ''\n")


def test_the_first_failure_of_a_launch_is_told(capfd):
    code = (
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': os.kill(os.getpid(), 9)\n"
        "time.sleep(1)\nsys.exit(4)"
    )
    assert distributed.launch(["-c", code]) == -9
    assert "process 1 of 2 was killed by signal 9; the others were ended" in capfd.readouterr().err


def test_an_interrupt_reaches_what_was_launched(tmp_path):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "index = os.environ['JAX_PROCESS_ID']\n(folder / f'{index}.ready').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    (folder / f'{index}.told').touch()\n"
    )
    started = f"from jaxlab.core import distributed\ndistributed.launch(['-c', {code!r}, {str(tmp_path)!r}])"
    # What runs in the background of a shell ignores SIGINT, and so would what it starts.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", started], stderr=subprocess.PIPE, **heard) as launcher:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            assert launcher.poll() is None
            time.sleep(0.02)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=30) != 0
    assert {path.name for path in tmp_path.glob("*.told")} == {"0.told", "1.told"}


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
