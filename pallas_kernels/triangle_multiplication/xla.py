"""Triangle multiplication by XLA: what a CPU runs. Three arrays of F channels a pair at most, and chunks of rows.

a, b and t are channel-major, `[F,N,N]`, so that the product over k is one matrix product a channel, and loops over rows
go from and to z without another array of that size. The backward pass makes them again, puts dt in t's place, da and db
in a's and b's, and recomputes the gated projections when it needs them a second time.

Letters: N tokens, R rows of a chunk, P = R * N pairs of it, C channels of z, F hidden channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import vary_alike
from pallas_kernels.triangle_multiplication.reference import Affine, Weights

_PAIRS = 1024  # of a chunk: what its arrays take stays within a CPU's cache
_CHANNELS = 8  # whose products are taken at a time


def forward(
    z: Float[Array, "b n n c"], mask: Bool[Array, "b n n"] | None, weights: Weights, *, direction: str, eps: float
) -> Float[Array, "b n n c"]:
    """The multiplication; a, b and t are stored in z's dtype."""
    cast = weights.cast(z.dtype)

    def one(z, mask):
        t = _triangles_in_place(*_project(z, mask, cast, eps), direction)

        def step(rows, out):
            x, u = _normalise(rows.of(z), cast.ln_in, 1, eps), _normalise(rows.of_channels(t), cast.ln_out, 0, eps)
            gate = jax.nn.sigmoid(_dot(x.value, cast.w_out_gate, 1, 0))
            return rows.put(out, gate * _dot(u.value, cast.w_out, 0, 0))

        return _over_rows(step, z, jnp.zeros_like(z))

    return _map(lambda _, args: (None, one(*args)), None, (z, mask))[1]


def backward(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None,
    weights: Weights,
    d_out: Float[Array, "b n n c"],
    *,
    direction: str,
    eps: float,
) -> tuple[Float[Array, "b n n c"], Weights]:
    """Gradients of z and of the weights; those of a, b and t are stored in z's dtype."""
    cast = weights.cast(z.dtype)
    wide = jnp.promote_types(z.dtype, jnp.float32)

    def one(sums, args):
        z, mask, d_out = args
        a, b = _project(z, mask, cast, eps)
        t = _triangles(a, b, direction)

        def output(first, t, carry):
            d_x, sums = carry
            rows = _Rows(first, t.shape[1])
            t = t.reshape(t.shape[0], -1)
            x, u = _normalise(rows.of(z), cast.ln_in, 1, eps), _normalise(t, cast.ln_out, 0, eps)
            gate = jax.nn.sigmoid(_dot(x.value, cast.w_out_gate, 1, 0))
            d_y = rows.of(d_out).astype(wide) * gate
            d_gate = (_dot(u.value, cast.w_out, 0, 0) * d_y * (1 - gate)).astype(z.dtype)
            d_y = d_y.astype(z.dtype)
            d_t, d_ln_out = _normalise_gradient(_dot(cast.w_out, d_y, 1, 1), u, cast.ln_out, 0)
            parts = {"w_out": _dot(u.value, d_y, 1, 0), "w_out_gate": _dot(x.value, d_gate, 0, 0), "ln_out": d_ln_out}
            d_x = rows.put(d_x, _dot(d_gate, cast.w_out_gate, 1, 1))
            return d_t.reshape(-1, rows.count, z.shape[1]), (d_x, _add(sums, parts))

        size = _divisor(z.shape[0], _PAIRS // z.shape[0])
        d_t, (d_x, sums) = _in_place(output, 1, size, t, (jnp.zeros_like(z), sums))
        d_halves = _triangles_gradient(d_t, a, b, direction)

        def projection(rows, carry):
            dz, sums = carry
            x = _normalise(rows.of(z), cast.ln_in, 1, eps)
            d_x, parts = rows.of(dz).astype(wide), {"w_proj": [], "w_gate": []}
            keep = None if mask is None else rows.of(mask)
            for d_half, w_proj, w_gate in zip(d_halves, *_halves(cast)):
                gate = jax.nn.sigmoid(_dot(w_gate, x.value, 0, 1))
                d_pair = rows.of_channels(d_half).astype(wide)
                d_proj = (d_pair if keep is None else jnp.where(keep, d_pair, 0)) * gate
                d_gate = (d_proj * _dot(w_proj, x.value, 0, 1) * (1 - gate)).astype(z.dtype)
                d_proj = d_proj.astype(z.dtype)
                d_x += _dot(d_proj, w_proj, 0, 1) + _dot(d_gate, w_gate, 0, 1)
                parts["w_proj"].append(_dot(x.value, d_proj, 0, 1))
                parts["w_gate"].append(_dot(x.value, d_gate, 0, 1))
            dz_rows, d_ln_in = _normalise_gradient(d_x, x, cast.ln_in, 1)
            parts = {name: jnp.concatenate(halves, axis=1) for name, halves in parts.items()}
            return rows.put(dz, dz_rows), _add(sums, parts | {"ln_in": d_ln_in})

        dz, sums = _over_rows(projection, z, (d_x, sums))
        return sums, dz

    start = jax.tree.map(lambda w: vary_alike(jnp.zeros(w.shape, wide), z)[0], weights)
    sums, dz = _map(one, start, (z, mask, d_out))
    return dz, jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights)


def _map(step: Callable[..., Any], carry: Any, args: Any) -> Any:
    """`lax.scan` over the batch; a batch of one is no loop."""
    if args[0].shape[0] > 1:
        return lax.scan(step, carry, args)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], args))
    return carry, out[None]


class _Rows(NamedTuple):
    """Some rows of the pairs."""

    first: Any
    count: int

    def of(self, x: Array) -> Array:
        """[N,N,...] -> [P,...]."""
        part = lax.dynamic_slice_in_dim(x, self.first, self.count, 0)
        return part.reshape(-1, *x.shape[2:])

    def of_channels(self, x: Array) -> Array:
        """[F,N,N] -> [F,P]."""
        return lax.dynamic_slice_in_dim(x, self.first, self.count, 1).reshape(x.shape[0], -1)

    def put(self, x: Array, part: Array) -> Array:
        """Writes what `of` would read."""
        part = part.reshape(self.count, *x.shape[1:]).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, part, self.first, 0)

    def put_channels(self, x: Array, part: Array) -> Array:
        """Writes what `of_channels` would read."""
        part = part.reshape(x.shape[0], self.count, -1).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, part, self.first, 1)


def _over_rows(step: Callable[[_Rows, Any], Any], z: Float[Array, "n n c"], carry: Any) -> Any:
    """Chunk after chunk of rows."""
    n = z.shape[0]
    count = _divisor(n, _PAIRS // n)
    return lax.fori_loop(0, n // count, lambda i, carry: step(_Rows(i * count, count), carry), carry)


def _divisor(total: int, limit: int) -> int:
    """The largest divisor within a limit: chunks without a rest."""
    return next(size for size in range(max(1, min(total, limit)), 0, -1) if total % size == 0)


def _in_place(
    step: Callable[[Any, Array, Any], tuple[Any, Any]], axis: int, size: int, whole: Any, carry: Any
) -> tuple[Any, Any]:
    """Replaces arrays chunk by chunk: `step(first, chunks, carry)` gives what takes the chunks' place, and the carry.

    A chunk is written at the start of the next turn, before anything is read: what is read from an array after it was
    written is in no conflict with that, whereas XLA copies the whole array where a read has no fixed place before a
    write.
    """

    def read(whole, first):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, axis), whole)

    def write(whole, parts, first):
        return jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, axis), whole, parts)

    def turn(i, state):
        whole, parts, carry = state
        whole = write(whole, parts, jnp.maximum(i - 1, 0) * size)
        made, carry = step(i * size, read(whole, i * size), carry)
        return whole, jax.tree.map(lambda part, old: part.astype(old.dtype), made, parts), carry

    turns = jax.tree.leaves(whole)[0].shape[axis] // size
    whole, parts, carry = lax.fori_loop(0, turns, turn, (whole, read(whole, 0), carry))
    return write(whole, parts, (turns - 1) * size), carry


def _project(
    z: Float[Array, "n n c"], mask: Bool[Array, "n n"] | None, weights: Weights, eps: float
) -> tuple[Float[Array, "f n n"], Float[Array, "f n n"]]:
    """Gated, masked projections: a and b."""

    def step(rows, halves):
        x = _normalise(rows.of(z), weights.ln_in, 1, eps).value
        made = []
        for half, w_proj, w_gate in zip(halves, *_halves(weights)):
            pair = jax.nn.sigmoid(_dot(w_gate, x, 0, 1)) * _dot(w_proj, x, 0, 1)
            pair = pair if mask is None else jnp.where(rows.of(mask), pair, 0)
            made.append(rows.put_channels(half, pair))
        return tuple(made)

    empty = vary_alike(jnp.zeros((weights.w_out.shape[0], *z.shape[:2]), z.dtype), z)[0]
    return _over_rows(step, z, (empty, empty))


def _halves(weights: Weights) -> list[list[Array]]:
    """The columns of a, and of b, in w_proj and in w_gate."""
    return [jnp.split(w, 2, axis=1) for w in (weights.w_proj, weights.w_gate)]


def _triangles(a: Array, b: Array, direction: str) -> Float[Array, "f n n"]:
    """The products over k: t."""
    axis = 2 if direction == "outgoing" else 1
    return _products(a, b, axis, axis)


def _triangles_in_place(a: Array, b: Array, direction: str) -> Float[Array, "f n n"]:
    """t, in a's memory."""
    size = _divisor(a.shape[0], _CHANNELS)

    def step(first, a, _):
        return _triangles(a, lax.dynamic_slice_in_dim(b, first, size, 0), direction), None

    return _in_place(step, 0, size, a, None)[0]


def _triangles_gradient(d_t: Array, a: Array, b: Array, direction: str) -> tuple[Array, Array]:
    """Gradients of a and b, in their memory."""
    size = _divisor(d_t.shape[0], _CHANNELS)

    def step(first, halves, _):
        a, b = halves
        part = lax.dynamic_slice_in_dim(d_t, first, size, 0)
        if direction == "outgoing":
            return (_products(part, b, 2, 1), _products(part, a, 1, 1)), None
        return (_products(b, part, 2, 2), _products(a, part, 2, 1)), None

    return _in_place(step, 0, size, (a, b), None)[0]


def _products(left: Array, right: Array, axis_left: int, axis_right: int) -> Array:
    wide = jnp.promote_types(left.dtype, jnp.float32)
    axes = (((axis_left,), (axis_right,)), ((0,), (0,)))
    return lax.dot_general(left, right, axes, preferred_element_type=wide).astype(left.dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product over one axis of each, wide; the other axis of a comes first."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=wide)


class _Normalised(NamedTuple):
    """Before scale and offset, wide; after them, in the dtype of the products; and the reciprocal deviation."""

    hat: Array
    value: Array
    rstd: Array | None


def _normalise(x: Array, affine: Affine | None, axis: int, eps: float) -> _Normalised:
    """Over the channels, which lie along `axis` of two."""
    if affine is None:
        return _Normalised(x, x, None)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=axis, keepdims=True)
    rstd = lax.rsqrt(jnp.mean(jnp.square(centred), axis=axis, keepdims=True) + eps)
    hat = centred * rstd
    scale, offset = (jnp.expand_dims(w, 1 - axis) for w in affine)
    return _Normalised(hat, (hat * scale + offset).astype(x.dtype), rstd)


def _normalise_gradient(
    d_value: Array, normalised: _Normalised, affine: Affine | None, axis: int
) -> tuple[Array, Affine | None]:
    """Gradients of the input, and of scale and offset."""
    hat, _, rstd = normalised
    if affine is None or rstd is None:
        return d_value, None
    d_hat = d_value * jnp.expand_dims(affine[0], 1 - axis)
    mean = functools.partial(jnp.mean, axis=axis, keepdims=True)
    d_affine = jnp.sum(d_value * hat, axis=1 - axis), jnp.sum(d_value, axis=1 - axis)
    return (d_hat - mean(d_hat) - hat * mean(d_hat * hat)) * rstd, d_affine


def _add(sums: Weights, parts: dict[str, Any]) -> Weights:
    """Some of the gradients, added to their sums."""
    return sums._replace(**jax.tree.map(jnp.add, {name: getattr(sums, name) for name in parts}, parts))
