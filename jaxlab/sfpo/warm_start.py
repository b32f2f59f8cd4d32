"""A small decoder trained on answers until it is right now and then: where every run of a comparison starts."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.models import ByteTokenizer, load_pretrained, save_pretrained
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.sfpo import accuracy
from jaxlab.training import OptimizerConfig, TokenBatch, TrainState, fit, lm_loss, make_train_step, optimizer


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training on the answers of the training problems; every default is ours.

    Attributes:
      accuracy: of completions drawn at temperature 1, on training problems, at which it ends.
      max_steps: steps after which it ends anyway.
      check_every: steps between looks at the accuracy.
      batch_size: problems a step.
      learning_rate: of AdamW.
      seed: of parameters and order.
    """

    accuracy: int | float = 0.3
    max_steps: int = 3000
    check_every: int = 25
    batch_size: int = 128
    learning_rate: int | float = 2e-3
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy: expected a value in [0, 1], got {self.accuracy}")
        for name in ("max_steps", "check_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a value > 0, got {self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """A model to start from.

    Attributes:
      model: a `Decoder` over bytes.
      params: its parameters.
      steps: supervised steps it took.
      accuracy: what it ended at, on training problems.
      identity: a hash of what decides it.
    """

    model: Any
    params: Any
    steps: int
    accuracy: float
    identity: str


def warm_start(
    model: DecoderConfig,
    config: WarmStartConfig,
    rows: Sequence[Mapping[str, str]],
    folder: str | os.PathLike,
) -> WarmStart:
    """The model that a config gives, from `folder/<hash>`; trained first where it is not there.

    Args:
      model: sizes; a vocabulary of bytes.
      config: of the training.
      rows: training problems, which are part of what decides it.
      folder: holds such models.
    """
    decides = {"rows": _digest([dict(row) for row in rows]), "model": core.to_dict(model), **core.to_dict(config)}
    name = _digest(decides)
    path = Path(folder) / name
    if not (path / "warm_start.json").exists():  # the last thing that is written
        steps, params, reached = _trained(model, config, rows)
        save_pretrained(path, Decoder(model), params, tokenizer=ByteTokenizer())
        told = {"steps": steps, "accuracy": reached, "config": decides}
        (path / "warm_start.json").write_text(json.dumps(told, indent=1) + "\n")
    told = json.loads((path / "warm_start.json").read_text())
    loaded, params = load_pretrained(path)
    return WarmStart(loaded, params, told["steps"], told["accuracy"], name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _trained(
    sizes: DecoderConfig, config: WarmStartConfig, rows: Sequence[Mapping[str, str]]
) -> tuple[int, Any, float]:
    key, model = jax.random.key(config.seed), Decoder(sizes)
    given = accuracy.answers(rows, ByteTokenizer())
    looked_at = accuracy.Answers(*(leaf[:512] for leaf in given))
    tx = optimizer(OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=20))
    state = TrainState.create(init_params(model, core.named_key(key, "params")), tx, core.named_key(key, "train"))
    step, batches = make_train_step(lm_loss(model), tx), _batches(given, config)
    reached = 0.0
    for end in range(config.check_every, config.max_steps + config.check_every, config.check_every):
        state = fit(state, step, batches, steps=min(end, config.max_steps))
        reached = accuracy.measure(model, state.params, looked_at).sampled
        if reached >= config.accuracy:
            break
    return int(state.step), state.params, reached


def _batches(given: accuracy.Answers, config: WarmStartConfig) -> Iterator[TokenBatch]:
    random = np.random.default_rng(config.seed)
    size = given.tokens.shape[1] - 1
    positions = np.tile(np.arange(size, dtype=np.int32), (config.batch_size, 1))
    ones = np.ones_like(positions)
    while True:
        chosen = random.integers(len(given.tokens), size=config.batch_size)
        tokens, answered = given.tokens[chosen], given.answered[chosen]
        yield TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, ones, answered[:, 1:].astype(np.float32))
