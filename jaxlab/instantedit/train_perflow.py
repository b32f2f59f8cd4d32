"""Training of what InstantEdit edits with: a teacher, its distillation to straight windows, a ControlNet.

1. The teacher predicts noise, on Stable Diffusion's noise levels (Ho et al., arXiv 2006.11239; weights of Hang et al.,
   arXiv 2303.09556), a share of the prompts left out, so that it can be guided (Ho & Salimans, arXiv 2207.12598).
2. PeRFlow (Yan et al., arXiv 2405.07510): an image is noised to the start of a random window, the teacher is solved to
   the window's end by DDIM steps, and the student learns the straight line between the two, as the noise of
   `PeRFlowSchedule("diff_eps")`. Teacher and student read the same prompt, left out or not, and neither is guided
   ("guidance-synced"), so that the student can be guided as the teacher can.
3. A ControlNet learns the teacher's task beside the frozen teacher, from edges (Zhang et al., arXiv 2302.05543).

Time t of 1 to 1000 is the noise level `alphas_cumprod[t - 1]` for every one of them, as in `PeRFlowSchedule`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlab import core
from jaxlab.instantedit.scheduler import TRAIN_STEPS, PeRFlowSchedule
from jaxlab.training.adamw import OptimizerConfig, optimizer
from jaxlab.training.loop import fit
from jaxlab.training.loss import Loss, LossOutput
from jaxlab.training.step import TrainState, make_train_step

DEFAULT_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    schedule="wsd",
    warmup_steps=100,
    final_fraction=0.05,
    decay_fraction=0.3,
    b2=0.99,
    weight_decay=0.01,
)
"""Constant for most of a run, so that a longer one begins as a shorter one."""

Latents = Float[Array | np.ndarray, "b h w c"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage's training; every default is ours.

    Attributes:
      steps: updates.
      batch_size: pictures of an update.
      optimizer: AdamW behind a clip of the gradient's norm.
      ema: of the parameters that are kept, at the end of the run; it begins smaller.
      checkpoint_every: steps between checkpoints; 0: at the end only.
      seed: of the order of the pictures, and of all noise.
    """

    steps: int = 1000
    batch_size: int = 16
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    ema: int | float = 0.998
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "checkpoint_every": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a value >= {least}, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a value in [0, 1), got {self.ema}")
        if self.optimizer.steps is None:
            object.__setattr__(self, "optimizer", dataclasses.replace(self.optimizer, steps=self.steps))


@struct.dataclass
class Captioned:
    """A batch, or all there is to learn from.

    Attributes:
      latents: `[B,h,w,C]` float32, of about unit variance.
      ids: `[B,77]` int32, padded prompts.
      edges: `[B,H,W]` bool, for the ControlNet; None elsewhere.
    """

    latents: Float[Array | np.ndarray, "b h w c"]
    ids: Int[Array | np.ndarray, "b s"]
    edges: Bool[Array | np.ndarray, "b y x"] | None = None


class CaptionedBatches(Iterator[Captioned]):
    """Batches drawn with replacement. Batch number `step` depends on the data, weights, size, seed and `step` alone."""

    def __init__(self, data: Captioned, *, batch_size: int, seed: int, weights: np.ndarray | None = None):
        """Keeps the data.

        Args:
          data: on the host.
          batch_size: rows of a batch.
          seed: of the draws.
          weights: `[N]` probabilities of the rows; None: all the same.

        Raises:
          ValueError: weights of another number than the rows, or no probabilities.
        """
        rows = len(data.latents)
        weights = np.full(rows, 1 / rows) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != (rows,) or (weights < 0).any() or not np.isclose(weights.sum(), 1):
            raise ValueError(
                f"weights: expected {rows} probabilities, got shape {weights.shape}, sum {weights.sum():g}"
            )
        self._data, self._weights, self._size, self._seed, self._step = data, weights, batch_size, seed, 0
        content = (data.latents, data.ids, weights) if data.edges is None else (*jax.tree.leaves(data), weights)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in content))
        self._identity = {"data": digest.hexdigest()[:12], "batch_size": batch_size, "seed": seed}

    def __next__(self) -> Captioned:
        """The next batch."""
        random = np.random.default_rng((self._seed, self._step))
        rows = random.choice(len(self._weights), size=self._size, p=self._weights)
        self._step += 1
        return jax.tree.map(lambda array: array[rows], self._data)

    def state(self) -> dict[str, Any]:
        """The position, with what it is a position in."""
        return {"step": self._step, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
          ValueError: it is one in other data, or of another batch size or seed.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(f"batches: expected a position with {name} = {ours}, got {state.get(name)}")
        self._step = int(state["step"])


@dataclasses.dataclass(frozen=True)
class NoiseLoss:
    """The teacher's loss, and the ControlNet's: squared error of the noise, weighted by min-SNR.

    Attributes:
      unet: predicts the noise.
      text_encoder: makes states of prompts.
      null_ids: of the empty prompt, padded.
      schedule: whose noise levels are learnt.
      dropout: share of prompts left out (1 in 10: Ho & Salimans).
      gamma: signal-to-noise ratios above it count as it (5: Hang et al.).
      controlnet: learns in place of the UNet, whose parameters are then `frozen`'s.
      frozen: "unet" and "text_encoder", with a ControlNet.
    """

    unet: Any
    text_encoder: Any
    null_ids: tuple[int, ...]
    schedule: PeRFlowSchedule = dataclasses.field(default_factory=PeRFlowSchedule)
    dropout: float = 0.1
    gamma: float = 5.0
    controlnet: Any = None
    frozen: Any = dataclasses.field(default=None, hash=False, compare=False)

    def __call__(self, params: PyTree, batch: Captioned, rng: Array | None) -> LossOutput:
        """`params`: "unet" and "text_encoder", or "controlnet"."""
        if rng is None:
            raise ValueError("rng: expected a key, noise is drawn")
        noise_key, time_key, drop_key = jax.random.split(rng, 3)
        rows = batch.latents.shape[0]
        # One time from each of so many equal parts: the loss of a batch varies less.
        places = (jnp.arange(rows) + jax.random.uniform(time_key, (rows,))) / rows
        times = 1 + jnp.floor(TRAIN_STEPS * places).astype(jnp.int32).clip(0, TRAIN_STEPS - 1)
        level = jnp.asarray(self.schedule.alphas_cumprod, jnp.float32)[times - 1]
        noise = jax.random.normal(noise_key, batch.latents.shape)
        z = noised(batch.latents, noise, level)
        weights = {**self.frozen, **params} if self.frozen else params
        states = self.text_encoder.apply(
            {"params": weights["text_encoder"]}, left_out(batch.ids, self.null_ids, self.dropout, drop_key)
        )
        time = times.astype(jnp.float32)
        residuals = ()
        if self.controlnet is not None and batch.edges is not None:
            hint = jnp.repeat(batch.edges.astype(jnp.float32)[..., None], 3, axis=-1)
            residuals = self.controlnet.apply({"params": weights["controlnet"]}, z, time, states, hint)
        predicted = self.unet.apply({"params": weights["unet"]}, z, time, states, *residuals)
        errors = jnp.mean(jnp.square(predicted - noise), axis=(1, 2, 3))
        ratio = level / (1 - level)
        total = jnp.sum(errors * jnp.minimum(ratio, self.gamma) / ratio)
        return LossOutput(total, jnp.float32(rows), {"noise_error": jnp.sum(errors)})


@dataclasses.dataclass(frozen=True)
class PeRFlowLoss:
    """The student's loss: squared error of the noise between the ends of a window, at two times of each.

    One is the window's noisy end, where an edit of as many steps as windows evaluates the network going down; the other
    is uniform in the window (PeRFlow has only this). Both are of one line, so that the teacher is solved once.

    Attributes:
      unet: of teacher and student.
      text_encoder: makes states of prompts, and does not learn.
      null_ids: of the empty prompt, padded.
      teacher: "unet" and "text_encoder".
      schedule: of the windows.
      solver_steps: DDIM steps of the teacher in a window (PeRFlow: 8).
      dropout: share of prompts left out, for both.
      clip: bounds of the clean latents that the teacher believes in, where they have any, such as pixels.
    """

    unet: Any
    text_encoder: Any
    null_ids: tuple[int, ...]
    teacher: Any = dataclasses.field(hash=False, compare=False)
    schedule: PeRFlowSchedule = dataclasses.field(default_factory=PeRFlowSchedule)
    solver_steps: int = 8
    dropout: float = 0.1
    clip: float | None = None

    def __call__(self, params: PyTree, batch: Captioned, rng: Array | None) -> LossOutput:
        """`params`: "unet"."""
        if rng is None:
            raise ValueError("rng: expected a key, noise is drawn")
        noise_key, window_key, time_key, drop_key = jax.random.split(rng, 4)
        rows = batch.latents.shape[0]
        window = jax.random.randint(window_key, (rows,), 0, self.schedule.num_windows)
        ids = left_out(batch.ids, self.null_ids, self.dropout, drop_key)
        states = self.text_encoder.apply({"params": self.teacher["text_encoder"]}, ids)
        noise = jax.random.normal(noise_key, batch.latents.shape)
        start, end = self.solved(batch.latents, noise, window, states)
        gamma = jnp.array([each.gamma for each in self._windows], jnp.float32)[window][:, None, None, None]
        target = (start - gamma * end) / jnp.sqrt(1 - gamma**2)
        high, low = (
            jnp.array([TRAIN_STEPS * getattr(each, name) for each in self._windows], jnp.float32)[window]
            for name in ("t_start", "t_end")
        )
        place = jnp.concatenate([jnp.ones(rows), jax.random.uniform(time_key, (rows,))])
        times = jnp.tile(low, 2) + place * jnp.tile(high - low, 2)
        where = place[:, None, None, None]
        z = where * jnp.tile(start, (2, 1, 1, 1)) + (1 - where) * jnp.tile(end, (2, 1, 1, 1))
        predicted = self.unet.apply({"params": params["unet"]}, z, times, jnp.tile(states, (2, 1, 1)))
        errors = jnp.mean(jnp.square(predicted - jnp.tile(target, (2, 1, 1, 1))), axis=(1, 2, 3))
        return LossOutput(jnp.sum(errors), jnp.float32(2 * rows), {"end_error": 2 * jnp.sum(errors[:rows])})

    def solved(
        self,
        latents: Latents,
        noise: Latents,
        window: Int[Array, " b"],
        states: Float[Array, "b s d"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Noised latents at the start of each row's window, and where the teacher comes from there at its end."""
        times = np.array(
            [np.linspace(each.t_start, each.t_end, self.solver_steps + 1) * TRAIN_STEPS for each in self._windows]
        ).round()
        levels = self.schedule.alphas_cumprod[np.maximum(times.astype(int) - 1, 0)]
        times, levels = jnp.asarray(times, jnp.float32)[window], jnp.asarray(levels, jnp.float32)[window]
        start = noised(latents, noise, levels[:, 0])

        def step(z: Array, index: Array) -> tuple[Array, None]:
            predicted = self.unet.apply({"params": self.teacher["unet"]}, z, times[:, index], states)
            return ddim(z, predicted, levels[:, index], levels[:, index + 1], clip=self.clip), None

        end, _ = jax.lax.scan(step, start, jnp.arange(self.solver_steps))
        return start, jax.lax.stop_gradient(end)

    @property
    def _windows(self) -> list[Any]:
        count = self.schedule.num_windows
        return [self.schedule.window(TRAIN_STEPS * (count - k) / count) for k in range(count)]


def noised(latents: Latents, noise: Latents, level: Float[Array, " b"]) -> Float[Array, "b h w c"]:
    """Latents at a noise level, a cumulated alpha for each."""
    level = level[:, None, None, None]
    return jnp.sqrt(level) * latents + jnp.sqrt(1 - level) * noise


def ddim(
    z: Latents,
    noise: Latents,
    level: Float[Array, " b"],
    target: Float[Array, " b"],
    *,
    clip: float | None = None,
) -> Float[Array, "b h w c"]:
    """A DDIM step (Song et al., arXiv 2010.02502) from one noise level to another.

    Args:
      z: latents.
      noise: predicted.
      level: cumulated alphas of z.
      target: those of the result.
      clip: bounds of the clean latents; the noise is then what is left of z.
    """
    level = level[:, None, None, None]
    clean = (z - jnp.sqrt(1 - level) * noise) / jnp.sqrt(level)
    if clip is not None:
        clean = jnp.clip(clean, -clip, clip)
        noise = (z - jnp.sqrt(level) * clean) / jnp.sqrt(1 - level)
    return noised(clean, noise, target)


def left_out(
    ids: Int[Array | np.ndarray, "b s"], null_ids: tuple[int, ...], share: float, key: Array
) -> Int[Array, "b s"]:
    """Prompts of which a share is empty."""
    empty = jax.random.bernoulli(key, share, (ids.shape[0], 1))
    return jnp.where(empty, jnp.array(null_ids, jnp.int32), ids)


class EMAState(struct.PyTreeNode):
    """State of an optimiser with the moving average of the parameters after its updates."""

    count: Any
    average: Any
    inner: Any


def with_ema(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """An optimiser that also keeps the moving average of the parameters: `state.opt_state.average`.

    The decay is at most (1 + n) / (10 + n) after n updates, so that the start is forgotten.
    """

    def init(params: Any) -> Any:
        return EMAState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, inner = tx.update(updates, state.inner, params)
        rate = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda mean, new: rate * mean + (1 - rate) * new, state.average, moved)
        return updates, EMAState(state.count + 1, average, inner)

    return optax.GradientTransformation(init, update)


def train_stage(
    params: PyTree,
    loss: Loss,
    batches: Iterator[Captioned],
    config: StageConfig,
    folder: str | os.PathLike,
) -> PyTree:
    """Trains to `config.steps`, going on from the latest checkpoint in the folder; the averaged parameters.

    The folder gets `metrics.jsonl` and `checkpoints/`. Killed at any moment and started again, a run repeats the same
    losses bit for bit on one device.

    Args:
      params: where it starts; they are copied.
      loss: of a batch.
      batches: what it learns from.
      config: of the run.
      folder: belongs to this run.

    Raises:
      ValueError: the folder is of a run of other settings; `steps` and `checkpoint_every` may change.
    """
    folder = Path(folder)
    _check_folder(folder, config)
    tx = with_ema(optimizer(config.optimizer), config.ema)
    key = core.named_key(jax.random.key(config.seed), "perflow")
    state = TrainState.create(jax.tree.map(jnp.copy, params), tx, key)
    with core.MetricsLogger(folder) as logger:
        state = fit(
            state,
            make_train_step(loss, tx),
            batches,
            steps=config.steps,
            checkpointer=core.Checkpointer(folder / "checkpoints", keep=2),
            every=config.checkpoint_every or config.steps,
            logger=logger,
        )
    return state.opt_state.average


def _check_folder(folder: Path, config: StageConfig) -> None:
    """Going on with other settings would silently give a mixture."""
    settings = core.to_dict(config)
    settings["optimizer"].pop("steps")  # follows `steps`
    settings = {name: value for name, value in settings.items() if name not in ("steps", "checkpoint_every")}
    path = folder / "stage.json"
    if path.exists():
        saved = json.loads(path.read_text())
        for name, value in settings.items():
            if saved.get(name) != value:
                raise ValueError(f"{name}: {folder} was trained with {saved.get(name)}, got {value}")
    else:
        core.replace_file(path, json.dumps(settings, indent=1))
