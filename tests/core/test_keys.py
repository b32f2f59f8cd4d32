import jax
import numpy as np
import pytest

from jaxlab.core import named_key


@pytest.mark.latest
def test_the_same_everywhere():
    # Fixed by hand: a key may not change with the process, the Python version or the JAX version.
    data = jax.random.key_data(named_key(jax.random.key(0, impl="threefry2x32"), "dropout"))
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0x3AB8AFE7))
    np.testing.assert_array_equal(data, expected)


def test_names_and_keys_matter():
    keys = [named_key(jax.random.key(seed), name) for seed in (0, 1) for name in ("a", "b", "", "ä")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 8


def test_raw_keys_and_jit():
    raw = named_key(jax.random.PRNGKey(3), "x")
    np.testing.assert_array_equal(
        raw, jax.random.key_data(jax.jit(named_key, static_argnums=1)(jax.random.key(3), "x"))
    )


def test_a_name_is_text(unchecked):
    with pytest.raises(TypeError, match="name: expected a str, got 3"):
        named_key(jax.random.key(0), 3)
