"""Rows of tensor-parallel ranks; the whole layer with them is among the modes of test_expert_parallel.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.xmoe import sequence_shard, sequence_unshard

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
MIX = np.random.default_rng(2).normal(size=(16, 3)).astype(np.float32)


def block(x, kernel):
    """Before and after the block x is used whole, so that gradients of both kinds of use meet."""
    return jnp.tanh(x @ kernel) * x


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_values_and_gradients_of_one_rank(check_vma):
    """Two rows of tokens, four ranks each: the gradient of the replicated kernel is a sum over ranks, no multiple."""
    tokens = PartitionSpec("expert")

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh({"expert": 2, "tensor": 4}),
        in_specs=(tokens, PartitionSpec()),
        out_specs=tokens,
        check_vma=check_vma,
    )
    def sharded(x, kernel):
        part = sequence_shard(2 * x, "tensor")
        assert part.shape == (2, 3)
        return sequence_unshard(block(part, kernel), "tensor") + x

    def whole(x, kernel):
        return block(2 * x, kernel) + x

    def run(form):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(form(*args) * MIX), argnums=(0, 1)))(X, KERNEL)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), run(sharded), run(whole))


def test_rows_of_each_rank():
    mesh = make_mesh({"tensor": 8})
    spec = PartitionSpec("tensor")
    shard = jax.shard_map(lambda x: sequence_shard(x, "tensor"), mesh=mesh, in_specs=PartitionSpec(), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(shard)(X), X)
    # Unvarying: the result may leave as replicated.
    unshard = jax.shard_map(
        lambda y: sequence_unshard(y, "tensor"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
    )
    np.testing.assert_array_equal(jax.jit(unshard)(X), X)


def test_bad_inputs(unchecked):
    mesh = make_mesh({"tensor": 8})
    specs = {"mesh": mesh, "in_specs": PartitionSpec(), "out_specs": PartitionSpec("tensor")}

    def shard(x, axis="tensor"):
        return jax.eval_shape(jax.shard_map(lambda x: sequence_shard(x, axis), **specs), x)

    with pytest.raises(ValueError, match="tokens must be a multiple of the size of 'tensor', got 12 tokens over 8"):
        shard(np.ones((12, 3)))
    with pytest.raises(ValueError, match=r"axis \('data',\) is not bound"):
        shard(X, "data")
    with pytest.raises(ValueError, match=r"x must be \[S, H\], got shape \(16,\)"):
        shard(np.ones(16))
    with pytest.raises(ValueError, match=r"axis \('tensor',\) is not bound"):
        sequence_unshard(X, "tensor")
