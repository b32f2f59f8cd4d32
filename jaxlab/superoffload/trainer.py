"""Any decoder's training run by SuperOffload: same config, same folder as `jaxlab.training.train`."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlab import core
from jaxlab.models.decoder import DecoderConfig, init_params
from jaxlab.superoffload.checkpoint import EngineCheckpointer
from jaxlab.superoffload.config import SuperOffloadConfig
from jaxlab.superoffload.engine import SuperOffload, TrainState
from jaxlab.superoffload.host_adam import AdamHyper
from jaxlab.superoffload.loss_scale import LossScaleConfig
from jaxlab.superoffload.partition import AXES
from jaxlab.superoffload.pieces import decoder_pieces
from jaxlab.training import TrainConfig, Trainer, decay_mask, learning_rate_schedule
from jaxlab.training import train as run
from jaxlab.training.loss import LMLoss
from jaxlab.training.run import mesh_of
from jaxlab.training.sharding import place_state

_FOLLOW = {
    "clip_norm": "optimizer.clip_norm",
    "clip_eps": "optimizer.clip_norm, which adds nothing to the norm",
    "compute_dtype": "model.dtype",
    "steps_per_update": "steps, each an update",
}
"""Settings of the engine that a training config already decides, and what says so."""


def train(config: TrainConfig, folder: str | os.PathLike, settings: SuperOffloadConfig | None = None) -> core.Report:
    """`jaxlab.training.train` with Adam on the host.

    The folder's layout, the data, the schedule and what decays are the same; so are resuming and validation, which
    takes the float32 parameters. Layers live in `model.dtype`, with a loss scaler if that is float16. A decoder with
    equal dense layers and a head of its own is worked through in pieces, so that the host begins before the backward
    pass has ended; another one as a whole.

    Over `config.mesh` each device owns a slice of every bucket (ZeRO) and has all layers in `model.dtype`; for
    validation the float32 parameters lie there by their logical axis names, as `jaxlab.training.train` keeps them. Over
    a `sequence` axis the decoder gives attention whole sequences of fewer heads (Ulysses).

    Args:
      config: the run.
      folder: where everything is kept; belongs to this config and these settings.
      settings: of the engine, beside what the config decides.

    Raises:
      NotImplementedError: mesh axes other than `data`, `fsdp` and `sequence`, `accumulate`, jitter in routers, or
        parameters that are not float32.
      ValueError: settings that the config decides, a folder of another run.
    """
    settings = engine_config(config, settings or SuperOffloadConfig())
    mesh = mesh_of(config)

    @contextlib.contextmanager
    def offloaded(config: TrainConfig, loss: LMLoss) -> Iterator[Trainer]:
        pieces = decoder_pieces(loss, layers_of_a_bucket(config.model, settings.bucket_bytes))
        with SuperOffload(pieces.loss, adam_of(config), settings, mesh=mesh, decay_mask=decay_mask) as engine:
            state = engine.init(
                pieces.split(init_params(loss.model, core.named_key(jax.random.key(config.seed), "params")))
            )
            decides = ("bucket_bytes", "split", "loss_scale")
            plain = {name: value for name, value in core.to_dict(settings).items() if name in decides}

            def params(state: TrainState) -> Any:
                whole = pieces.join(engine.master(state))
                return whole if mesh is None else place_state(whole, core.shardings(loss.abstract_params(), mesh))

            def checkpointer(folder: Path) -> EngineCheckpointer:
                return EngineCheckpointer(folder, engine)

            yield Trainer(state, engine.train_step, params, {"superoffload": plain}, checkpointer)

    return dataclasses.replace(run(config, folder, trainer=offloaded), system="superoffload")


def engine_config(config: TrainConfig, settings: SuperOffloadConfig) -> SuperOffloadConfig:
    """The engine's settings for a training run; refuses what it cannot do, see `train`."""
    if odd := [axis for axis, size in config.mesh.items() if size != 1 and axis not in AXES]:
        raise NotImplementedError(
            f"mesh: expected no axes but {', '.join(AXES)} with SuperOffload, got {', '.join(odd)}"
        )
    if config.accumulate > 1:
        raise NotImplementedError(f"accumulate: expected 1 with SuperOffload, got {config.accumulate}")
    if config.moe.jitter_eps:
        raise NotImplementedError(f"moe.jitter_eps: expected 0 with SuperOffload, got {config.moe.jitter_eps}")
    if config.model.param_dtype != "float32":
        raise NotImplementedError(f"model.param_dtype: expected float32 masters, got {config.model.param_dtype!r}")
    for name, follows in _FOLLOW.items():
        if getattr(settings, name) != getattr(SuperOffloadConfig, name):
            raise ValueError(f"{name}: follows {follows}; got {getattr(settings, name)!r}")
    dtype: Any = config.model.dtype  # checked by the settings
    scaler = settings.loss_scale or (LossScaleConfig() if dtype == "float16" else None)
    return dataclasses.replace(
        settings, clip_norm=config.optimizer.clip_norm, clip_eps=0.0, compute_dtype=dtype, loss_scale=scaler
    )


def adam_of(config: TrainConfig) -> AdamHyper:
    """The hyper-parameters of a training config's AdamW."""
    spec = config.optimizer
    return AdamHyper(learning_rate_schedule(spec), spec.b1, spec.b2, spec.eps, spec.weight_decay)


def layers_of_a_bucket(config: DecoderConfig, bucket_bytes: int) -> int:
    """How many layers fill about one bucket with their float32 gradients."""
    from jaxlab.models.cost import parameter_count

    count = parameter_count(config)
    size = 4 * (count.total - count.embedding) // config.num_hidden_layers
    return min(config.num_hidden_layers, max(1, bucket_bytes // size))
