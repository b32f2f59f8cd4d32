import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import MetricsLogger, jsonl


def _rows(folder):
    return [{key: value for key, value in row.items() if key != "time"} for row in jsonl.read(folder / "metrics.jsonl")]


def test_lines_and_events(tmp_path):
    before = time.time()
    with MetricsLogger(tmp_path / "run") as logger:
        logger.log(1, {"loss": jnp.float32(2.5), "rate": np.float64(0.1)})
        assert _rows(tmp_path / "run") == [{"step": 1, "loss": 2.5, "rate": 0.1}]  # readable while the run goes on
        logger.log(np.int64(2), {"loss": float("nan")})
    rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    assert before <= rows[0]["time"] <= rows[1]["time"] <= time.time()
    assert np.isnan(rows[1]["loss"])
    events = next((tmp_path / "run").glob("events.out.tfevents.*")).read_bytes()
    assert b"loss" in events
    assert b"rate" in events


def test_resumed_steps_replace_those_of_the_killed_run(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        for step in range(1, 6):
            logger.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsLogger(tmp_path) as logger:
        logger.log(4, {"loss": 40})
        logger.log(5, {"loss": 50})
    with MetricsLogger(tmp_path) as logger:
        logger.log(5, {"perplexity": 7})  # other values of the same step stay
    assert _rows(tmp_path) == [
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 4, "loss": 40.0},
        {"step": 5, "loss": 50.0},
        {"step": 5, "perplexity": 7.0},
    ]


def test_taken_names_and_unused_loggers(tmp_path):
    with MetricsLogger(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()
    with MetricsLogger(tmp_path) as logger, pytest.raises(ValueError, match="'step' is taken"):
        logger.log(1, {"step": 2})


def test_torch_is_not_imported(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from jaxlab.core import MetricsLogger; logger = MetricsLogger(sys.argv[1]); "
        "logger.log(1, {'a': 1}); logger.close(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
