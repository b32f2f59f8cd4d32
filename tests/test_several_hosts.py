"""Launchers: by ssh (a shell stands in for it), and of one machine: a killed process ends all, the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jaxlab.core import jsonl

ROOT = Path(__file__).resolve().parents[1]
SSH = ROOT / "examples" / "several_hosts" / "ssh.sh"

CONFIG = """
system: foundation
model: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1, max_position_embeddings: 64}
batch_size: 4
length: 16
checkpoint_every: 2
mesh: {data: 2, fsdp: 2}
"""


@pytest.fixture
def over_ssh(tmp_path):
    """Runs a command on two hosts, each of which is a shell of this machine."""
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
    stand_in.chmod(0o755)

    def run(*command):
        env = {**os.environ, "HOSTS": "one two", "SSH": str(stand_in), "PORT": "7777"}
        return subprocess.run([SSH, *command], env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_ssh_tells_every_host_who_it_is(over_ssh):
    said = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $0"'
    done = over_ssh("bash", "-c", said, "two words")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{index} of 2 at one:7777: two words" for index in (0, 1)]


def test_a_host_that_fails_ends_the_others(over_ssh):
    started = time.monotonic()
    done = over_ssh("bash", "-c", "if [ $JAX_PROCESS_ID = 1 ]; then exit 3; fi; exec sleep 40")
    assert done.returncode == 3
    assert time.monotonic() - started < 30


def test_a_killed_process_ends_the_launch_and_the_run_goes_on(tmp_path):
    """Two processes of two devices; the losses after the kill are those of a run that nobody touched."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of a small text" for number in range(300)))
    (tmp_path / "config.yaml").write_text(f"{CONFIG}data: {tmp_path / 'text.txt'}\n")

    def launch(folder, steps, processes=2):
        command = [
            sys.executable,
            "-m",
            "jaxlab",
            "launch",
            "-n",
            str(processes),
            "--devices",
            str(4 // processes),
            "--",
        ]
        command += ["jaxlab", "train", str(tmp_path / "config.yaml"), str(tmp_path / folder), f"steps={steps}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def losses(folder):
        found = {row["step"]: row["loss"] for row in jsonl.read(tmp_path / folder / "metrics.jsonl") if "loss" in row}
        return [found[step] for step in sorted(found)]

    with launch("killed", 1000) as launcher:
        while len(list((tmp_path / "killed" / "checkpoints").glob("*"))) < 2:
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        second = [
            child for child in psutil.Process(launcher.pid).children() if child.environ().get("JAX_PROCESS_ID") == "1"
        ]
        second[0].send_signal(signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was killed by signal 9; the others were ended" in err

    for folder, processes in (("killed", 2), ("whole", 1)):
        with launch(folder, steps := 60, processes) as launcher:
            _, err = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, err[-2000:]
    assert len(losses("killed")) >= steps
    assert losses("killed")[:steps] == pytest.approx(losses("whole")[:steps], rel=1e-4)
