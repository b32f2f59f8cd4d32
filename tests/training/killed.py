"""A training run in a process of its own, for test_run to kill: python -m tests.training.killed CORPUS FOLDER."""

import sys

if __name__ == "__main__":
    from jaxlab.training import train
    from tests.training import toys

    train(toys.config(sys.argv[1]), sys.argv[2])
