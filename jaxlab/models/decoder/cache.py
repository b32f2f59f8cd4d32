"""The cache protocol of the decoder, and the contiguous cache."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.layers.sharding import split_attention
from jaxlab.models.decoder.config import DecoderConfig
from pallas_kernels.flash_attention import flash_attention


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

    Make it with `create`; the layout of the arrays is private: `[L,B,Hkv,S,Dh]`, or a tuple of L `[B,Hkv,S,Dh]`.
    """

    k: Any
    v: Any

    @classmethod
    def create(
        cls, config: DecoderConfig, batch: int, length: int, dtype: Any = None, *, by_layer: bool = False
    ) -> "KVCache":
        """An empty cache.

        Args:
            config: of the decoder.
            batch: rows B.
            length: positions S a row can hold.
            dtype: of the stored keys and values; None is the compute dtype.
            by_layer: one array a layer, for layers that are not scanned (`config.scan=False`, or parameters laid out
                by layer): a CPU then attends in place, where it would first copy a layer out of the stacked array.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"batch and length: expected at least 1, got {batch} and {length}")
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        dtype, layers = jnp.dtype(dtype or config.dtype), config.num_hidden_layers

        def empty() -> Any:
            if by_layer:
                return tuple(jnp.zeros(shape, dtype) for _ in range(layers))
            return jnp.zeros((layers, *shape), dtype)

        return cls(empty(), empty())

    @property
    def length(self) -> int:
        """Positions a row can hold."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def take(self, rows: Int[Array, " r"]) -> "KVCache":
        """The cache whose row i is row `rows[i]` of this one: the samples of one prompt start from it."""
        axis = 0 if isinstance(self.k, tuple) else 1
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis), self)

    def split(self) -> "KVCache":
        """The same cache as `create(by_layer=True)` lays it out."""
        return KVCache(tuple(self.k), tuple(self.v))

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
        keys, values, cache = self.write(layer, k, v, positions)
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        attend = _attend_few if q.shape[1] <= _FEW else _attend_many
        return attend(q, keys, values, positions, scale, window), cache

    def write(
        self, layer: Any, k: Float[Array, "b t hkv d"], v: Float[Array, "b t hkv d"], slots: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b hkv s d"], Float[Array, "b hkv s d"], "KVCache"]:
        """Puts k and v of `layer` into their slots, none where negative; gives that layer's keys and values."""
        slots = jnp.where(slots < 0, self.length, slots)  # past the end: dropped
        all_k, keys = _write(self.k, layer, k, slots)
        all_v, values = _write(self.v, layer, v, slots)
        return keys, values, KVCache(all_k, all_v)

    def read(self, layer: Any) -> tuple[Float[Array, "b hkv s d"], Float[Array, "b hkv s d"]]:
        """Keys and values of `layer`."""
        return _layer(self.k, layer), _layer(self.v, layer)


_FEW = 8  # up to this many queries a row, their logits over the whole cache are smaller than the cache


def _write(arrays: Any, layer: Any, new: Array, slots: Array) -> tuple[Any, Array]:
    """Puts `new` `[B,T,Hkv,Dh]` into its slots; returns all layers, and this one `[B,Hkv,S,Dh]`."""
    rows = jnp.arange(new.shape[0])[:, None]
    if not isinstance(arrays, tuple):
        arrays = arrays.at[layer, rows, :, slots].set(new.astype(arrays.dtype), mode="drop")
        return arrays, _layer(arrays, layer)
    own = _layer(arrays, layer)
    own = own.at[rows, :, slots].set(new.astype(own.dtype), mode="drop")
    return (*arrays[:layer], own, *arrays[layer + 1 :]), own


def _layer(arrays: Any, layer: Any) -> Array:
    if not isinstance(arrays, tuple):
        return jax.lax.dynamic_index_in_dim(arrays, layer, keepdims=False)
    if not isinstance(layer, int):
        raise TypeError("a KVCache made with by_layer=True needs layers that are not scanned, got a traced layer")
    return arrays[layer]


def _attend_few(q: Array, keys: Array, values: Array, positions: Array, scale: float, window: int | None) -> Array:
    """A few queries, as in decoding: logits over every slot."""
    batch, length, _, dim = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, keys.shape[1], -1, dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, keys.shape[1], -1, dim)
    logits = jnp.einsum("bkmd,bksd->bkms", rows, keys, preferred_element_type=wide) * scale
    columns = jnp.arange(keys.shape[2])
    visible = columns <= positions[..., None]
    if window is not None:
        visible &= columns > positions[..., None] - window
    logits = logits.reshape(*grouped.shape[:4], -1)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -1e30), axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, keys.shape[1], -1, keys.shape[2])
    out = jnp.einsum("bkms,bksd->bkmd", weights, values, preferred_element_type=wide).astype(q.dtype)
    return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _attend_many(q: Array, keys: Array, values: Array, positions: Array, scale: float, window: int | None) -> Array:
    """A prompt or a piece of one: no logits over the whole cache."""

    def whole(q, keys, values, positions):
        return flash_attention(q, keys, values, q_positions=positions, scale=scale, window=window)

    return split_attention(whole, q, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), positions)
