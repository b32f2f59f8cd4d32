"""The two steps of decoding, for any cache: `prefill` a prompt, then `decode_step` token by token.

Both are jitted over the model (hashable) and inline into a caller's jit; `generate` and the serving engine are loops
around them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.inference.params import SamplingArrays
from jaxlab.inference.sampling import sample


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    model: Any,
    params: Any,
    cache: Any,
    tokens: Int[Array, "b t"] | None,
    positions: Int[Array, "b t"],
    *,
    embeddings: Float[Array, "b t d"] | None = None,
    rope_positions: Int[Array, "3 b t"] | None = None,
    columns: Int[Array, "b r"] | None = None,
) -> tuple[Float[Array, "b *r v"], Any]:
    """Writes prompts, or chunks of prompts, into the cache.

    Args:
        model: a `Decoder`, or anything called alike.
        params: its parameters, also in the form of `decode_params`.
        cache: any `Cache` of the decoder; a later chunk goes on with the cache of the one before.
        tokens: `[B,T]`, padded on the right.
        positions: `[B,T]`, the cache slot of each token, -1 where padded.
        embeddings: `[B,T,D]` instead of tokens (which are then ignored).
        rope_positions: `[3,B,T]` M-RoPE positions; None uses `positions`.
        columns: `[B,R]`, the tokens whose logits are wanted; None is the last of each row.

    Returns:
        logits float32, `[B,V]` at each row's last valid token (undefined for a row without one), or `[B,R,V]` at
        `columns`; and the cache.
    """
    variables = {"params": params}
    tokens = None if embeddings is not None else tokens
    out = model.apply(variables, tokens, positions, cache=cache, embeddings=embeddings, rope_positions=rope_positions)
    if columns is None:
        last = jnp.max(jnp.where(positions >= 0, jnp.arange(positions.shape[1]), 0), axis=1)
        hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    else:
        hidden = jnp.take_along_axis(out.hidden, columns[..., None], axis=1)
    return model.apply(variables, hidden, method="unembed"), out.cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="return_logits")
def decode_step(
    model: Any,
    params: Any,
    cache: Any,
    ids: Int[Array, " b"],
    positions: Int[Array, " b"],
    keys: Array,
    sampling: SamplingArrays,
    *,
    rope_positions: Int[Array, "3 b"] | None = None,
    return_logits: bool = False,
) -> tuple[Any, ...]:
    """Writes one token of each row into the cache and draws the next.

    Args:
        model: as in `prefill`.
        params: as in `prefill`.
        cache: any `Cache`.
        ids: `[B]` the tokens to write.
        positions: `[B]` their cache slots; -1 writes nothing.
        keys: `[B]` keys for this draw, used as they are by `sample`. `generate` takes
            `fold_in(row key, positions + 1)`, the position of the token that is drawn.
        sampling: parameters of the rows.
        rope_positions: `[3,B]` M-RoPE positions; None uses `positions`.
        return_logits: also return the logits.

    Returns:
        ids `[B]` int32, logps `[B]` float32 and the cache, then logits `[B,V]` float32 if asked.
    """
    if rope_positions is not None:
        rope_positions = rope_positions[..., None]
    logits, cache = next_logits(model, params, cache, ids, positions, rope_positions)
    ids, logps = sample(logits, keys, sampling)
    return (ids, logps, cache, logits) if return_logits else (ids, logps, cache)


def next_logits(
    model: Any, params: Any, cache: Any, ids: Array, positions: Array, rope_positions: Array | None = None
) -> tuple[Float[Array, "b v"], Any]:
    """The first half of `decode_step`: writes the tokens, gives the logits of the next ones."""
    out = model.apply({"params": params}, ids[:, None], positions[:, None], cache=cache, rope_positions=rope_positions)
    return out.logits[:, 0], out.cache
