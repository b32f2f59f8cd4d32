"""Small environments and executors that a worker process can import."""

import functools
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab import core
from jaxlab.eaglet import Executor, Plan, Task, TextEnv, format_plan
from jaxlab.models import word_tokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.training import OptimizerConfig

TASK = Task("toy", "Say yes.", 5, "toy", "train")


def task(name, **data):
    return Task(name, "Say yes.", 5, "toy", "train", data)


def plan(*steps):
    return Plan.parse(format_plan("I think.", steps))


BROKEN = Plan.parse("Step 1: yes")


class EchoEnv(TextEnv):
    """Scores 1 for "yes" (which ends it), 0.5 for "half", -1 for "die"; other words are not understood.

    `data` says what goes wrong: {"exit": path} ends the process once, {"hang": path} sleeps once, {"broken": True}
    raises, {"nan": True} scores NaN.
    """

    made = 0

    def __init__(self):
        super().__init__()
        type(self).made += 1
        self.closed = False

    def _tasks(self, split):
        return [TASK]

    def _reset(self, task, seed):
        self.data = task.data
        for what, act in {"exit": lambda: os._exit(3), "hang": lambda: time.sleep(60)}.items():
            mark = self.data.get(what)
            if mark and not Path(mark).exists():
                Path(mark).touch()
                act()
        if self.data.get("broken"):
            raise OSError("out of order")
        return f"Seed {seed}, process {os.getpid()}, environment {self.made}."

    def _step(self, action):
        score = {"yes": 1.0, "half": 0.5, "die": -1.0}.get(action)
        if score == 1.0 and self.data.get("nan"):
            score = float("nan")
        valid = score is not None
        return f"You said {action}.", score or 0.0, action == "yes", {"valid": valid}

    def commands(self):
        return ("yes", "half")

    def gold_actions(self, task):
        return ["half", "yes"]

    def close(self):
        self.closed = True


class Says(Executor):
    """Says the plan's steps, and what it would have said by itself after that."""

    def __init__(self, name, *words):
        self.name, self.words = name, words

    def act(self, context):
        words = [*context.plan.replace("Step 1:", "").split(), *self.words]
        return words[min(context.step, len(words) - 1)]


class SaysAtOnce(Says):
    """The same for many contexts; remembers how many there were."""

    def __init__(self, name, *words):
        super().__init__(name, *words)
        self.sizes = []

    def act_batch(self, contexts):
        self.sizes.append(len(contexts))
        return [self.act(context) for context in contexts]

    def __reduce__(self):
        raise TypeError("stays in its process")


@functools.cache
def tokenizer():
    """The words of this file's tasks and plans."""
    return word_tokenizer(["Task: Plan: > Say yes.", plan("yes", "huh", "half", "die").text, "Seed process You said"])


@functools.cache
def decoder(context=96):
    """A network over these words, and parameters that make it prefer some of them."""
    model = Decoder(
        DecoderConfig(
            vocab_size=tokenizer().vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
        )
    )
    return model, jax.tree.map(lambda leaf: 2 * leaf, init_params(model, jax.random.key(0)))


def adam(rate):
    """An optimiser's config."""
    return OptimizerConfig(learning_rate=rate)


def equal(one, other):
    """Whether two trees of arrays are the same to the bit."""
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def killed_at(step, run):
    """Ends a run where it logs a step."""
    log = core.MetricsLogger.log

    def stop(self, index, values):
        log(self, index, values)
        if index == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.MetricsLogger, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
