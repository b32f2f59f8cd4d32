"""What the workers of test_tasks run; a fresh process imports it, so it imports nothing heavy."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_calls = itertools.count(1)


def square(x):
    return x * x


def name_of_worker(_):
    return os.getpid(), next(_calls), "jax" in sys.modules, os.environ["JAX_PLATFORMS"]


def misbehave(item):
    match item:
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(60)
        case "hang in C":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            sum(itertools.repeat(0, 10**12))
        case "raise":
            raise KeyError("no such thing")
        case "sys.exit":
            sys.exit("leaving")
        case "unpicklable value":
            return lambda: None
        case "bad value":
            return Unloadable()
    return f"{item} done"


class Unloadable:
    def __reduce__(self):
        return int, ("not a number",)


def fails_once(path):
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "second try"


def raises_once(path):
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        raise ValueError
    return "second try"


def count_call(item):
    """Leaves a trace of each call."""
    folder, number = item
    with open(Path(folder, "calls"), "a") as file:
        file.write(f"{number}\n")
    if number == "exit":
        os._exit(1)
    return {"number": number, "pair": (1, 2)}


def slow_square(item):
    time.sleep(0.05)
    return item * item


def start_a_child(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(path).write_text(str(child.pid))
    time.sleep(60)
