"""A cache for several samples of each prompt: the prompt's keys and values are held, and read, once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.models.decoder import KVCache
from pallas_kernels.shared_prefix_attention import shared_prefix_attention


@struct.dataclass
class SharedPrefixCache:
    """A `Cache` of B * N rows, the N samples of a prompt adjacent: B prompts and what N samples of each add to them.

    Slots are positions as in any cache: those below a prompt's length are its own, the next ones each sample's.

    Attributes:
        prefix: cache of the B prompts, no longer written.
        lengths: `[B]` tokens of each prompt.
        suffix: cache of B * N rows, whose slot 0 is the position after the prompt.
    """

    prefix: KVCache
    lengths: Int[Array, " b"]
    suffix: KVCache

    @classmethod
    def create(
        cls, config: Any, prefix: KVCache, lengths: Int[Array, " b"], samples: int, length: int
    ) -> "SharedPrefixCache":
        """Samples of prompts that `prefill` has written.

        Args:
            config: of the decoder.
            prefix: the prompts.
            lengths: `[B]` their tokens.
            samples: N, of each.
            length: positions that a sample can add.

        Raises:
            NotImplementedError: layers with sliding windows, which may begin inside the prompt.
        """
        if config.windows is not None:
            raise NotImplementedError("shared prefix: expected layers that see the whole prompt, got sliding windows")
        by_layer = isinstance(prefix.k, tuple)
        dtype = jax.tree.leaves(prefix.k)[0].dtype
        suffix = KVCache.create(config, lengths.shape[0] * samples, length, dtype, by_layer=by_layer)
        return cls(prefix, lengths, suffix)

    def split(self) -> "SharedPrefixCache":
        """The same cache, one array a layer."""
        return SharedPrefixCache(self.prefix.split(), self.lengths, self.suffix.split())

    def attend(
        self,
        layer: Any,
        q: Float[Array, "r t h d"],
        k: Float[Array, "r t hkv d"],
        v: Float[Array, "r t hkv d"],
        positions: Int[Array, "r t"],
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Float[Array, "r t h d"], "SharedPrefixCache"]:
        """Writes, then attends; see `Cache.attend`."""
        if window is not None:
            raise NotImplementedError("shared prefix: expected no window, got one")
        prompts = self.lengths.shape[0]

        def by_prompt(x):
            return x.reshape(prompts, -1, *x.shape[1:])

        slots = by_prompt(positions) - self.lengths[:, None, None]
        slots = jnp.where(by_prompt(positions) < 0, -1, slots)
        keys, values, suffix = self.suffix.write(layer, k, v, slots.reshape(positions.shape))
        # As `shared_prefix_attention` has them, tokens before heads; it undoes the transposition without a copy.
        prefix_k, prefix_v = (x.transpose(0, 2, 1, 3).astype(q.dtype) for x in self.prefix.read(layer))
        own_k, own_v = (by_prompt(x).transpose(0, 1, 3, 2, 4).astype(q.dtype) for x in (keys, values))

        def attend(q, visible):
            return shared_prefix_attention(q, prefix_k, prefix_v, self.lengths, own_k, own_v, visible, scale=scale)

        queries, visible = by_prompt(q), slots + 1
        if q.shape[1] == 1:
            out = attend(queries[:, :, 0], visible[:, :, 0])[:, :, None]
        else:
            out = jax.vmap(attend, in_axes=2, out_axes=2)(queries, visible)
        return out.reshape(q.shape), SharedPrefixCache(self.prefix, self.lengths, suffix)
