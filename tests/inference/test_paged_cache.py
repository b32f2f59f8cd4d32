"""The cache over pages beside the contiguous one: rows, packed prompts, windows, heads over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import make_mesh
from jaxlab.inference import PagedKVCache
from jaxlab.inference.paged import Packing
from jaxlab.models.decoder import Cache, KVCache
from tests.inference.multiprocess_cases import CONFIG

SIZE, PAGES = 4, 12
TABLE = np.array([[5, 3, 9, 0], [2, 7, 0, 0]], np.int32)
BEFORE = np.array([[*range(9)], [*range(6), -1, -1, -1]], np.int32)
SCALE = CONFIG.head_dim**-0.5


def qkv(key, batch, length):
    heads = (CONFIG.num_attention_heads, *[CONFIG.num_key_value_heads] * 2)
    keys = jax.random.split(jax.random.key(key), 3)
    return [jax.random.normal(key, (batch, length, count, CONFIG.head_dim)) for key, count in zip(keys, heads)]


def attended(cache, layer, args, positions, window=None):
    return cache.attend(layer, *args, jnp.asarray(positions), scale=SCALE, window=window)


@functools.cache
def contiguous():
    """What stands before, in an ordinary cache."""
    return attended(KVCache.create(CONFIG, 2, 16), 1, qkv(0, 2, 9), BEFORE)


@functools.cache
def paged():
    """The same in pages whose other contents are NaN."""
    empty = PagedKVCache.create(CONFIG, PAGES, SIZE, TABLE)
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, (empty.k, empty.v))
    return attended(PagedKVCache(*poisoned, jnp.asarray(TABLE)), 1, qkv(0, 2, 9), BEFORE)


@pytest.mark.latest
@pytest.mark.parametrize(("length", "window"), [(1, None), (1, 3), (2, None), (2, 3)])
def test_rows_see_what_they_see_in_an_ordinary_cache(length, window):
    """One token more a row, or two, of which the second row has only one."""
    assert isinstance(paged()[1], Cache)
    positions = np.array([[9, 10], [6, -1]], np.int32)[:, :length]
    args, valid = qkv(1, 2, length), positions >= 0
    expected, _ = attended(contiguous()[1], 1, args, positions, window)
    found, cache = attended(paged()[1], 1, args, positions, window)
    np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(expected)[valid], atol=2e-6)
    np.testing.assert_allclose(paged()[0][BEFORE >= 0], contiguous()[0][BEFORE >= 0], atol=2e-6)
    # Only the row's own slots of the layer were written.
    assert np.isnan(np.asarray(cache.k)[0]).all()
    written = np.argwhere(~np.isnan(np.asarray(cache.k)[1, 0, :, :, 0])).tolist()
    slots = [(0, slot) for slot in range(10 if length == 1 else 11)] + [(1, slot) for slot in range(7)]
    assert written == sorted([int(TABLE[row, slot // SIZE]), slot % SIZE] for row, slot in slots)


def test_a_row_that_is_none_writes_nothing():
    found, cache = attended(paged()[1], 1, qkv(1, 2, 1), [[-1], [6]])
    expected, _ = attended(contiguous()[1], 1, qkv(1, 2, 1), [[-1], [6]])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-6)
    np.testing.assert_array_equal(cache.k[:, :, [0, 5, 3, 9]], paged()[1].k[:, :, [0, 5, 3, 9]])


def test_packed_chunks_go_on_with_their_rows():
    """Two tokens of the first prompt and one of the second, side by side, over the pages of both."""
    packing = Packing(
        slots=jnp.asarray([[9, 10, 12 + 6, -1]]),
        segments=jnp.asarray([[1, 1, 2, 0]]),
        page_segments=jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0]]),
        page_lengths=jnp.asarray([[4, 4, 3, 4, 3, 0, 0, 0]]),
    )
    table = jnp.asarray([[5, 3, 9, 2, 7, 0, 0, 0]])
    rows = qkv(1, 2, 2)
    packed = [jnp.concatenate([x[:1], x[1:, :1], jnp.full_like(x[:1, :1], jnp.nan)], axis=1) for x in rows]
    for window in (None, 3):
        expected, _ = attended(contiguous()[1], 1, rows, [[9, 10], [6, -1]], window)
        held = paged()[1]
        found, cache = attended(PagedKVCache(held.k, held.v, table, packing), 1, packed, [[9, 10, 6, -1]], window)
        np.testing.assert_allclose(found[0, :2], expected[0], atol=2e-6)
        np.testing.assert_allclose(found[0, 2], expected[1, 0], atol=2e-6)
        assert np.isnan(np.asarray(cache.k)[:, :, 0]).all()


def test_heads_lie_over_a_mesh():
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    args = qkv(1, 2, 1)
    expected, _ = attended(paged()[1], 1, args, [[9], [6]])
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "tensor"))
        held = paged()[1]
        cache = PagedKVCache(*jax.device_put((held.k, held.v), place), held.page_table)
        found, cache = jax.jit(lambda cache: attended(cache, 1, args, [[9], [6]]))(cache)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert cache.k.sharding.is_equivalent_to(place, 5)
