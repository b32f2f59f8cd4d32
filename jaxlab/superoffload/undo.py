"""What a step is undone with: bits that the algebraic inverse of Adam, computed in float32, is wrong by.

The official code inverts Adam and keeps what comes out, which changes a quarter of the bits and keeps a NaN forever.
Here the step also notes, for p, m and v of every element, by how much the old value's bits differ from the inverse's,
as integers (int8: up to 127 floats away), and the old values themselves where that does not suffice: 3 bytes a
parameter, and exact whatever the inverse is, as long as it is computed alike both times. Every product is rounded
before it is used (`pallas_kernels.fused_adam.rounded`), so that it is.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlab.superoffload.host_kernel import BLOCK, Moments, Residual
from pallas_kernels.fused_adam import Coefficients, coefficients, rounded, runtime_zero


def scalars(hyper: Mapping[str, Any]) -> Float[Array, "12"]:
    """The coefficients of a step, then 1/b1, 1/b2 and 1/(1 - decay); `hyper` as `fused_adam` takes it."""
    c = coefficients(**hyper)
    kept = 1 - c.decay if hyper["mode"] == "adamw" else jnp.ones_like(c.decay)
    return jnp.stack([*c, 1 / c.b1, 1 / c.b2, 1 / kept])


def encode(
    old: Moments,
    new: Moments,
    g: Float[Array, " n"],
    made: Float[Array, "12"],
    count: Int[Array, ""],
    *,
    decoupled: bool,
    capacity: int,
) -> Residual:
    """The log of a step, in plain XLA; what `host_kernel.step` writes, except that exceptions are in order."""
    n = g.shape[0]
    inverse = _Inverse(new, g, made, count, decoupled)
    guesses = (inverse.p, *inverse.moments(old[0]))
    diffs = [_bits(before) - _bits(guess) for before, guess in zip(old, guesses)]  # wraps around, and loses nothing
    # A NaN has many bit patterns: an old one is kept. From anything else it is farther away than a difference says.
    bad = jnp.isnan(old[0]) | jnp.isnan(old[1]) | jnp.isnan(old[2])
    for diff in diffs:
        bad |= (diff < -127) | (diff > 127)
    count = jnp.sum(bad, dtype=jnp.int32)
    (index,) = jnp.nonzero(bad, size=capacity, fill_value=n)
    values = jnp.stack([x.at[index].get(mode="fill", fill_value=0) for x in old])
    return Residual(
        jnp.stack(diffs).astype(jnp.int8),
        index.astype(jnp.int32),
        values,
        jnp.stack([jnp.minimum(count, capacity), (count > capacity).astype(jnp.int32)]),
        jnp.ones((-(-n // BLOCK),), jnp.uint8),
    )


def decode(
    new: Moments,
    g: Float[Array, " n"],
    made: Float[Array, "12"],
    count: Int[Array, ""],
    log: Residual,
    *,
    decoupled: bool,
) -> Moments:
    """The p, m and v before the step, in plain XLA; the log must have had room for its exceptions."""
    inverse = _Inverse(new, g, made, count, decoupled)
    p = _exact(inverse.p, log, 0)
    m, v = inverse.moments(p)
    return p, _exact(m, log, 1), _exact(v, log, 2)


class _Inverse:
    """The step undone in float32: p from what it moved by, then m and v from the gradient (which may contain p)."""

    def __init__(
        self, new: Moments, g: Float[Array, " n"], made: Float[Array, "12"], count: Int[Array, ""], decoupled: bool
    ):
        self._zero = runtime_zero(count)
        self._c, self._un = Coefficients(*made[:9]), made[9:]
        self._new, self._g, self._decoupled = new, g.astype(jnp.float32), decoupled
        p, m, v = new
        moved = m / (self._times(jnp.sqrt(v), self._c.root) + self._c.eps)
        self.p = p + self._times(self._c.step, moved)
        if decoupled:
            self.p = self._times(self.p, self._un[2])

    def moments(self, p: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        g = self._times(self._g, self._c.factor)
        g = g if self._decoupled else g + self._times(self._c.decay, p)
        m = self._new[1] - self._times(self._c.rest1, g)
        v = self._new[2] - self._times(self._c.rest2, self._times(g, g))
        return self._times(m, self._un[0]), self._times(v, self._un[1])

    def _times(self, x: Array, y: Array) -> Array:
        return rounded(x * y, self._zero)


def _exact(guess: Float[Array, " n"], log: Residual, which: int) -> Float[Array, " n"]:
    bits = (_bits(guess) + log.diff[which].astype(jnp.int32)).at[log.index].set(_bits(log.values[which]), mode="drop")
    return lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: Float[Array, " n"]) -> Int[Array, " n"]:
    return lax.bitcast_convert_type(x, jnp.int32)
