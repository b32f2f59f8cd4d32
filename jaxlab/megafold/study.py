"""Training on a few structures, and how near the network's samples come to them."""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlab import core
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import FeatureCache, read_mmcif
from jaxlab.megafold.data.cropping import Method
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.feed import Example, Features, Feed, MadeUp
from jaxlab.megafold.folding import Prediction, fold, save_predictions
from jaxlab.megafold.geometry import weighted_rigid_align
from jaxlab.megafold.metrics import lddt, rmsd
from jaxlab.megafold.network import Network
from jaxlab.megafold.train import TrainSettings, TrainState, create_train_state, train_step
from jaxlab.training import fit

_FREE = ("steps", "checkpoint_every", "samples", "sampling_steps", "stall_steps", "folder")
_RUN = "config.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A training run and what is sampled after it; every default is ours.

    Attributes:
      structures: to train on.
      network: to train.
      training: optimiser and losses.
      steps: updates to make.
      batch_size: structures of a step.
      seed: of weights, noise, crops and sampling.
      crop_method: of the structures that name no tokens; None: any.
      checkpoint_every: steps between checkpoints; 0: at the end only.
      samples: of each structure, before and after.
      sampling_steps: of the sampler.
      stall_steps: steps to time the ways of reading data with; 0: none.
      folder: keeps features, metrics, checkpoints and predictions; none: a temporary one.
    """

    structures: tuple[Example, ...]
    network: Network = dataclasses.field(default_factory=Network)
    training: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    steps: int = 1000
    batch_size: int = 1
    seed: int = 0
    crop_method: Method | None = None
    checkpoint_every: int = 0
    samples: int = 5
    sampling_steps: int = 200
    stall_steps: int = 0
    folder: str | None = None

    def __post_init__(self):
        if not self.structures:
            raise ValueError("structures: expected at least one, got none")
        for name in ("steps", "batch_size", "samples", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "stall_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {getattr(self, name)}")


class Outcome(NamedTuple):
    """What was sampled of one structure, the best by its own confidence first.

    Attributes:
      name: of the structure.
      features: of the crop; they hold the truth.
      predictions: with coordinates moved onto the truth.
      lddt: of each, 0 to 1, without distances inside a token.
      rmsd: of each, Å, over all resolved atoms.
      mirrored: whether each fits the mirror image of the truth better; distances, and so lDDT, cannot tell.
    """

    name: str
    features: Features
    predictions: list[Prediction]
    lddt: list[float]
    rmsd: list[float]
    mirrored: list[bool]


class Study:
    """The structures, the network and the folder of a run."""

    def __init__(self, config: StudyConfig, folder: str | os.PathLike):
        """Finds the files; where the library's data is not here, made-up structures take its place."""
        self.config, self.folder = config, Path(folder)
        self.network = config.network.config
        self.cache = FeatureCache(self.folder / "features")
        self.examples: tuple[Example | MadeUp, ...] = config.structures
        try:
            for example in config.structures:
                example.files()
        except core.DataUnavailable:
            self.examples = tuple(MadeUp(self.network, number) for number in range(len(config.structures)))
        self.synthetic = self.examples is not config.structures

    def feed(self, **how: Any) -> Feed:
        """The run's batches; `how` as `Feed` takes it."""
        config = self.config
        given: dict[str, Any] = {
            "batch_size": config.batch_size,
            "cache": self.cache,
            "method": config.crop_method,
        } | how
        return Feed(self.examples, self.network, _key(config, "data"), **given)

    def train(self, state: TrainState | None = None) -> TrainState:
        """Trains; called again on its folder it goes on from the latest checkpoint, to the same numbers.

        Args:
          state: `initial_state` of the config, which is consumed; None makes it.

        Raises:
          ValueError: the folder belongs to another config.
        """
        _claim(self.folder, self.config)
        with self.feed() as feed, core.MetricsLogger(self.folder) as logger:
            return fit(
                initial_state(self.config) if state is None else state,
                self.step,
                feed,
                steps=self.config.steps,
                checkpointer=core.Checkpointer(self.folder / "checkpoints", keep=1),
                every=self.config.checkpoint_every or self.config.steps,
                logger=logger,
            )

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """A training step, whose key follows from the state's step; it consumes the state."""
        return _step(state, batch, _key(self.config, "steps"))

    def sampled(self, params: PyTree) -> list[Outcome]:
        """Samples every structure's crop and holds the samples to the truth."""
        config, key = self.config, _key(self.config, "crops")
        outcomes = []
        for example in self.examples:
            features = example.cropped(example.features(self.cache), self.network, key, config.crop_method)
            found = fold(
                params,
                features,
                self.network,
                seeds=(config.seed,),
                samples=config.samples,
                steps=config.sampling_steps,
            )
            outcomes.append(_outcome(example.name, features, found))
        return outcomes

    def save(self, outcomes: Sequence[Outcome]) -> list[Path]:
        """Writes predictions, in the frame of the truth, below `predictions/`; made-up structures are not written."""
        return [
            save_predictions(
                self.folder / "predictions" / outcome.name,
                outcome.name,
                read_mmcif(example.files()["path"]),
                outcome.features,
                outcome.predictions,
            )
            for example, outcome in zip(self.examples, outcomes)
            if isinstance(example, Example)
        ]

    def stall(self, state: TrainState, steps: int) -> dict[str, float]:
        """Training steps a second with each way of reading (`rates`); the state given is not consumed."""
        copied = [jax.tree.map(lambda leaf: leaf.copy(), state)]

        def step(batch: Features) -> None:
            copied[0], _ = jax.block_until_ready(self.step(copied[0], batch))

        return rates(self.feed, step, steps)


def rates(feed: Callable[..., Feed], step: Callable[[Features], None], steps: int) -> dict[str, float]:
    """Steps a second when features are built every time, come from the cache, and are read ahead from it.

    Args:
      feed: makes a `Feed` with other values for `cache` and `ahead`; its own cache is filled before.
      step: takes a batch; returns when it is done with it.
      steps: to time, after one that is not.
    """
    with feed(ahead=0) as filled:
        next(filled)
    found = {}
    for way, how in (("cold", {"cache": None, "ahead": 0}), ("cache", {"ahead": 0}), ("cache, read ahead", {})):
        with feed(**how) as batches:
            step(next(batches))
            started = time.perf_counter()
            for _ in range(steps):
                step(next(batches))
            found[way] = steps / (time.perf_counter() - started)
    return found


def initial_state(config: StudyConfig) -> TrainState:
    """The state before the first step."""
    network = config.network.config
    zeros = {name: jnp.zeros(like.shape, like.dtype) for name, like in abstract_batch(network).items()}
    return create_train_state(network, _key(config, "state"), zeros, settings=config.training)


def load_weights(folder: str | os.PathLike) -> tuple[AF3Config, PyTree]:
    """The network of a run's latest checkpoint, and its averaged weights.

    Raises:
      FileNotFoundError: not the folder of a run, or there is no checkpoint yet.
      CheckpointError: it is damaged.
    """
    path = Path(folder) / _RUN
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that `jaxlab megafold train` wrote")
    config = core.load_config(StudyConfig, path)
    like = jax.eval_shape(functools.partial(initial_state, config))
    state, _ = core.Checkpointer(Path(folder) / "checkpoints").restore(like)
    return config.network.config, state.ema_params


@contextlib.contextmanager
def opened(config: StudyConfig) -> Iterator[Study]:
    """A study in the config's folder, or in one that is gone afterwards."""
    with core.kept_or_temporary(config.folder) as folder:
        yield Study(config, folder)


@functools.partial(jax.jit, donate_argnums=0)
def _step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
    return train_step(state, batch, jax.random.fold_in(key, state.step))


def _key(config: StudyConfig, purpose: str) -> Array:
    return core.named_key(jax.random.key(config.seed), purpose)


def _claim(folder: Path, config: StudyConfig) -> None:
    """A folder belongs to one run; how long it is, and what is sampled, may change."""
    path = folder / _RUN
    if path.is_file():
        theirs, ours = (_identity(each) for each in (core.load_config(StudyConfig, path), config))
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(f"{name}: {folder} was trained with {theirs[name]}, got {value}; use another folder")
    core.save_config(config, path)


def _identity(config: StudyConfig) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in core.to_dict(config).items() if name not in _FREE}


def _outcome(name: str, features: Features, predictions: list[Prediction]) -> Outcome:
    moved, lddts, *rmsds = jax.device_get(_held_to(np.stack([each.coords for each in predictions]), _truth(features)))
    placed = [dataclasses.replace(each, coords=coords) for each, coords in zip(predictions, moved)]
    here, reflected = rmsds
    return Outcome(name, features, placed, lddts.tolist(), here.tolist(), (reflected < here).tolist())


def _truth(features: Features) -> Features:
    return {name: features[name] for name in ("coords", "resolved", "atom_token", "is_dna", "is_rna")}


@jax.jit
def _held_to(
    coords: Float[Array, "t a 3"], truth: Mapping[str, Array]
) -> tuple[Float[Array, "t a 3"], Float[Array, " t"], Float[Array, " t"], Float[Array, " t"]]:
    """Samples on the truth, their lDDT, their RMSD, and that to the truth's mirror image."""
    target, mask, token = truth["coords"], truth["resolved"], truth["atom_token"]
    nucleotide = (truth["is_dna"] | truth["is_rna"])[token]

    def one(pred: Array) -> tuple[Array, Array, Array, Array]:
        return (
            weighted_rigid_align(pred, target, mask.astype(np.float32)),
            lddt(pred, target, mask, is_nucleotide=nucleotide, atom_token=token),
            rmsd(pred, target, mask),
            rmsd(pred, target * np.array([-1.0, 1.0, 1.0], np.float32), mask),
        )

    return jax.lax.map(one, coords)
