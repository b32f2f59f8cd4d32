"""A crew of workers that do not start, or fall silent."""

import time

import pytest

from jaxlab.inference import WorkerLost
from jaxlab.inference.crew import Crew


class Silent:
    """A worker that does not get ready."""

    pid, heard_at = None, float("inf")

    def __init__(self, deliver=None):
        self._deliver = deliver

    def order(self, word, *arguments):
        pass

    def kill(self):
        self._deliver(self, "died", "killed by SIGKILL")

    def close(self):
        pass


def test_a_crew_gives_up_on_those_that_do_not_start():
    def failing(slot, deliver):
        worker = Silent()
        deliver(worker, "failed", FileNotFoundError("no such model"))
        deliver(worker, "died", "exit code 1")
        return worker

    with pytest.raises(FileNotFoundError, match="no such model"):
        Crew({"prefill": 1}, failing, restarts=3).wait()

    made = []

    def hanging(slot, deliver):
        made.append(Silent(deliver))
        made[-1].pid = 1
        return made[-1]

    with pytest.raises(WorkerLost, match="worker decode-0 dies when it is started"):
        Crew({"decode": 1}, hanging, restarts=2, start_timeout_s=0.0).wait()
    assert len(made) == 3

    crew = Crew({"decode": 1}, hanging, heartbeat_timeout_s=5.0)
    made[-1].heard_at = time.monotonic() - 6
    assert [event for _, event, _ in crew.poll(0.0)] == ["died"]
    assert crew.of("decode") == []
