"""Keys and values in pages: who holds which page, which pages can be shared, and the cache that attends over them.

PagedAttention (Kwon et al., 2023, arXiv:2309.06180): a request holds pages of a pool as it grows, so that less than a
page of each is wasted; a table says where its pages lie. Page 0 is scratch: no request holds it.
"""

import collections
import dataclasses
import hashlib
import struct as binary
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.layers.sharding import split_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.paged_attention import paged_attention

ArrayLike = Array | np.ndarray


class BlockAllocator:
    """The pages of a pool, counted by reference. Page 0 is never given out.

    A page can be labelled with what it holds. It keeps the label when nobody holds it any more, and counts as free: it
    can be found and held again until `alloc` takes it for something else, the longest unused first.

    Args:
        num_pages: of the pool, the scratch page included.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages: expected at least 2, one of them scratch, got {num_pages}")
        self._references = [0] * num_pages
        self._free = collections.OrderedDict.fromkeys(range(1, num_pages))
        self._page_of: dict[bytes, int] = {}
        self._label_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def alloc(self, n: int) -> list[int]:
        """Takes n pages, those without a label first.

        Raises:
            MemoryError: fewer are free; none is taken.
        """
        if n > len(self._free):
            raise MemoryError(f"expected at most the {len(self._free)} free pages, got {n}")
        pages = [self._free.popitem(last=False)[0] for _ in range(n)]
        for page in pages:
            self._references[page] = 1
            label = self._label_of.pop(page, None)
            if label is not None:
                del self._page_of[label]
        return pages

    def fork(self, pages: Sequence[int]) -> list[int]:
        """The same pages, each with one holder more.

        Raises:
            ValueError: a page that nobody holds and that has no label.
        """
        for page in pages:
            if not self._references[page] and page not in self._label_of:
                raise ValueError(f"pages: expected pages that are held or labelled, got {page}")
        for page in pages:
            self._free.pop(page, None)
            self._references[page] += 1
        return list(pages)

    def free(self, pages: Sequence[int]) -> None:
        """Takes one holder from each page. Of labelled ones the last is the first to be reused.

        Raises:
            ValueError: a page has fewer holders than that; none is freed.
        """
        for page, times in collections.Counter(pages).items():
            if self._references[page] < times:
                raise ValueError(f"pages: expected pages that are held, got page {page}, freed too often")
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                self._free[page] = None
                if page not in self._label_of:
                    self._free.move_to_end(page, last=False)

    def is_held(self, page: int) -> bool:
        """Whether anybody holds the page."""
        return self._references[page] > 0

    def label(self, page: int, label: bytes) -> None:
        """Says what a held page holds from now on; nothing happens if another page, or this one, says so already."""
        if label not in self._page_of and page not in self._label_of:
            self._page_of[label], self._label_of[page] = page, label

    def find(self, label: bytes) -> int | None:
        """The page with this label."""
        return self._page_of.get(label)

    def forget(self) -> None:
        """Takes every label away."""
        self._page_of.clear()
        self._label_of.clear()


def page_label(before: bytes, tokens: Sequence[int]) -> bytes:
    """The label of a full page: a hash of its tokens and of the label `before` it (empty for the first page)."""
    return hashlib.blake2b(before + binary.pack(f"={len(tokens)}i", *tokens), digest_size=16).digest()


@struct.dataclass
class Packing:
    """Several prompts, or chunks of them, side by side in one row of a `PagedKVCache`.

    The row's table lists the pages of all of them; a slot is a place among the keys that it lists.

    Attributes:
        slots: `[1,T]` where each token is written, -1 where padded.
        segments: `[1,T]` which prompt it belongs to, from 1.
        page_segments: `[1,N]` which prompt each page of the table belongs to, 0 where padded.
        page_lengths: `[1,N]` keys in each page, those of this call included.
    """

    slots: Int[ArrayLike, "1 t"]
    segments: Int[ArrayLike, "1 t"]
    page_segments: Int[ArrayLike, "1 n"]
    page_lengths: Int[ArrayLike, "1 n"]


@struct.dataclass
class PagedKVCache:
    """A `Cache` of B rows whose keys and values lie in pages of a pool.

    Attributes:
        k: `[L,Hkv,P,page,D]`.
        v: as k.
        page_table: `[B,N]`, where the pages of each row lie; entries past a row's pages may be anything.
        packing: tokens of one row that belong to several prompts; None: position p of row b is slot p of the row.
    """

    k: Float[Array, "l hkv p page d"]
    v: Float[Array, "l hkv p page d"]
    page_table: Int[Array, "b n"]
    packing: Packing | None = None

    @classmethod
    def create(
        cls, config: Any, num_pages: int, page_size: int, page_table: Int[ArrayLike, "b n"], dtype: Any = None
    ) -> "PagedKVCache":
        """An empty pool.

        Args:
            config: of the decoder.
            num_pages: P, the scratch page included.
            page_size: tokens in a page.
            page_table: `[B,N]`.
            dtype: of the stored keys and values; None is the compute dtype.
        """
        shape = config.num_hidden_layers, config.num_key_value_heads, num_pages, page_size, config.head_dim
        dtype = jnp.dtype(dtype or config.dtype)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.asarray(page_table))

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
    ) -> tuple[Float[Array, "b t h d"], "PagedKVCache"]:
        """Writes, then attends; see `Cache.attend`. One query a row reads the pages in place."""
        slots = positions if self.packing is None else jnp.asarray(self.packing.slots)
        cache = dataclasses.replace(
            self, k=self._written(self.k, layer, k, slots), v=self._written(self.v, layer, v, slots)
        )
        if q.shape[1] == 1 and window is None and self.packing is None:
            return cache._attend_one(layer, q[:, 0], positions[:, 0] + 1, scale)[:, None], cache
        return cache._attend_many(layer, q, slots, scale, window), cache

    def _written(self, pages: Array, layer: Any, new: Array, slots: Array) -> Array:
        size, count = pages.shape[3], self.page_table.shape[1]
        place = jnp.take_along_axis(self.page_table, jnp.clip(slots // size, 0, count - 1), axis=1)
        place = jnp.where((slots < 0) | (slots >= count * size), pages.shape[2], place)  # past the end: dropped
        return pages.at[layer, :, place, slots % size].set(new.astype(pages.dtype), mode="drop")

    def _attend_one(self, layer: Any, q: Array, lengths: Array, scale: float) -> Array:
        def own_heads(q, k, v, table, lengths, layer):
            return paged_attention(q, k, v, table, lengths, scale=scale, layer=layer)

        layer = jnp.asarray(layer, jnp.int32)
        args = q, self.k, self.v, self.page_table, lengths, layer
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape.get("tensor", 1) == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return own_heads(*args)
        # XLA cannot divide a kernel, and would gather the pool.
        heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
        return jax.shard_map(own_heads, in_specs=(heads, heads, heads, whole, whole, whole), out_specs=heads)(*args)

    def _attend_many(self, layer: Any, q: Array, slots: Array, scale: float, window: int | None) -> Array:
        batch, count = self.page_table.shape
        size = self.k.shape[3]
        index = jnp.arange(count * size)
        if self.packing is None:
            valid = index <= jnp.max(slots, axis=1, keepdims=True)
            segments = ()
        else:
            own = jnp.repeat(self.packing.page_segments, size, axis=1)
            valid = index % size < jnp.repeat(self.packing.page_lengths, size, axis=1)
            segments = jnp.asarray(self.packing.segments), jnp.where(valid, own, 0)

        def gathered(pages):
            own = pages[layer, :, self.page_table].transpose(0, 1, 3, 2, 4)
            return own.reshape(batch, count * size, *own.shape[3:]).astype(q.dtype)

        def whole(q, k, v, slots, *segments):
            own, other = segments or (None, None)
            return flash_attention(
                q, k, v, q_positions=slots, segment_ids=own, kv_segment_ids=other, scale=scale, window=window
            )

        # What a page held before may be anything, and a weight of 0 times a NaN is a NaN.
        values = jnp.where(valid[..., None, None], gathered(self.v), 0)
        return split_attention(whole, q, gathered(self.k), values, slots, *segments)


@dataclasses.dataclass
class KVPages:
    """A request between two engines: what it has read and drawn, and its keys and values.

    Attributes:
        prompt: ids.
        generated: ids drawn so far, at least one; the last is not among the keys and values.
        logprobs: of `generated`.
        top_logprobs: of `generated`.
        seed: what it draws with.
        arrival: when it was added, by the clock of `time.monotonic`.
        k: `[L,Hkv,n,page,D]`, on a device or the host; pages past those of the tokens are padding.
        v: as k.
    """

    prompt: list[int]
    generated: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    seed: int
    arrival: float
    k: Any
    v: Any

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are here."""
        return len(self.prompt) + len(self.generated) - 1

    def to_host(self) -> "KVPages":
        """The same with k and v in the host's memory, without padding."""
        count = -(-self.tokens // self.k.shape[3])
        k, v = (np.asarray(array)[:, :, :count] for array in jax.device_get((self.k, self.v)))
        return dataclasses.replace(self, k=k, v=v)
