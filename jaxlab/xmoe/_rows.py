"""Stand-in until the kernels land."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import vary_alike


def _take(x, ids):
    return (
        jnp.where((ids < x.shape[0])[..., None], x[jnp.minimum(ids, max(x.shape[0] - 1, 0))], 0)
        if x.shape[0]
        else jnp.zeros((*ids.shape, x.shape[1]), x.dtype)
    )


def token_gather(x, token_ids, inv, num_valid, *, implementation=None):
    x, token_ids, inv, num_valid = vary_alike(x, token_ids, inv, num_valid)
    return _gather(x, token_ids, inv, num_valid)


@jax.custom_vjp
def _gather(x, token_ids, inv, num_valid):
    return jnp.where((jnp.arange(token_ids.shape[0]) < num_valid)[:, None], _take(x, token_ids), 0)


def _gf(x, token_ids, inv, num_valid):
    return _gather(x, token_ids, inv, num_valid), inv


def _gb(inv, dy):
    return sum(_take(dy, inv[:, j]).astype(jnp.float32) for j in range(inv.shape[1])).astype(dy.dtype), None, None, None


_gather.defvjp(_gf, _gb)


def token_combine(y, weights, inv, slots, num_valid, *, implementation=None):
    return _combine(*vary_alike(y, weights, inv, slots, num_valid))


@jax.custom_vjp
def _combine(y, weights, inv, slots, num_valid):
    return sum(_take(y, inv[:, j]).astype(jnp.float32) * weights[:, j, None] for j in range(inv.shape[1])).astype(
        y.dtype
    )


def _cf(*args):
    return _combine(*args), args


def _cb(res, dout):
    y, weights, inv, slots, num_valid = res
    k = inv.shape[1]
    w = _take(weights.reshape(-1, 1), slots)
    dy = (w * _take(dout, slots // k).astype(jnp.float32)).astype(y.dtype)
    dy = jnp.where((jnp.arange(y.shape[0]) < num_valid)[:, None], dy, 0)
    dw = jnp.stack(
        [jnp.sum(_take(y, inv[:, j]).astype(jnp.float32) * dout.astype(jnp.float32), -1) for j in range(k)], 1
    )
    return dy, dw.astype(weights.dtype), None, None, None


_combine.defvjp(_cf, _cb)
