"""How modules make weights, drop out, and repeat a block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.megafold.ops.basic import Affine

DROPOUT = "dropout"


class Weights(nn.Module):
    """A module that owns its weights by the names of its op's arguments; they are float32."""

    def linear(self, name: str, inputs: int, outputs: int, *, relu: bool = False) -> Float[Array, "inputs outputs"]:
        """A matrix that keeps the variance of what it maps (He's for one before a ReLU or SiLU)."""
        init = nn.initializers.variance_scaling(2.0 if relu else 1.0, "fan_in", "truncated_normal")
        return self.param(name, init, (inputs, outputs))

    def zeros(self, name: str, *shape: int) -> Float[Array, "..."]:
        """Zeros: of gates, biases, and of what ends a residual branch."""
        return self.param(name, nn.initializers.zeros_init(), shape)

    def norm(self, name: str, channels: int) -> Affine:
        """Scale 1 and offset 0, as the pair that ops take."""
        return self.param(name, lambda _: (jnp.ones(channels), jnp.zeros(channels)))

    def scale(self, name: str, channels: int) -> Float[Array, " channels"]:
        """Scale 1."""
        return self.param(name, nn.initializers.ones_init(), (channels,))


def drop(module: nn.Module, x: Float[Array, "..."], rate: float, axis: int) -> Float[Array, "..."]:
    """Dropout with one mask along `axis`, where the module was given a "dropout" rng, and none otherwise."""
    if rate == 0 or not module.has_rng(DROPOUT):
        return x
    shape = list(x.shape)
    shape[axis] = 1
    keep = jax.random.bernoulli(module.make_rng(DROPOUT), 1 - rate, tuple(shape))
    return jnp.where(keep, x / (1 - rate), 0)


def repeated(block: nn.Module, count: int, carry: Any, *shared: Any, remat: bool) -> Any:
    """`carry = block(carry, *shared)`, count times, with other weights each time, which are stacked along a first axis.

    A tuple is handed on as several arguments. With `remat` the backward pass keeps only what lies between blocks.
    """
    if count == 0:
        return carry

    def body(block: nn.Module, carry: Any, *shared: Any) -> tuple[Any, None]:
        return block(*(carry if isinstance(carry, tuple) else (carry,)), *shared), None

    scanned = nn.scan(
        nn.remat(body, prevent_cse=False) if remat else body,
        variable_axes={"params": 0},
        split_rngs={"params": True, DROPOUT: True},
        in_axes=nn.broadcast,
        length=count,
    )
    return scanned(block, carry, *shared)[0]


def mapped(
    block: nn.Module, xs: tuple[Any, ...], *shared: Any, axis: int, remat: bool, start: Array | None = None
) -> Array:
    """`block(*xs, *shared)` for one place of `axis` of all `xs` after the other, with the same weights.

    Results are stacked along that axis, or added to `start`. With `remat` the backward pass keeps none of the inside.
    """

    def apply(block: nn.Module, xs: tuple[Any, ...], *shared: Any) -> Array:
        return block(*xs, *shared)

    inner = nn.remat(apply, prevent_cse=False) if remat else apply

    def body(block: nn.Module, total: Array | None, xs: tuple[Any, ...], *shared: Any) -> tuple[Array | None, Any]:
        out = inner(block, xs, *shared)
        return (None, out) if total is None else (total + out, None)

    scanned = nn.scan(
        body,
        variable_broadcast="params",
        split_rngs={"params": False, DROPOUT: True},
        in_axes=(axis, *(nn.broadcast for _ in shared)),
        out_axes=axis,
    )
    total, stacked = scanned(block, start, xs, *shared)
    return stacked if total is None else total
