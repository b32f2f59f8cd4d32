"""One training run made in several ways, with gradients that are not finite now and then, and held bit to bit."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlab import core
from jaxlab.models import ByteTokenizer, load_tokenizer
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.superoffload.config import SuperOffloadConfig
from jaxlab.superoffload.loss_scale import LossScaleConfig
from jaxlab.superoffload.pieces import Pieces, decoder_pieces
from jaxlab.superoffload.schedule import Schedule
from jaxlab.superoffload.segmented import Segmented
from jaxlab.superoffload.timeline import TimedSuperOffload
from jaxlab.superoffload.trainer import adam_of, engine_config, layers_of_a_bucket
from jaxlab.training import TextBatches, TrainConfig, fit, lm_loss, text_batches

WAYS: dict[str, dict[str, Any]] = {
    "synchronous": {"speculation": "never"},
    "copies": {"speculation": "always", "undo": "copy"},
    "residuals": {"speculation": "always", "undo": "residual"},
    "by itself": {"speculation": "auto", "undo": "residual"},
}
"""How a step may be made: after the verdict, or before it with one undo log or the other, or as it pays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainConfig):
    """A training run on one device, made in several ways; every default is ours. Every parameter decays.

    Attributes:
      ways: of `WAYS`; the first is what the others are held to.
      nan_at: steps whose loss is made NaN.
      inf_at: steps whose loss is made infinite.
      bucket_bytes: of the engine.
      loss_scale: of the engine, where `model.dtype` is float16.
      link_bw: bytes/s of the link that sleeps stand for (`TimedSuperOffload`); None: no link.
      machine: of the modelled schedule.
      shape: layers, hidden size, rows and tokens a row of the model it trains (the 5B of the paper's ablation).
      folder: keeps metrics and checkpoints; none: a temporary one, so that every run starts anew.
    """

    ways: tuple[str, ...] = ("synchronous", "copies", "residuals")
    nan_at: tuple[int, ...] = ()
    inf_at: tuple[int, ...] = ()
    bucket_bytes: int = 1 << 20
    loss_scale: LossScaleConfig = dataclasses.field(default_factory=LossScaleConfig)
    link_bw: float | None = None
    machine: str = "gh200"
    shape: tuple[int, int, int, int] = (44, 3072, 4, 1024)
    folder: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.ways:
            raise ValueError("ways: expected at least one, got none")
        for way in self.ways:
            if way not in WAYS:
                raise ValueError(f"ways: expected some of {', '.join(WAYS)}, got {way!r}")
        if self.link_bw is not None and not self.link_bw > 0:
            raise ValueError(f"link_bw: expected a value > 0, or None for no link, got {self.link_bw}")
        if self.mesh:
            raise ValueError(f"mesh: expected none for a study, which takes one device, got {self.mesh}")


class Run(NamedTuple):
    """One way's outcome.

    Attributes:
      rows: metrics of each step, those that are finite.
      state: name -> array, p, m and v by bucket, count and loss scale.
      timelines: measured, of the last steps that were made.
    """

    rows: list[dict[str, float]]
    state: dict[str, np.ndarray]
    timelines: tuple[Schedule, ...]


class Study:
    """The network and the text of a study, for runs in several ways."""

    def __init__(self, config: StudyConfig):
        """Reads the text."""
        self.config = config
        loss = lm_loss(Decoder(config.model))
        self._model = loss.model
        self._pieces = _disturbed(decoder_pieces(loss, layers_of_a_bucket(config.model, config.bucket_bytes)))
        self._text = text_batches(
            config.data,
            ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer),
            batch_size=config.batch_size,
            length=config.length,
            seed=config.seed,
        )
        self._start = self._text.state()

    def run(self, way: str, folder: Path, *, timelines: int = 8) -> Run:
        """Trains in one of `WAYS`; a killed run goes on in its folder. Keeps the timelines of so many last steps."""
        config, seen = self.config, []
        settings = engine_config(
            config,
            SuperOffloadConfig(
                bucket_bytes=config.bucket_bytes,
                loss_scale=config.loss_scale if config.model.dtype == "float16" else None,
                **WAYS[way],
            ),
        )
        self._text.restore(self._start)
        with (
            TimedSuperOffload(self._pieces.loss, adam_of(config), settings, link_bw=config.link_bw) as engine,
            core.MetricsLogger(folder) as logger,
        ):

            def step(state: Any, batch: Any) -> Any:
                state, metrics = engine.train_step(state, batch)
                seen.append(engine.timeline())
                del seen[:-timelines]
                return state, {name: value for name, value in metrics.items() if np.isfinite(value)}

            params = init_params(self._model, core.named_key(jax.random.key(config.seed), "params"))
            state = fit(
                engine.init(self._pieces.split(params)),
                step,
                _Batches(config, self._text),
                steps=config.steps,
                checkpointer=core.Checkpointer(folder / "checkpoints", keep=1),
                every=config.checkpoint_every or config.steps,
                logger=logger,
            )
        rows = [row for row in core.jsonl.read(folder / "metrics.jsonl") if "skipped" in row]
        arrays = {f"{name} {b}": np.asarray(x) for name in "pmv" for b, x in enumerate(getattr(state.master, name))}
        arrays |= {"count": np.asarray(state.count), "loss scale": np.asarray(state.loss_scale)}
        return Run(rows, arrays, tuple(seen))


def different_bits(one: Run, other: Run) -> int:
    """How many elements of p, m, v, count and loss scale differ in some bit; NaNs are bits like others.

    Raises:
      ValueError: runs with other arrays.
    """
    shapes = [{name: (x.shape, x.dtype) for name, x in run.state.items()} for run in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError("other: expected a run with the same buckets")

    def bits(x: np.ndarray) -> np.ndarray:
        return np.atleast_1d(x).view(f"u{x.itemsize}")

    return sum(int((bits(x) != bits(other.state[name])).sum()) for name, x in one.state.items())


@struct.dataclass
class _Batch:
    """A batch, and what its loss is multiplied by."""

    batch: Any
    factor: Any

    @property
    def tokens(self) -> Any:
        return self.batch.tokens


class _Batches(Iterator[_Batch]):
    """Batches of text; those of some steps have a factor that is not finite. Positions are those of the text."""

    def __init__(self, config: StudyConfig, text: TextBatches):
        self._text = text
        self._factors = dict.fromkeys(config.nan_at, math.nan) | dict.fromkeys(config.inf_at, math.inf)
        self.state, self.restore = text.state, text.restore

    def __next__(self) -> _Batch:
        batch = next(self._text)
        return _Batch(batch, np.float32(self._factors.get(self._text.state()["step"], 1.0)))


def _disturbed(pieces: Pieces) -> Pieces:
    """The same network for `_Batch`es."""
    if not isinstance(pieces.loss, Segmented):
        whole = pieces.loss
        return pieces._replace(loss=lambda params, given: whole(params, given.batch) * given.factor)
    first, *rest = pieces.loss.fns
    head = pieces.loss.head
    network = Segmented(
        (lambda params, given: first(params, given.batch), *rest),
        lambda params, x, given: head(params, x, given.batch) * given.factor.astype(jnp.float32),
    )
    return pieces._replace(loss=network)
