"""A study that kills its own process after some samples: `python -m tests.vlm_scaling.killed CACHE LOG [LIMIT]`."""

import os
import signal
import sys
from pathlib import Path

from jaxlab.vlm_scaling import BestOfN, Majority, Study
from jaxlab.vlm_scaling.simulation import Simulation


class Counting(Simulation):
    """Writes down each sample and verdict that is asked for, and dies at a limit."""

    def sample(self, question, indices, *, seed):
        return [self._one(question, index, seed) for index in indices]

    def _one(self, question, index, seed):
        with open(LOG, "a") as log:
            log.write(f"{question.id} {index}\n")
        if LIMIT is not None and len(Path(LOG).read_text().splitlines()) > LIMIT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(question, [index], seed=seed)[0]


if __name__ == "__main__":
    CACHE, LOG = sys.argv[1:3]
    LIMIT = int(sys.argv[3]) if len(sys.argv) > 3 else None
    model = Counting(p=0.5)
    study = Study(
        model.questions(12), model, strategies=[Majority(4), BestOfN(4)], n=4, verifier=model, cache=CACHE, seed=3
    )
    print(study.run())
