import threading

import jax
import jax.numpy as jnp
import pytest

from jaxlab.core import count_compilations


@pytest.mark.latest
def test_counts_new_programs_only():
    f = jax.jit(lambda x: x * 3 + 1)
    small, large = jnp.ones(5), jnp.ones(6)
    with count_compilations() as outer:
        f(small)
        assert outer.count == 1
        f(small + 0)  # the addition is a program of its own
        with count_compilations() as inner:
            f(small)
            assert inner.count == 0
            f(large)
        f(large)
    assert (inner.count, outer.count) == (1, 3)
    jax.jit(lambda x: x - 7)(small)
    assert outer.count == 3
    assert isinstance(outer.count, int)


def test_a_hit_in_the_persistent_cache_counts(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        x = jnp.ones(3)
        with count_compilations() as counter:
            jax.jit(lambda x: jnp.sin(x) * 1.25)(x)
            assert any(tmp_path.iterdir())
            jax.jit(lambda x: jnp.sin(x) * 1.25)(x)
        assert counter.count == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()


def test_other_threads_and_errors():
    with count_compilations() as counter:
        thread = threading.Thread(target=lambda: jax.jit(lambda x: x / 5)(2.0))
        thread.start()
        thread.join()
    assert counter.count == 1
    with pytest.raises(KeyError), count_compilations() as counter:
        raise KeyError
    jax.jit(lambda x: x / 6)(2.0)
    assert counter.count == 0
