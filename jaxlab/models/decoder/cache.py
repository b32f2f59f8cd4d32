"""The cache protocol of the decoder, and the contiguous cache."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.models.decoder.config import DecoderConfig


@runtime_checkable
class Cache(Protocol):
    """Keys and values of every layer: a pytree that the layers hand on.

    The slot of a key is its position. Paged and shared-prefix caches implement this one method.
    """

    def attend(
        self,
        layer: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        positions: Int[Array, "b t"],
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Float[Array, "b t h d"], Any]:
        """Writes k and v of `layer` (an int, or traced) at `positions`, then lets q see slots 0..position.

        A position of -1 writes nothing, and what comes out there is undefined. A `window` w leaves slots
        position-w+1..position.
        """
        ...


@struct.dataclass
class KVCache:
    """The contiguous cache: room for `length` positions of every row.

    Make it with `create`; the layout of the arrays is private.
    """

    k: Float[Array, "layers b length hkv d"]
    v: Float[Array, "layers b length hkv d"]

    @classmethod
    def create(cls, config: DecoderConfig, batch: int, length: int, dtype: Any = None) -> "KVCache":
        """An empty cache.

        Args:
            config: of the decoder.
            batch: rows B.
            length: positions a row can hold.
            dtype: of the stored keys and values; None is the compute dtype.
        """
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(dtype or config.dtype))
        return cls(zeros, jnp.copy(zeros))

    @property
    def length(self) -> int:
        """Positions a row can hold."""
        return self.k.shape[2]

    def take(self, rows: Int[Array, " r"]) -> "KVCache":
        """The cache whose row i is row `rows[i]` of this one: the samples of one prompt start from it."""
        return KVCache(self.k[:, rows], self.v[:, rows])

    def attend(
        self,
        layer: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        positions: Int[Array, "b t"],
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Float[Array, "b t h d"], "KVCache"]:
        """Writes, then attends; see `Cache.attend`."""
        batch, length, heads, dim = q.shape
        slots = jnp.where(positions < 0, self.length, positions)
        rows = jnp.arange(batch)[:, None]
        cache = KVCache(
            self.k.at[layer, rows, slots].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[layer, rows, slots].set(v.astype(self.v.dtype), mode="drop"),
        )
        keys = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False).astype(q.dtype)
        values = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False).astype(q.dtype)
        grouped = q.reshape(batch, length, keys.shape[2], -1, dim)
        logits = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * scale
        columns = jnp.arange(self.length)
        mask = columns <= positions[..., None]
        if window is not None:
            mask &= columns > positions[..., None] - window
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30), axis=-1).astype(q.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, values, preferred_element_type=jnp.float32)
        return out.reshape(batch, length, heads, dim).astype(q.dtype), cache
