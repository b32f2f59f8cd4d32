"""VoltanaLLM's simulator against its bars, and against splitwise-sim on the same requests.

splitwise-sim (github.com/Mutinifni/splitwise-sim, MIT) is no package: `$SPLITWISE_SIM` names a checkout, and
`$SPLITWISE_SIM_PYTHON` an interpreter with hydra-core, pandas, scipy, networkx and requests; without them that case is
left out. It simulates two prompt and two token machines of Llama-2-70B, with its own timings; requests of one token are
given two, since it fails with those. CPU seconds of the simulation alone, not of imports or files.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Case

SYSTEM = "voltanallm"
ITERATIONS_BAR, REAL_TIME_BAR = 20_000, 20

_SPLITWISE = r"""
import os, random, shutil, sys, tempfile, time
root, trace, work = sys.argv[1:]
os.chdir(work)
sys.path.insert(0, root)
import hydra.utils
hydra.utils.get_original_cwd = lambda: root
import run as splitwise
configs = shutil.copytree(os.path.join(root, "configs"), os.path.join(work, "configs"))
path = os.path.join(configs, "config.yaml")
text = open(path).read().partition("\nhydra:")[0]  # a launcher on a Ray cluster
for line in ("  - override hydra/launcher: ray\n", "choices: ${hydra:runtime.choices}\n"):
    text = text.replace(line, "")
open(path, "w").write(text)
overrides = [
    "start_state=splitwise", "cluster=half_half", "cluster.servers.0.count=4", "cluster.servers.1.count=0",
    "start_state.prompt.num_instances=2", "start_state.token.num_instances=2", "performance_model=db",
    "applications.0.scheduler=mixed_pool", "applications.0.model_architecture=llama2-70b",
    "applications.0.model_size=llama2-70b-fp16", 'start_state.token.instance_names=["dgx-a100"]',
    "trace.path=" + trace,
]
with hydra.initialize_config_dir(configs, version_base=None):
    config = hydra.compose("config", overrides=overrides)
random.seed(0)
started = time.process_time()
splitwise.run_simulation(config)
spent = time.process_time() - started
print("cpu_s", spent, sum(1 for _ in open("detailed/0.csv")) - 1)
"""


def cases(quick: bool) -> Iterator[Case]:
    """Iterations a second, speed against real time, and the other simulator."""
    from jaxlab.voltanallm import ControllerConfig
    from jaxlab.voltanallm.sim import ClusterConfig, SimModels, Simulator, Trace, sharegpt

    models, lengths = SimModels.preset("llama-3.1-8b-a100"), sharegpt()

    def simulate(rate: float, seconds: int, policy: str, kind: str = "ecofreq") -> tuple[float, float, float]:
        """CPU seconds, iterations and simulated seconds."""
        trace = Trace.from_lengths(lengths.prompt, lengths.output, rate=rate, num_requests=round(rate * seconds))
        controller = ControllerConfig(
            kind,  # pyrefly: ignore[bad-argument-type]
            freqs=models.decode_table.freqs,  # pyrefly: ignore[missing-attribute]
            prefill_slo_ms=800,
            decode_slo_ms=50,
        )
        simulator = Simulator(ClusterConfig(2, 2), trace, policy, controller, models)
        started = time.process_time()
        result = simulator.run()
        return time.process_time() - started, result.decode_iterations, result.duration_s

    seconds, repeats = (20, 3) if quick else (60, 5)
    for policy in ("tile_aware", "state_space"):
        runs = [simulate(60, seconds, policy) for _ in range(repeats)]
        spent, iterations, simulated = sorted(runs)[len(runs) // 2]
        case = f"simulator, 2 + 2 workers, 60 requests/s, EcoFreq, {policy}"
        yield Case(
            SYSTEM, case, "decode iterations/s of CPU", iterations / spent, ITERATIONS_BAR, "bar", 1.0, True
        )  # fmt: skip
        yield Case(SYSTEM, case, "times real time", simulated / spent, REAL_TIME_BAR, "bar", 1.0, True)
    checkout, python = os.environ.get("SPLITWISE_SIM"), os.environ.get("SPLITWISE_SIM_PYTHON")
    if checkout and python:
        rate, length = 20, 20 if quick else 60
        trace = Trace.from_lengths(lengths.prompt, lengths.output, rate=rate, num_requests=rate * length)
        theirs = splitwise_seconds(Path(checkout), python, trace)
        ours = min(simulate(rate, length, "rr", "static")[0] for _ in range(repeats))
        yield Case(
            SYSTEM, f"{len(trace)} requests, {rate}/s, 2 + 2 workers", "s of CPU", ours, theirs, "splitwise-sim", 1.0
        )  # fmt: skip


def splitwise_seconds(checkout: Path, python: str, trace: object) -> float:
    """CPU seconds that splitwise-sim takes for a trace.

    Raises:
      RuntimeError: it failed, or lost requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.csv")
        lines = ["request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size"]
        rows = zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens)  # pyrefly: ignore[missing-attribute]
        lines += [f"{i},2,0,{at},1,{prompt},{max(output, 2)}" for i, (at, prompt, output) in enumerate(rows)]
        path.write_text("\n".join(lines) + "\n")
        command = [python, "-c", _SPLITWISE, str(checkout.resolve()), str(path), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    words = done.stdout.split()
    if done.returncode or words[-3:-2] != ["cpu_s"] or int(words[-1]) != len(lines) - 1:
        raise RuntimeError(f"splitwise-sim: {done.stderr[-500:] or done.stdout[-500:]}")
    return float(words[-2])
