"""The training step: gradients of summed losses, accumulated, clipped and applied, on one device or a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxlab.training.accumulate import sum_over
from jaxlab.training.loss import Loss, LossOutput
from jaxlab.training.sharding import gradient_shardings, place_batch, place_state, state_shardings


@struct.dataclass
class TrainState:
    """Everything a run needs to go on: updates made (int32 scalar), parameters, optimiser state and the run's key."""

    step: Any
    params: Any
    opt_state: Any
    rng: Any

    @classmethod
    def create(cls, params: PyTree, tx: optax.GradientTransformation, rng: Array) -> "TrainState":
        """The state before the first update."""
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), rng)


def _pieces(batch: PyTree, accumulate: int) -> PyTree:
    """[B, ...] -> [k, B/k, ...]; piece i holds rows i, i+k, ..., so that each device keeps the rows it has."""

    def split(leaf):
        if leaf.shape[0] % accumulate:
            raise ValueError(f"accumulate: expected a divisor of the batch's {leaf.shape[0]} rows, got {accumulate}")
        return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def update_function(
    loss: Loss, tx: optax.GradientTransformation, accumulate: int = 1, gradients_lie: PyTree | None = None
) -> Callable:
    """The pure function (state, batch) -> (state, metrics) behind `make_train_step`, for ahead-of-time compilation.

    Args:
        loss: As for `make_train_step`, like the next two.
        tx: Optax transformation.
        accumulate: Pieces of a batch.
        gradients_lie: Shardings that the gradients, and all that is computed from them until the parameters change,
            are held to (`gradient_shardings`); None leaves them to the compiler.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected a value >= 1, got {accumulate}")

    def summed(params, batch, rng):
        out = loss(params, batch, rng)
        return out.total, out

    def gradients(params, batch, rng) -> tuple[PyTree, LossOutput]:
        (_, out), grads = jax.value_and_grad(summed, has_aux=True)(params, batch, rng)
        return grads if gradients_lie is None else jax.lax.with_sharding_constraint(grads, gradients_lie), out

    def accumulated(params, batch, rng) -> tuple[PyTree, LossOutput]:
        def one(piece) -> tuple[PyTree, LossOutput]:
            index, rows = piece
            return gradients(params, rows, jax.random.fold_in(rng, index))

        return sum_over(one, (jnp.arange(accumulate), _pieces(batch, accumulate)))

    def update(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        grads, out = (gradients if accumulate == 1 else accumulated)(state.params, batch, rng)
        # A batch without a single target changes nothing but the step: 0, not 0 / 0.
        scale = jnp.where(out.weight > 0, 1.0 / jnp.where(out.weight > 0, out.weight, 1.0), 0.0)
        grads = jax.tree.map(lambda grad, param: (grad * scale).astype(param.dtype), grads, state.params)
        metrics = {name: value * scale for name, value in out.metrics.items()}
        metrics |= {"loss": out.total * scale, "grad_norm": optax.tree.norm(grads), "weight": out.weight}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    shard_optimizer: bool = False,
) -> Callable[[Any, PyTree], tuple[Any, dict[str, Array]]]:
    """A compiled `step(state, batch) -> (state, metrics)`; the state passed in is donated.

    Args:
        loss: Sums over a batch: (params, batch, rng) -> `LossOutput`. The key is the state's, folded with its step.
        tx: Optax transformation that made the state.
        accumulate: Splits the batch into this many pieces, one after the other; results equal those of one piece.
        mesh: Batches are sharded over its `data`, `fsdp`, `node` and `expert` axes, parameters and moments by their
            logical axis names (known to `lm_loss`; otherwise they stay where they are on the mesh, or are replicated).
            Batches may be host arrays, the same on every process, or arrays already placed.
        shard_optimizer: On a mesh, ZeRO-1: each data-parallel rank keeps, and updates, its part of the moments only.

    Returns:
        The step. Metrics are f32 scalars: `loss` (mean over the weights), `grad_norm` (before clipping), `weight`, and
        the loss's own, divided by the weight.
    """
    if mesh is None:
        return jax.jit(update_function(loss, tx, accumulate), donate_argnums=0)
    names = loss.abstract_params() if hasattr(loss, "abstract_params") else None
    compiled = {}

    def step(state, batch):
        key = jax.tree.structure(state)
        if key not in compiled:
            shardings = state_shardings(state, tx, mesh, names, shard_optimizer=shard_optimizer)
            gradients_lie = gradient_shardings(state.params, mesh, names) if shard_optimizer else None
            update = update_function(loss, tx, accumulate, gradients_lie)
            compiled[key] = shardings, jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
        shardings, function = compiled[key]
        with jax.set_mesh(mesh):  # the network lays its activations out over the mesh in force
            return function(place_state(state, shardings), place_batch(batch, mesh))

    return step
