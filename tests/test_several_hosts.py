"""Launchers: by ssh (a shell stands in for it), and of one machine: a killed process ends all, the run goes on."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxlab.core import jsonl

ROOT = Path(__file__).resolve().parents[1]
SSH = ROOT / "examples" / "several_hosts" / "ssh.sh"

MODEL = """
  vocab_size: 258
  hidden_size: 16
  intermediate_size: 24
  num_hidden_layers: 1
  num_attention_heads: 2
  num_key_value_heads: 2
  max_position_embeddings: 64
"""
EXPERTS = """
  model_type: deepseek
  moe: {num_experts: 4, top_k: 2, ffn_size: 16}
"""
RUN = "batch_size: 4\nlength: 16\ncheckpoint_every: 2\n"


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on several hosts.

    Attributes:
      command: without a number of steps; {config} and {folder} stand for theirs.
      steps: how a number of steps is told.
      enough: so many steps that a killed run has not made yet.
      model: of the config.
    """

    command: tuple[str, ...]
    steps: str = "--steps={}"
    enough: int = 12
    model: str = MODEL


TRAIN = ("jaxlab", "train", "{config}", "{folder}")
PROGRAMS = {
    "moe": Program((*TRAIN, "mesh={data: 2, expert: 2}"), "steps={}", 60, MODEL + EXPERTS),
    "offload": Program((*TRAIN, "--offload", "superoffload", "mesh={data: 2, sequence: 2}"), "steps={}", 60),
    "grpo": Program((sys.executable, "examples/several_hosts/grpo.py", "{folder}")),
    "fold": Program((sys.executable, "examples/several_hosts/fold.py", "{folder}")),
}


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


@pytest.fixture
def launch(tmp_path):
    """Starts a command as so many processes, which share four devices."""

    def start(command, processes):
        how = (sys.executable, "-m", "jaxlab", "launch", "-n", str(processes), "--devices", str(4 // processes), "--")
        return subprocess.Popen([*how, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    return start


def numbers(folder, told):
    """Losses by step, of the run's log or of what its first process said."""
    if (folder / "metrics.jsonl").is_file():
        return {row["step"]: row["loss"] for row in jsonl.read(folder / "metrics.jsonl") if "loss" in row}
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+):.* loss (-?[\d.]+)", told)}


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        pytest.param(name, processes, marks=() if (name, processes) == ("moe", 2) else pytest.mark.hosts)
        for name in PROGRAMS
        for processes in (2, 4)
    ],
)
def test_a_killed_process_ends_the_launch_and_the_run_goes_on(name, processes, launch, tmp_path):
    """What comes after the kill is what one process with as many devices computes that nobody touched."""
    program = PROGRAMS[name]
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of a small text" for number in range(300)))
    config = tmp_path / "config.yaml"
    config.write_text(f"system: foundation\n{RUN}data: {tmp_path / 'text.txt'}\nmodel:{program.model}")

    def command(folder, steps):
        words = [word.replace("{config}", str(config)) for word in program.command]
        return [*(word.replace("{folder}", str(tmp_path / folder)) for word in words), program.steps.format(steps)]

    with launch(command("killed", 1000), processes) as launcher:
        while not list((tmp_path / "killed" / "checkpoints").glob("[0-9]*")):
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        last = str(processes - 1)
        children = psutil.Process(launcher.pid).children()
        (victim,) = (child for child in children if child.environ().get("JAX_PROCESS_ID") == last)
        victim.send_signal(signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert f"process {last} of {processes} was killed by signal 9; the others were ended" in err

    outcome = {}
    for folder, of in (("killed", processes), ("whole", 1)):
        with launch(command(folder, program.enough), of) as launcher:
            told, err = launcher.communicate(timeout=600)
        assert launcher.returncode == 0, err[-2000:]
        outcome[folder] = numbers(tmp_path / folder, told)
    assert max(outcome["killed"]) == program.enough
    assert outcome["killed"] == pytest.approx({step: outcome["whole"][step] for step in outcome["killed"]}, rel=1e-4)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.hosts)])
def test_splats_are_the_same_file(processes, launch, tmp_path, tiny_splats):
    told = {}
    for of in (1, processes):
        result = tmp_path / f"{of}.jxg"
        program = (sys.executable, "examples/several_hosts/splats.py", str(tiny_splats), str(result))
        with launch((*program, "--views=4", "--size", "48", "32", "--min-psnr=30"), of) as launcher:
            told[of], err = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, err[-2000:]
    assert told[processes].splitlines()[-1] == told[1].splitlines()[-1]
    assert (tmp_path / f"{processes}.jxg").read_bytes() == (tmp_path / "1.jxg").read_bytes()


@pytest.fixture
def tiny_splats(tmp_path):
    """A scene of few Gaussians."""
    from jaxlab.flexgaussian import GaussianScene, save_scene

    rng = np.random.default_rng(0)
    means, scales, quats, opacities, grey, colours = (
        rng.normal(size=(200, *shape)).astype(np.float32) for shape in ((3,), (3,), (4,), (), (3,), (3, 3))
    )
    scene = GaussianScene(means, 0.3 * scales - 2, quats, opacities, grey, 0.1 * colours)
    save_scene(tmp_path / "scene.ply", scene)
    return tmp_path / "scene.ply"
