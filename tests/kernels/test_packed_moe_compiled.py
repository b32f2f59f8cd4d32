"""Grouped matmul over packed experts as compiled: memory on a CPU, kernels for GPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.packed_moe_matmul import packed_moe_matmul
from tests.aot import needs_aot, needs_ptxas


@pytest.mark.parametrize("rows", [2, 256])
def test_never_holds_more_than_a_decoded_matrix_and_a_half(rows):
    # The specification's shape; one decoded matrix counted in bfloat16. All eight experts would be sixteen times that.
    k, n = 1024, 3584
    array = jax.ShapeDtypeStruct
    places = [array((8,), jnp.int32)] * 3
    args = array((rows, k), jnp.bfloat16), array((4, k, n), jnp.uint16), *places
    compiled = jax.jit(packed_moe_matmul).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * 2 * k * n


def _shapes(m=4096, k=512, n=256, experts=8):
    array, places = jax.ShapeDtypeStruct, [jax.ShapeDtypeStruct((experts,), jnp.int32)] * 3
    words, dense = array((3, k, n), jnp.uint16), array((2, k, n), jnp.bfloat16)
    return array((m, k), jnp.bfloat16), words, words, dense, dense, *places


def _hidden(x, words, up, dense, dense_up, sizes, slots, members):
    more = {"words_up": up, "dense": dense, "dense_up": dense_up, "act": "silu"}
    return packed_moe_matmul(x, words, sizes, slots, members, **more)


def _both_products(x, words, up, dense, dense_up, sizes, slots, members):
    plain = packed_moe_matmul(x, words, sizes, slots, members, dense=dense)
    return plain, _hidden(x, words, up, dense, dense_up, sizes, slots, members)


def _gradient(x, words, up, dense, dense_up, sizes, slots, members):
    cotangent = jnp.ones((x.shape[0], words.shape[2]), x.dtype) * x[0, 0]
    return jax.vjp(lambda x: packed_moe_matmul(x, words, sizes, slots, members, dense=dense), x)[1](cotangent)


@functools.cache
def _kernels(gpu):
    from jaxlab.core import plan

    found = {}
    for program, rows in ((_both_products, 4096), (_gradient, 4096), (_both_products, 8)):
        args = _shapes(rows)
        compiled = plan.compile(program, *args, target=plan.target(gpu), labels=["input"] * len(args))
        # The gradient's program makes its own cotangent.
        assert compiled.bytes["temporaries"] <= (2 * rows * 256 + 2**10 if program is _gradient else 0)
        found |= {kernel.name: kernel for kernel in compiled.kernels}
    return found


@needs_aot
@pytest.mark.latest
def test_compiled_for_h100_without_temporaries():
    kernels = _kernels("h100")
    tiled = {"packed_gmm", "packed_gated_gmm", "packed_gmm_transposed"}
    assert set(kernels) == tiled | {"packed_gemv", "packed_gated_gemv"}
    for name in tiled:
        instructions = kernels[name].ptx_instructions
        assert kernels[name].tensor_core
        assert any(op.startswith("wgmma") for op in instructions), name
        # Words and rows arrive by asynchronous copies of 16 bytes, results leave 16 bytes at a time.
        assert any(op.startswith("cp.async.cg") for op in instructions), name
        assert any(op.startswith("st.global.v4") for op in instructions), name


@needs_aot
def test_gelu_and_single_precision_compile_for_h100():
    from jaxlab.core import plan

    x, words, *_, sizes, slots, members = _shapes()
    x = jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def hidden(x, words, sizes, slots, members):
        return packed_moe_matmul(x, words, sizes, slots, members, words_up=words, act="gelu")

    args = (x, words, sizes, slots, members)
    (kernel,) = plan.compile(hidden, *args, target=plan.target("h100"), labels=["input"] * 5).kernels
    assert kernel.name == "packed_gated_gmm"
    assert not kernel.spill_bytes


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(("gpu", "limit"), [("h100", 180), ("a100", 255)])
def test_registers_without_spills(gpu, limit):
    for name, kernel in _kernels(gpu).items():
        assert kernel.spill_bytes == 0, name
        assert kernel.registers <= limit, name


@needs_aot
@pytest.mark.latest
def test_compiled_within_shard_map():
    from jaxlab.core import plan

    target = plan.target("h100", topology="1x1x4")
    split, whole = (jax.sharding.NamedSharding(target.mesh, spec) for spec in (P("data"), P()))
    array = jax.ShapeDtypeStruct
    x = array((4 * 512, 128), jnp.bfloat16, sharding=split)
    words = array((2, 128, 128), jnp.uint16, sharding=whole)
    sizes = array((4, 4), jnp.int32, sharding=split)
    slots = array((4,), jnp.int32, sharding=whole)

    def loss(x, words, sizes, slots, members):
        run = jax.shard_map(
            lambda x, words, sizes, slots, members: packed_moe_matmul(x, words, sizes[0], slots, members),
            mesh=target.mesh, in_specs=(P("data"), P(), P("data"), P(), P()), out_specs=P("data"),
        )  # fmt: skip
        return run(x, words, sizes, slots, members).astype(jnp.float32).sum()

    args = (x, words, sizes, slots, slots)
    compiled = plan.compile(jax.value_and_grad(loss), *args, target=target, labels=["input"] * 5)
    assert {kernel.name for kernel in compiled.kernels} == {"packed_gmm", "packed_gmm_transposed"}
    assert [item.op for item in compiled.collectives] == ["all-reduce"]  # of the loss, and of nothing else
