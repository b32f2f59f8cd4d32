"""A run killed between speculation and commit, for test_mesh: python -m tests.superoffload.killed FOLDER."""

import os
import signal
import sys
import time

from jaxlab import superoffload as so
from jaxlab.training import fit
from tests.superoffload import multiprocess_cases as cases


def make():
    """The engine of this run and of those that it is compared with."""
    return cases.make(None, speculation="always", undo="residual")


def main(folder):
    with make() as engine:
        state = engine.init(cases.mlp_params())
        validate, calls = engine._validate, []

        def killed(grads, scale):
            calls.append(None)
            before = -1.0
            while len(calls) == 3:  # until nothing is left to speculate on
                if engine._worker.busy_s == before:
                    os.kill(os.getpid(), signal.SIGKILL)
                before = engine._worker.busy_s
                time.sleep(0.2)
            return validate(grads, scale)

        engine._validate = killed
        checkpointer = so.EngineCheckpointer(folder, engine)
        fit(state, engine.train_step, cases.mlp_batches(4), steps=4, checkpointer=checkpointer, every=2)


if __name__ == "__main__":
    main(sys.argv[1])
