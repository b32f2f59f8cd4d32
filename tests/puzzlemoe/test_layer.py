import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.puzzlemoe import apply_moe_layer
from jaxlab.puzzlemoe.layer import expert_outputs, route_rows
from tests.oracles import puzzlemoe as oracle
from tests.puzzlemoe.conftest import D, K, N


@pytest.mark.parametrize("renormalise", [True, False])
def test_against_the_oracle(layer, x, renormalise):
    layer = dataclasses.replace(layer, norm_topk_prob=renormalise)
    got = apply_moe_layer(layer, x)
    arrays = (layer.router, layer.gate, layer.up, layer.down)
    for batch, output in zip(x, got):
        want, ids, _ = oracle.layer(*arrays, K, renormalise, batch)
        np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-5)
        assert np.asarray(route_rows(layer, batch)[0]).tolist() == ids.tolist()
    outputs = expert_outputs(x[0], layer.gate, layer.up, layer.down, "silu")
    alone = oracle.layer(np.zeros((D, 1)), layer.gate[2:3], layer.up[2:3], layer.down[2:3], 1, True, x[0])[0]
    np.testing.assert_allclose(outputs[2], alone, rtol=1e-4, atol=1e-5)


def test_shapes_and_dtypes(layer, x):
    assert apply_moe_layer(layer, x[:, :0]).shape == (2, 0, D)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    got = apply_moe_layer(half, x[0].astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), apply_moe_layer(layer, x[0]), rtol=0.1, atol=0.15)
    assert layer.num_experts == N


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments(layer, x):
    with pytest.raises(ValueError, match=f"x must end in d={D}"):
        apply_moe_layer(layer, x[..., 1:])
    with pytest.raises(ValueError, match="unknown act"):
        apply_moe_layer(dataclasses.replace(layer, act="relu"), x)
