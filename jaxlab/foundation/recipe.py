"""A small language model trained on real text, and the same training step compiled at 8B scale for many GPUs."""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlab import core
from jaxlab.training import TrainConfig, train

if TYPE_CHECKING:
    from jaxlab.core.plan import Plan, Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundationConfig(TrainConfig):
    """A training run and what it is shown with; every default is ours.

    Attributes:
      prompt: what the model goes on from, before and after training.
      sample_tokens: how much it writes.
      temperature: of that sample.
      folder: keeps metrics and checkpoints; none: a temporary one, so that every run starts anew.
    """

    prompt: str = "def "
    sample_tokens: int = 240
    temperature: float = 0.6
    folder: str | None = None


def run(config: FoundationConfig) -> core.Report:
    """Trains the model; tells the loss curve and a sample before and after.

    Needs nothing but a CPU: the text is the Python standard library's own source (`config.data`).
    """
    if config.folder is not None:
        return _run(config, Path(config.folder))
    with tempfile.TemporaryDirectory() as folder:
        return _run(config, Path(folder))


def plan(config: TrainConfig, target: "Target") -> "Plan":
    """Compiles one training step of `config` for a machine that need not be there (`jaxlab plan`).

    Parameters and AdamW's moments lie on the mesh by their logical axis names, the batch over its data axes.
    """
    import jax
    import jax.numpy as jnp

    from jaxlab.core.plan import compile
    from jaxlab.models.decoder import Decoder
    from jaxlab.training import TokenBatch, TrainState, lm_loss, optimizer
    from jaxlab.training.sharding import batch_sharding, state_shardings
    from jaxlab.training.step import update_function

    mesh = target.mesh
    shards = batch_sharding(mesh, (config.batch_size, config.length)).num_devices
    loss = lm_loss(Decoder(config.model), shards=shards)
    tx = _optimizer(config)
    names = loss.abstract_params()
    params = jax.eval_shape(lambda tree: tree, _unboxed(names))
    state = jax.eval_shape(lambda tree: TrainState.create(tree, tx, jax.random.key(0)), params)
    where = state_shardings(state, tx, mesh, names)
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, where)
    shape = (config.batch_size, config.length)
    batch = TokenBatch(
        *(
            jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))
            for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.float32)
        )
    )
    kinds = TrainState(step="optimizer", params="parameters", opt_state="optimizer", rng="optimizer")
    step = jax.jit(update_function(loss, tx, config.accumulate), donate_argnums=0, out_shardings=(where, None))
    return compile(step, state, batch, target=target, labels=(kinds, "input"))


def _optimizer(config: TrainConfig) -> Any:
    """The run's optimiser; its schedule spans the run unless it says otherwise."""
    from jaxlab.training import optimizer

    return optimizer(dataclasses.replace(config.optimizer, steps=config.optimizer.steps or config.steps))


def _unboxed(names: Any) -> Any:
    from flax import linen as nn

    return nn.meta.unbox(names)


def _run(config: FoundationConfig, folder: Path) -> core.Report:
    import jax

    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import ByteTokenizer, load_tokenizer
    from jaxlab.models.decoder import Decoder, init_params
    from jaxlab.training import TrainState, optimizer

    tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
    model = Decoder(config.model)
    sampling = SamplingParams(max_tokens=config.sample_tokens, temperature=config.temperature)

    def sample(params: Any) -> str:
        rng = core.named_key(jax.random.key(config.seed), "sample")
        out = generate(model, params, [config.prompt], sampling, rng=rng, tokenizer=tokenizer)
        return config.prompt + (out.text or ("",))[0]

    params = init_params(model, core.named_key(jax.random.key(config.seed), "params"))
    before = sample(params)
    told = train(config, folder)
    tx = _optimizer(config)
    like = TrainState.create(params, tx, jax.random.key(config.seed))
    state, _ = core.Checkpointer(folder / "checkpoints").restore(jax.eval_shape(lambda: like))
    after = sample(state.params)
    history = core.jsonl.read(folder / "metrics.jsonl")
    return core.Report(
        system="foundation",
        title="A small language model, trained on the Python standard library",
        metrics=dict(told.metrics),
        tables=(("A sample at the same seed", ("when", "text"), (("before", before), ("after", after))),),
        plots=(("Training loss, nats a byte", _curve(history)),),
        notes=(*told.notes, f"The samples go on from {config.prompt!r} at temperature {config.temperature}."),
    )


def _curve(history: list[dict[str, float]]) -> Any:
    from jaxlab.foundation.figures import BLUE, figure

    drawn, axes = figure()
    rows = [row for row in history if "loss" in row]
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=BLUE, linewidth=1.6, label="training")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    return drawn
