"""Training that can be stopped and goes on: on prompts with their completions, or on batches of any kind."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.training.adamw import OptimizerConfig, optimizer
from jaxlab.training.loop import fit
from jaxlab.training.loss import Loss, lm_loss
from jaxlab.training.step import TrainState, make_train_step
from jaxlab.training.text import TokenBatch

Row = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, and of what is to follow it."""


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised training; every default is ours.

    Attributes:
      steps: updates.
      batch_size: rows of an update.
      optimizer: AdamW behind a clip of the gradient's norm; 1e-5 is usual for models of billions of parameters.
      seed: of the order of the rows.
      checkpoint_every: steps between checkpoints; 0: at the end only.
    """

    steps: int = 300
    batch_size: int = 32
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3))
    seed: int = 0
    checkpoint_every: int = 0

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "checkpoint_every": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a value >= {least}, got {getattr(self, name)}")
        if self.optimizer.steps is None:
            object.__setattr__(self, "optimizer", dataclasses.replace(self.optimizer, steps=self.steps))


class RowBatches(Iterator[Any]):
    """Batches of rows that lie in arrays, of which a subclass's `_batch` takes some.

    Batch number `step` depends on rows, size, seed and `step` alone; every epoch has an order of its own.
    """

    def __init__(self, arrays: Sequence[np.ndarray], *, batch_size: int, seed: int):
        """Keeps `[N,...]` arrays; a position is one in these, batches of this size and this seed."""
        self._arrays, self._size, self._seed, self._step = tuple(arrays), batch_size, seed, 0
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]
        self._identity = {"rows": digest, "batch_size": batch_size, "seed": seed}

    def __next__(self) -> Any:
        """The next batch."""
        count, chosen = len(self._arrays[0]), []
        for place in range(self._step * self._size, (self._step + 1) * self._size):
            epoch, index = divmod(place, count)
            chosen.append(int(np.random.default_rng((self._seed, epoch)).permutation(count)[index]))
        self._step += 1
        return self._batch(np.array(chosen))

    def _batch(self, rows: np.ndarray) -> Any:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The position, with what it is a position in."""
        return {"step": self._step, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
          ValueError: it is one in other rows, or of another batch size or seed.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(f"batches: expected a position with {name} = {ours}, got {state.get(name)}")
        self._step = int(state["step"])


class CompletionBatches(RowBatches):
    """Batches of one prompt and completion a row, padded to the longest; only completions count in the loss."""

    def __init__(self, rows: Sequence[Row], *, batch_size: int, seed: int):
        """Lays the rows out."""
        size = padded_length(rows)
        tokens = np.zeros((len(rows), size + 1), np.int32)
        counts = np.zeros((len(rows), size + 1), np.float32)
        for line, counted, (prompt, completion) in zip(tokens, counts, rows):
            whole = len(prompt) + len(completion)
            line[:whole] = [*prompt, *completion]
            counted[len(prompt) : whole] = 1
        super().__init__((tokens, counts), batch_size=batch_size, seed=seed)

    def _batch(self, rows: np.ndarray) -> TokenBatch:
        tokens, counts = (array[rows] for array in self._arrays)
        positions = np.broadcast_to(np.arange(tokens.shape[1] - 1, dtype=np.int32), tokens[:, 1:].shape)
        ones = np.ones_like(tokens[:, 1:])  # padding lies behind everything that counts
        return TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, ones, counts[:, 1:])


def padded_length(rows: Sequence[Row]) -> int:
    """Tokens of the longest row, up to a multiple of 16."""
    return -(-max(len(prompt) + len(completion) for prompt, completion in rows) // 16) * 16


def check_rows(name: str, model: Any, rows: Sequence[Row]) -> None:
    """Refuses what cannot be trained on.

    Raises:
      ValueError: no rows, or one that is longer than the model's context; `name` is the argument they came as.
    """
    if not rows:
        raise ValueError(f"{name}: expected at least one to train on, got none")
    longest, room = max(len(prompt) + len(rest) for prompt, rest in rows), model.config.max_position_embeddings
    if longest > room:
        raise ValueError(f"{name}: expected prompt and completion of at most {room} tokens, got {longest}")


class TrainingRun:
    """A run that can be stopped on the way: `until(step)` trains so far, and gives the parameters."""

    def __init__(
        self,
        params: Any,
        loss: Loss,
        batches: Iterator[Any],
        config: SFTConfig,
        *,
        folder: str | os.PathLike | None = None,
    ):
        """Lays out the state.

        Args:
          params: where it starts; they are copied.
          loss: of a batch.
          batches: what it learns from; with `state()` and `restore()` their position is kept beside the parameters'.
          config: of the run.
          folder: for metrics and checkpoints; a run found there goes on.
        """
        self._config, self._folder = config, None if folder is None else Path(folder)
        self._batches = batches
        tx, key = optimizer(config.optimizer), core.named_key(jax.random.key(config.seed), "supervised")
        self._state = TrainState.create(jax.tree.map(jax.numpy.copy, params), tx, key)
        update = make_train_step(loss, tx)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
            state, metrics = update(state, batch)
            self._metrics.append(metrics)
            return state, metrics

        self._metrics: list[dict[str, Any]] = []
        self._step = step

    @property
    def history(self) -> list[dict[str, float]]:
        """The numbers of each step that was made here."""
        made, last = len(self._metrics), int(self._state.step)
        return [
            {"step": last - made + index, **{name: float(value) for name, value in metrics.items()}}
            for index, metrics in enumerate(jax.device_get(self._metrics), 1)
        ]

    def until(self, steps: int) -> Any:
        """Trains up to a step; the parameters there, which stay."""
        folder = self._folder
        with contextlib.nullcontext() if folder is None else core.MetricsLogger(folder) as logger:
            self._state = fit(
                self._state,
                self._step,
                self._batches,
                steps=steps,
                checkpointer=None if folder is None else core.Checkpointer(folder / "checkpoints"),
                every=self._config.checkpoint_every or steps,
                logger=logger,
            )
        return jax.tree.map(jax.numpy.copy, self._state.params)


class Supervised(TrainingRun):
    """The run on prompts with their completions."""

    def __init__(
        self,
        model: Any,
        params: Any,
        rows: Sequence[Row],
        config: SFTConfig,
        *,
        folder: str | os.PathLike | None = None,
    ):
        """Takes a `Decoder` and what it is to learn; else as in `TrainingRun`.

        Raises:
          ValueError: no rows, or one that is longer than the model's context.
        """
        check_rows("pairs", model, rows)
        batches = CompletionBatches(rows, batch_size=config.batch_size, seed=config.seed)
        super().__init__(params, lm_loss(model), batches, config, folder=folder)
