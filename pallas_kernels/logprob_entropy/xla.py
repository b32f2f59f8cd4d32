"""The logits a tile at a time: what a CPU, and any platform without a kernel, really uses.

A tile is some rows by some of the vocabulary. Forward, each adds to four numbers a row (`Sums`), rescaled whenever a
larger logit is met. Backward it is made again and turned into its own gradient,

    d_logit = p (d_lse - d_logp - d_entropy (log p + entropy)) + d_logp [target],

which gives a part of the gradient of the rows, added up over the vocabulary, and one of the head's, added up over the
rows: every column of the large head's gradient is summed before it is written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.layernorm_linear.xla import cut, over_rows, put

Rows = Float[Array, " n"]

# Numbers of a tile of logits, of the head's columns beside it and of its rows, which a core's share of the cache holds.
_TILE = 2**21
_ROWS = 1024
_LANES = 128  # columns of a tile are a multiple of these: rows of an odd length are slow to load
LOW = -1e38  # below any logit, and finite, so that nothing is subtracted from an infinity


class Sums(NamedTuple):
    """Of the logits x met so far: m, the sums of e^(x-m) and of (x-m) e^(x-m), and the target's x (else 0)."""

    maximum: Array
    total: Array
    moment: Array
    target: Array


def merged(parts: Sums) -> Sums:
    """Sums of all parts, which lie along the first axis."""
    maximum = jnp.max(parts.maximum, axis=0)
    away = parts.maximum - maximum
    factor = jnp.exp(away)
    moment = jnp.sum(factor * (parts.moment + away * parts.total), axis=0)
    return Sums(maximum, jnp.sum(factor * parts.total, axis=0), moment, jnp.sum(parts.target, axis=0))


def results(sums: Sums) -> tuple[Rows, Rows, Rows]:
    """logp, entropy and lse from the sums of all logits."""
    log_total = jnp.log(sums.total)
    lse = sums.maximum + log_total
    return sums.target - lse, log_total - sums.moment / sums.total, lse


def forward(
    hidden: Float[Array, "n d"], head: Float[Array, "d v"], targets: Int[Array, " n"], temperature: Float[Array, ""]
) -> tuple[Rows, Rows, Rows]:
    """logp, entropy and lse; logp is -lse where the target is -1."""
    wide = temperature.dtype
    rows, columns = tile(hidden, head, _ROWS, _TILE)

    def block(start, size, fresh, out):
        del fresh
        own, goals = cut(hidden, start, size, wide) / temperature, cut(targets, start, size, jnp.int32)

        def step(at, size, fresh, sums):
            logits = jnp.where(fresh[None, :], own @ slice_columns(head, at, size).astype(wide), LOW)
            maximum = jnp.max(logits, axis=1)
            away = logits - maximum[:, None]
            weight = jnp.exp(away)
            target = jnp.sum(jnp.where(hits(goals - at, size) & fresh[None, :], logits, 0), axis=1)
            new = Sums(maximum, jnp.sum(weight, axis=1), jnp.sum(weight * away, axis=1), target)
            return merged(jax.tree.map(lambda *pair: jnp.stack(pair), sums, new))

        nothing = zeros_alike((size,), wide, hidden)
        sums = Sums(nothing + LOW, nothing, nothing, nothing)
        sums = over_rows(head.shape[1], columns, step, sums, multiple=_LANES)
        return tuple(put(array, part, start) for array, part in zip(out, results(sums)))

    return over_rows(hidden.shape[0], rows, block, (zeros_alike(targets.shape, wide, hidden),) * 3)


def backward(*args: Array) -> tuple[Float[Array, "n d"], Float[Array, "d v"]]:
    """Gradients of hidden, in float32, and of head; arguments as those of `gradients`."""
    return gradients(*args, slopes=slopes, dtype=args[3].dtype, most_rows=_ROWS, most=_TILE)


class Marks(NamedTuple):
    """What the gradients of a row's logits depend on beside them.

    Attributes:
        target: column, -1 for none.
        lse: log-sum-exp.
        level: what p is multiplied by where log p = 0.
        slope: how that falls with log p.
        peak: what the target has besides.
    """

    target: Array
    lse: Array
    level: Array
    slope: Array
    peak: Array

    def seen_from(self, start: Any, fresh: Array) -> "Marks":
        """With targets counted from column `start`, and no gradient where a row is not fresh."""
        numbers = (jnp.where(fresh, x, 0) for x in (self.level, self.slope, self.peak))
        return Marks(self.target - start, self.lse, *numbers)


def gradients(
    hidden: Float[Array, "n d"],
    head: Float[Array, "d v"],
    targets: Int[Array, " n"],
    temperature: Float[Array, ""],
    entropy: Rows,
    lse: Rows,
    d_logp: Rows,
    d_entropy: Rows,
    d_lse: Rows,
    *,
    slopes: Callable[..., Array],
    dtype: Any,
    most_rows: int,
    most: int,
) -> tuple[Float[Array, "n d"], Float[Array, "d v"]]:
    """Gradients of hidden, in float32, and of head: `slopes` makes the logits' gradients of a tile, all else is shared.

    Args:
        hidden: as in the op.
        head: as in the op.
        targets: as in the op, -1 for none.
        temperature: as in the op.
        entropy: the op's result.
        lse: the op's result.
        d_logp: cotangent.
        d_entropy: cotangent.
        d_lse: cotangent.
        slopes: (rows of hidden, columns of head, temperature, `Marks`) -> gradients of the products, of `dtype`.
        dtype: in which products are taken.
        most_rows: of a tile.
        most: numbers of a tile.
    """
    wide = temperature.dtype
    rows, columns = tile(hidden, head, most_rows, most)
    level = d_lse - d_logp - d_entropy * entropy
    # Products know nothing of the temperature: their gradients are those of the logits over it.
    marks = Marks(targets, lse, *(x / temperature for x in (level, d_entropy, d_logp)))
    # Written as integers: XLA for CPUs would convert all of a 16-bit float array to float32 and back for each part.
    kept = jnp.uint16 if head.dtype.itemsize == 2 else head.dtype

    def block(start, size, fresh, carry):
        d_hidden, d_head = carry
        part = slice_columns(head, start, size).astype(dtype)
        # Columns that the block before had: made again for the head, nothing of them for the rows.
        counted = part if head.shape[1] % size == 0 else jnp.where(fresh[None, :], part, 0)

        def step(at, size, fresh, carry):
            d_hidden, d_part = carry
            own = cut(hidden, at, size, dtype)
            given = Marks(*(cut(x, at, size, x.dtype) for x in marks)).seen_from(start, fresh)
            d_products = slopes(own, part, temperature, given)
            more = jnp.matmul(d_products, counted.T, preferred_element_type=wide)
            d_part += jnp.matmul(own.T, d_products, preferred_element_type=wide)
            return put(d_hidden, cut(d_hidden, at, size, wide) + more, at), d_part

        d_part = zeros_alike(part.shape, wide, hidden)
        d_hidden, d_part = over_rows(hidden.shape[0], rows, step, (d_hidden, d_part))
        d_part = lax.bitcast_convert_type(d_part.astype(head.dtype), kept)
        return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_part, start, 1)

    begin = zeros_alike(hidden.shape, wide, hidden), zeros_alike(head.shape, kept, hidden)
    d_hidden, d_head = over_rows(head.shape[1], columns, block, begin, multiple=_LANES)
    return d_hidden, lax.bitcast_convert_type(d_head, head.dtype)


def slopes(
    hidden: Float[Array, "r d"], head: Float[Array, "d c"], temperature: Float[Array, ""], marks: Marks
) -> Float[Array, "r c"]:
    """Gradients of the products of rows and columns."""
    logs = (hidden / temperature) @ head - marks.lse[:, None]
    spread = jnp.exp(logs) * (marks.level[:, None] - marks.slope[:, None] * logs)
    return spread + jnp.where(hits(marks.target, head.shape[1]), marks.peak[:, None], 0)


def tile(hidden: Array, head: Array, most_rows: int, most: int) -> tuple[int, int]:
    """Rows and columns of a tile: all of a small problem, else what keeps the tile and its factors small."""
    rows = min(hidden.shape[0], most_rows)
    return rows, max(_LANES, most // max(rows, head.shape[0]) // _LANES * _LANES)


def hits(targets: Int[Array, " r"], columns: int) -> Array:
    """Where a row's target is: a comparison, which fuses, where a gather would not."""
    return jnp.arange(columns, dtype=jnp.int32)[None, :] == targets[:, None]


def slice_columns(x: Array, at: Any, size: int) -> Array:
    """Columns [at, at + size), never converted with all the others beforehand, as XLA would outside of the loop."""
    x, at = lax.optimization_barrier((x, at))
    return lax.dynamic_slice_in_dim(x, at, size, axis=1)
