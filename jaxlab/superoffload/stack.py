"""A scan over layers whose weights lie in host memory and come one layer ahead ("weight flow", SuperOffload 2.1).

Differentiating a scan that carries the layer fetched ahead would keep every carried layer for the backward pass. The
gradient is therefore written by hand: the forward pass keeps the inputs of the blocks only, and the backward pass
fetches the layers a second time, in reverse, again one ahead, and recomputes each block.

On a GPU a fetch is an asynchronous copy. XLA keeps two of them in flight and lets the others of a layer wait, unless
told otherwise: `XLA_FLAGS=--xla_gpu_experimental_parallel_async_compute_limit=16` puts all of a layer's behind the
matrix products of the forward loop (read from the scheduled program; its backward loop still fetches after them).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

BLOCK_INPUT = "block_input"
"""The `checkpoint_name` of what a block is given."""

Apply = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class OffloadedScan:
    """What repeats a layer whose stacked weights may lie on the host: `Decoder(config, repeat=OffloadedScan())`.

    The weights of the layer after the one at work are on their way. Gradients come back to where the weights lie.

    Attributes:
        offload_inputs: the layers' inputs wait for the backward pass in host memory.
    """

    offload_inputs: bool = False

    def __call__(self, apply: Apply, weights: Any, x: Array, *shared: Any) -> Array:
        """Applies `apply(layer's weights, x, *shared) -> x` for every layer of the stacked weights."""
        return _run(apply, self.offload_inputs, weights, x, shared)


class OffloadedStack(nn.Module):
    """`n_layers` equal blocks one after the other; the device holds two layers of weights, however many there are.

    Parameters are stacked under `params/layers`, leading axis n_layers. They may lie in host memory (`offload_tree`) or
    on the device; gradients come back to where the weights lie. Values and gradients are those of a plain scan.

    Example:
        stack = OffloadedStack(Block(), 30)
        params = offload_tree(stack.init(key, x))
        gradients = jax.jit(jax.grad(lambda p, x: stack.apply(p, x).sum()))(params, x)

    Attributes:
        block: a linen module, called as `block(x, *shared)`; it has parameters only, draws no random numbers, and
            returns what looks like x.
        n_layers: how often it is repeated.
        offload_inputs: the blocks' inputs, too, wait for the backward pass in host memory.
    """

    block: nn.Module
    n_layers: int
    offload_inputs: bool = False

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "..."], *shared: Any) -> Float[Array, "..."]:
        """Applies the blocks.

        Args:
            x: what the first block is given.
            *shared: pytrees of arrays given to every block (rotary tables, segment ids).

        Returns:
            What the last block returns.

        Raises:
            ValueError: n_layers below 1, or a block whose result has another shape or dtype than x.
            NotImplementedError: a block with other collections than "params".
        """
        if self.n_layers < 1:
            raise ValueError(f"n_layers: expected at least 1, got {self.n_layers}")
        x, shared = jax.tree.map(jnp.asarray, (x, shared))
        block = self.block.clone(parent=None)

        def init(key: Array) -> Any:
            made = jax.vmap(lambda key: block.init(key, x, *shared))(jax.random.split(key, self.n_layers))
            if set(made) != {"params"}:
                raise NotImplementedError(f"block: expected parameters only, got the collections {', '.join(made)}")
            return nn.meta.add_axis(made["params"], 0, {nn.PARTITION_NAME: "layers"})

        weights = self.param("layers", init)

        def apply(layer: Any, x: Array, *shared: Any) -> Any:
            return block.apply({"params": layer}, x, *shared)

        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weights)
        out = jax.eval_shape(apply, layer, x, *shared)
        if (getattr(out, "shape", None), getattr(out, "dtype", None)) != (x.shape, x.dtype):
            raise ValueError(f"block: expected a result of shape {x.shape} and dtype {x.dtype} like x, got {out}")
        return OffloadedScan(self.offload_inputs)(apply, weights, x, *shared)


def _layer(weights: Any, index: Array | int) -> Any:
    """Layer `index` of the stack, on the device. A slice that goes straight over is a copy, not host arithmetic."""

    def fetch(leaf: Array) -> Array:
        piece = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
        return jax.device_put(piece, jax.memory.Space.Device)

    return jax.tree.map(fetch, weights)


def _depth(weights: Any) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(apply: Apply, offload_inputs: bool, weights: Any, x: Array, shared: Any) -> Array:
    return _forward(apply, offload_inputs, weights, x, shared)[0]


def _forward(apply, offload_inputs, weights, x, shared):
    last = _depth(weights) - 1

    def body(carry, index):
        x, layer = carry
        ahead = _layer(weights, jnp.minimum(index + 1, last))
        x = checkpoint_name(x, BLOCK_INPUT)
        kept = jax.device_put(x, jax.memory.Space.Host) if offload_inputs else x
        return (apply(layer, x, *shared), ahead), kept

    (y, _), inputs = jax.lax.scan(body, (x, _layer(weights, 0)), jnp.arange(last + 1))
    return y, (weights, inputs, shared)


def _backward(apply, offload_inputs, saved, dy):
    weights, inputs, shared = saved
    last = _depth(weights) - 1
    homes = jax.tree.map(lambda leaf: jax.typeof(leaf).memory_space, weights)
    leaves, tree = jax.tree.flatten(shared)
    smooth = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def closed(layer, x, given):  # in the differentiable ones among the shared arrays
        given = iter(given)
        return apply(layer, x, *tree.unflatten([next(given) if s else leaf for s, leaf in zip(smooth, leaves)]))

    given = [leaf for s, leaf in zip(smooth, leaves) if s]

    def body(carry, index):
        dy, layer, x, sums = carry
        before = jnp.maximum(index - 1, 0)
        ahead = _layer(weights, before), _layer(inputs, before)
        d_layer, dx, d_given = jax.vjp(closed, layer, x, given)[1](dy)
        sums = jax.tree.map(jnp.add, sums, d_given)
        return (dx, *ahead, sums), jax.tree.map(jax.device_put, d_layer, homes)

    start = (dy, _layer(weights, last), _layer(inputs, last), jax.tree.map(jnp.zeros_like, given))
    (dx, _, _, sums), d_weights = jax.lax.scan(body, start, jnp.arange(last + 1), reverse=True)
    sums = iter(sums)
    return d_weights, dx, tree.unflatten([next(sums) if s else None for s in smooth])


_run.defvjp(_forward, _backward)
