"""A whole training run from one config, and the plan of its step for machines that are not here."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab import core
from jaxlab.core import plan as planning
from jaxlab.models import cost
from jaxlab.models.decoder import Decoder, DecoderConfig, MoEPolicy
from jaxlab.training.adamw import OptimizerConfig, optimizer
from jaxlab.training.loop import fit
from jaxlab.training.loss import LMLoss, lm_loss, perplexity
from jaxlab.training.sharding import batch_sharding, expert_policy, gradient_shardings, state_shardings
from jaxlab.training.step import TrainState, make_train_step, update_function
from jaxlab.training.text import TextBatches, TokenBatch, text_batches


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A language-model training run; defaults are ours.

    Attributes:
        model: The decoder.
        data: `"python-stdlib"`, `"package-docs"`, or a file or folder of text.
        tokenizer: `"bytes"`, or anything `load_tokenizer` takes.
        steps: Updates to make.
        batch_size: Rows a step, over all devices.
        length: Tokens a row.
        seed: Of the parameters, the data order and the dropout of experts.
        optimizer: AdamW and its schedule, which spans `steps` unless it says otherwise.
        mesh: Axis sizes as in `make_mesh`; empty: one device, or all of them along `data` when there are several
            processes.
        moe: How sparse layers run. Expert axes that it does not name are the mesh's (`node`, `expert`, and `tp_axis`).
        aux_loss_coef: Weight of the load-balancing loss of sparse layers (X-MoE's scripts).
        z_loss_coef: Weight of their z-loss.
        shard_optimizer: ZeRO-1 on a mesh: each data-parallel rank keeps its part of the optimiser's moments only.
        accumulate: Pieces a batch is worked through in.
        checkpoint_every: Steps between checkpoints; 0: at the end only.
        eval_every: Steps between validation perplexities; 0: at the end only.
        eval_batches: Batches a validation takes, the first ones; 0: all held-out text.
    """

    model: DecoderConfig
    data: str = "python-stdlib"
    tokenizer: str = "bytes"
    steps: int = 1000
    batch_size: int = 16
    length: int = 256
    seed: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    moe: MoEPolicy = dataclasses.field(default_factory=MoEPolicy)
    aux_loss_coef: int | float = 0.01
    z_loss_coef: int | float = 0.0
    shard_optimizer: bool = False
    accumulate: int = 1
    checkpoint_every: int = 100
    eval_every: int = 0
    eval_batches: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "eval_every", "eval_batches", "aux_loss_coef", "z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {getattr(self, name)}")
        if self.length > self.model.max_position_embeddings:
            raise ValueError(
                f"length: expected at most max_position_embeddings = {self.model.max_position_embeddings}, "
                f"got {self.length}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch_size = {self.batch_size}, got {self.accumulate}")
        if self.optimizer.steps is None:
            object.__setattr__(self, "optimizer", dataclasses.replace(self.optimizer, steps=self.steps))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What makes the steps of a run: the usual ones, or those of a system that trains in another way.

    Attributes:
        state: Before the first step; a pytree with `step`.
        step: (state, batch) -> (state, metrics); the state passed in is consumed.
        params: state -> the parameters that are validated and saved, as the decoder takes them; on a mesh, lying there.
        settings: JSON that decides the numbers beside the `TrainConfig`: a folder goes on under the same only.
        checkpointer: folder -> what saves and restores the state.
    """

    state: Any
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    params: Callable[[Any], Any]
    settings: Any = None
    checkpointer: Callable[[Path], core.Checkpointer] = core.Checkpointer


def _tokenizer(source: str) -> Any:
    from jaxlab.models import ByteTokenizer, load_tokenizer

    return ByteTokenizer() if source == "bytes" else load_tokenizer(source)


def mesh_of(config: TrainConfig) -> jax.sharding.Mesh | None:
    """The mesh that a run trains on; None for one device."""
    if config.mesh or jax.process_count() > 1:
        return core.make_mesh(config.mesh)
    return None


def _network(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> tuple[Decoder, LMLoss]:
    """The decoder as it runs on the mesh, and its loss."""
    model = Decoder(config.model, mlp=expert_policy(config.moe, mesh))
    return model, lm_loss(model, aux_loss_coef=config.aux_loss_coef, z_loss_coef=config.z_loss_coef)


def _initial_state(config: TrainConfig, loss: LMLoss, tx: Any, mesh: jax.sharding.Mesh | None) -> TrainState:
    """The state before the first step, made where it will lie: no device ever holds all of a sharded one."""

    def create(key):
        params = nn.meta.unbox(loss.model.init(core.named_key(key, "params"), jnp.zeros((1, 2), jnp.int32))["params"])
        return TrainState.create(params, tx, core.named_key(key, "train"))

    key = jax.random.key(config.seed)
    if mesh is None:
        return jax.jit(create)(key)
    where = state_shardings(
        jax.eval_shape(create, key), tx, mesh, loss.abstract_params(), shard_optimizer=config.shard_optimizer
    )
    return jax.jit(create, out_shardings=where)(key)


def _batches(config: TrainConfig, tokenizer: Any, split: str, mesh: jax.sharding.Mesh | None) -> TextBatches:
    batches = text_batches(
        config.data,
        tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
        split=split,
        mesh=mesh,
    )
    if batches.max_id >= config.model.vocab_size:
        raise ValueError(
            f"vocab_size: expected more than the largest token id {batches.max_id} of tokenizer "
            f"{config.tokenizer!r}, got {config.model.vocab_size}"
        )
    return batches


# What may change between one part of a run and the next, and decides no number.
_FREE = ("checkpoint_every", "eval_every", "eval_batches", "mesh", "shard_optimizer")
_ROUTING = ("drop_policy", "capacity_factor", "eval_capacity_factor", "min_capacity", "jitter_eps")


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What of a config decides the numbers: of `moe` what is dropped, not which device computes what."""
    plain = core.to_dict(config)
    mine = {name: plain[name] for name in (field.name for field in dataclasses.fields(TrainConfig))}
    mine["optimizer"].pop("steps")  # follows `steps`
    mine["moe"] = {name: mine["moe"][name] for name in _ROUTING}
    return mine


def _check_folder(config: TrainConfig, folder: Path, trainer: Any) -> None:
    """A folder belongs to one run: going on with other settings would silently give a mixture.

    `steps` may grow; how often something is saved or measured, and where and how the layers run, may change.
    """
    path = folder / "train.json"
    free = ("steps", *_FREE)
    mine = _identity(config) | {"trainer": trainer}
    if path.exists():
        usual = _identity(TrainConfig(config.model, length=1)) | {"trainer": None}
        saved = json.loads(path.read_text())
        for name, value in mine.items():
            theirs = saved.get(name, usual.get(name))  # a run of before there was such a setting had the default
            if name not in free and theirs != json.loads(json.dumps(value)):
                raise ValueError(f"{name}: {folder} was trained with {theirs!r}, got {value!r}; use another folder")
    elif core.distributed.is_main():
        core.replace_file(path, json.dumps(mine, indent=1))


def _peak_flops(config: DecoderConfig) -> float | None:
    """FLOP/s of one device in the model's dtype, where it is known."""
    kind = jax.devices()[0].device_kind.lower()
    if config.dtype != "bfloat16":
        return None
    return next((peak for name, peak in cost.PEAK_BF16_FLOPS.items() if name in kind.replace(" ", "")), None)


class _Logger(core.MetricsLogger):
    """Adds model FLOPs utilisation to steps with a token rate, where the device's peak is known."""

    def __init__(self, folder: Path, config: TrainConfig, devices: int):
        super().__init__(folder)
        self._config, self._devices, self._peak = config, devices, _peak_flops(config.model)

    def log(self, step: int | np.integer, values: Mapping[str, Any]) -> None:
        """Logs the values, with `mfu`."""
        if self._peak is not None and "tokens_per_s" in values:
            model, length, rate = self._config.model, self._config.length, float(values["tokens_per_s"])
            values = {**values, "mfu": cost.mfu(model, rate, length, peak_flops=self._peak, devices=self._devices)}
        super().log(step, values)


@contextlib.contextmanager
def _usual(config: TrainConfig, loss: LMLoss) -> Iterator[Trainer]:
    mesh, tx = mesh_of(config), optimizer(config.optimizer)
    step = make_train_step(loss, tx, accumulate=config.accumulate, mesh=mesh, shard_optimizer=config.shard_optimizer)
    yield Trainer(_initial_state(config, loss, tx, mesh), step, lambda state: state.params)


def train(
    config: TrainConfig,
    folder: str | os.PathLike,
    *,
    trainer: Callable[[TrainConfig, LMLoss], contextlib.AbstractContextManager[Trainer]] = _usual,
) -> core.Report:
    """Trains a decoder on text. Called again on the same folder it goes on from the latest checkpoint.

    `folder` gets `metrics.jsonl` (`step`, `loss`, `grad_norm`, `tokens_per_s`, `accuracy`, routing where there is any),
    `checkpoints/`, `model/` (Hugging Face files of the final model and tokenizer) and `report.json`. Killed at any
    moment and started again, it repeats the same losses bit for bit on one device.

    Args:
        config: The run.
        folder: Where everything is kept; belongs to this config.
        trainer: Opens what makes the steps, for the decoder's loss; `jaxlab.superoffload` has another one.

    Returns:
        Loss curve, final loss, validation perplexity, throughput.

    Raises:
        ValueError: The folder belongs to another config, the tokenizer has ids beyond the vocabulary, or the model's
            family cannot say what the model is.
    """
    from jaxlab.models import save_pretrained

    config.model.to_hf()  # what could not be saved is not trained
    folder = Path(folder)
    tokenizer, mesh = _tokenizer(config.tokenizer), mesh_of(config)
    model, loss = _network(config, mesh)
    batches = _batches(config, tokenizer, "train", mesh)
    held_out = _batches(config, tokenizer, "validation", mesh)
    start = held_out.state()
    with trainer(config, loss) as made, _Logger(folder, config, 1 if mesh is None else mesh.size) as logger:
        _check_folder(config, folder, made.settings)

        def evaluate(state: Any) -> dict[str, float]:
            held_out.restore(start)
            batches = itertools.islice(held_out, config.eval_batches or None)
            return {"validation_perplexity": perplexity(model, made.params(state), batches)}

        state = fit(
            made.state,
            made.step,
            batches,
            steps=config.steps,
            checkpointer=made.checkpointer(folder / "checkpoints"),
            every=config.checkpoint_every or config.steps,
            logger=logger,
            evaluate=evaluate,
            evaluate_every=config.eval_every,
        )
        params = made.params(state)
    save_pretrained(folder / "model", model, params, tokenizer=tokenizer)
    report = _report(config, folder, int(state.step), params)
    if core.distributed.is_main():
        report.save(folder)
    return report


def trained(config: TrainConfig, folder: str | os.PathLike) -> Path:
    """The Hugging Face folder of the model that a run gives; what is not there yet is trained first.

    Args:
        config: The run.
        folder: Holds such runs, each in a folder named after a hash of the settings that decide its numbers.

    Returns:
        `<folder>/<hash>/model`.
    """
    decides = {name: value for name, value in _identity(config).items() if name not in _FREE}
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    run = Path(folder) / name
    if not (run / "report.json").exists():  # the last thing that a run writes
        train(config, run)
    return run / "model"


def _report(config: TrainConfig, folder: Path, steps_made: int, params: Any) -> core.Report:
    rows = core.jsonl.read(folder / "metrics.jsonl") if core.distributed.is_main() else []
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "validation_perplexity" in row]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    metrics: dict[str, float | str] = {"parameters": parameters, "steps": steps_made}
    if steps:
        rates = sorted(row["tokens_per_s"] for row in steps)
        metrics |= {
            "first_loss": steps[0]["loss"],
            "final_loss": steps[-1]["loss"],
            "tokens_per_s": rates[len(rates) // 2],
        }
        metrics |= {name: steps[-1][name] for name in ("mfu", "aux_loss", "expert_load_max") if name in steps[-1]}
    if evaluations:
        metrics["validation_perplexity"] = evaluations[-1]["validation_perplexity"]
    return core.Report(
        system="training",
        title=f"A language model of {parameters / 1e6:.1f} M parameters, trained on {config.data}",
        metrics=metrics,
        plots=(("Loss, nats a token", _curve(steps, evaluations)),) if steps else (),
        notes=(
            f"{steps_made} steps of {config.batch_size} x {config.length} tokens, tokenizer {config.tokenizer}; "
            "tokens per second is the median step's. Validation documents were held out by a hash of their names.",
        ),
    )


def _curve(steps: list[dict[str, float]], evaluations: list[dict[str, float]]) -> Any:
    from jaxlab.core.figures import BLUE, ORANGE, figure

    drawn, axes = figure()
    axes.plot(
        [row["step"] for row in steps], [row["loss"] for row in steps], color=BLUE, linewidth=1.2, label="training"
    )
    if evaluations:
        losses = [math.log(row["validation_perplexity"]) for row in evaluations]
        axes.plot([row["step"] for row in evaluations], losses, "o", color=ORANGE, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    return drawn


def plan(config: TrainConfig, target: planning.Target, *, options: Mapping[str, Any] | None = None) -> planning.Plan:
    """Compiles the training step of `config` for a target, which need not be there; nothing is executed.

    Parameters and moments lie on the target's mesh by their logical axis names, the batch over its data axes.

    Args:
        config: The run; `config.mesh` is not read, the target has one.
        target: From `jaxlab.core.plan.target`.
        options: Of XLA's compiler, as in `jaxlab.core.plan.compile`.

    Returns:
        Bytes of one device by kind (parameters, optimizer, input), collectives and kernels.
    """
    mesh, tx = target.mesh, optimizer(config.optimizer)
    _, loss = _network(config, mesh)
    names = loss.abstract_params()
    state = jax.eval_shape(
        lambda params, key: TrainState.create(params, tx, key), nn.meta.unbox(names), jax.eval_shape(jax.random.key, 0)
    )
    where = state_shardings(state, tx, mesh, names, shard_optimizer=config.shard_optimizer)
    gradients_lie = gradient_shardings(state.params, mesh, names) if config.shard_optimizer else None
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, where)
    shape = (config.batch_size, config.length)
    place = batch_sharding(mesh, shape)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (jnp.int32, jnp.float32))
    batch = TokenBatch(ids, ids, ids, ids, weights)
    labels = TrainState(step="optimizer", params="parameters", opt_state="optimizer", rng="optimizer")
    update = update_function(loss, tx, config.accumulate, gradients_lie)
    step = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    return planning.compile(step, state, batch, target=target, labels=(labels, "input"), options=options)
