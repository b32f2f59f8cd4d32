"""Reward functions that a guard must survive; worker processes import this file, so it imports nothing heavy."""

import os
import signal
import time


def misbehaves(prompts, completions, *, wish=None):
    """Does what the completion says; one that is a number is its own reward."""
    rewards = []
    for row, completion in enumerate(completions):
        match completion:
            case "hang":
                time.sleep(60)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise KeyError("no such thing")
            case "raise what does not pickle":
                raise Unpicklable(1, 2)
            case "wrong number":
                return [1.0, 2.0]
            case "not a list":
                return 1.0
            case "no number":
                rewards.append("good")
            case "none":
                rewards.append(None)
            case "wish":
                rewards.append(wish[row])
            case _:
                rewards.append(float(completion))
    return rewards


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class HangsWhenTold:
    """Stands in for math-verify or a scorer in a worker."""

    def __call__(self, item):
        told = item[0]
        if "123" in told:
            time.sleep(60)
        if "321" in told:
            os._exit(7)
        if "213" in told:
            raise ZeroDivisionError("in the verifier")
        return 0.5 if "garbage" in told else True
