import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import PRODUCTS_NAME, grouped_matmul, reference
from pallas_kernels.grouped_matmul.triton import Tiles
from tests.aot import needs_aot, needs_ptxas
from tests.kernels import harness
from tests.oracles import grouped_matmul as oracle

IMPLEMENTATIONS = ("reference", "xla", "interpret", "ragged_dot")


def case(name, m, k, n, sizes, poison=True):
    def make(rng):
        lhs, rhs = rng.normal(size=(m, k)), rng.normal(size=(len(sizes), k, n))
        cotangent = rng.normal(size=(m, n))
        if poison:  # What rows of no group hold must not matter.
            lhs[sum(sizes) :] = np.nan
            cotangent[sum(sizes) :] = np.nan
        return (lhs, rhs, np.asarray(sizes, np.int32)), cotangent

    return harness.Case(name, make, max(k, n, *sizes))


# Few shapes, many group sizes: a shape is compiled once.
CASES = [
    case("ragged", 45, 24, 20, (10, 0, 28, 7)),
    case("tail", 45, 24, 20, (5, 9, 0, 3)),
    case("all empty", 45, 24, 20, (0, 0, 0, 0)),
    case("one group has all", 45, 24, 20, (0, 45, 0, 0)),
    case("one row each", 45, 24, 20, (1, 1, 1, 1)),
    case("one element", 1, 1, 1, (1,)),
    case("several tiles", 150, 150, 70, (131, 1, 17)),
    case("no rows", 0, 3, 2, (0, 0)),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_value_and_gradients(one, implementation, dtype):
    harness.check(
        grouped_matmul,
        one,
        implementation,
        dtype,
        oracle=lambda lhs, rhs, sizes: oracle.grouped_matmul(np.nan_to_num(lhs), rhs, sizes),
        gradients=lambda lhs, rhs, sizes, c: oracle.gradients(np.nan_to_num(lhs), rhs, sizes, np.nan_to_num(c)),
        differentiate=(0, 1),
    )


def gated_case(name, m, k, n, sizes):
    plain = case(name, m, k, n, sizes)

    def make(rng):
        (lhs, rhs, sizes), cotangent = plain.make(rng)
        return (lhs / np.sqrt(k), rhs, rng.normal(size=rhs.shape), sizes), cotangent

    return harness.Case(name, make, plain.reduced)


GATED_CASES = [
    gated_case("tail", 45, 24, 20, (5, 9, 0, 3)),
    gated_case("one group has all", 45, 24, 20, (0, 45, 0, 0)),
    gated_case("all empty", 45, 24, 20, (0, 0, 0, 0)),
    gated_case("several tiles", 150, 150, 70, (131, 1, 17)),
    gated_case("no rows", 0, 3, 2, (0, 0)),
]


def _gated(lhs, rhs, rhs_up, sizes, *, act="silu", implementation=None):
    return grouped_matmul(lhs, rhs, sizes, rhs_up=rhs_up, act=act, implementation=implementation)


_gated_gelu = functools.partial(_gated, act="gelu")


def check_gated(one, implementation, act="silu", dtype=jnp.float32):
    clean = np.nan_to_num
    harness.check(
        _gated if act == "silu" else _gated_gelu,
        one,
        implementation,
        dtype,
        oracle=lambda lhs, g, u, sizes: oracle.gated(clean(lhs), g, u, sizes, act),
        gradients=lambda lhs, g, u, sizes, c: oracle.gated_gradients(clean(lhs), g, u, sizes, act, clean(c)),
        differentiate=(0, 1, 2),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("one", GATED_CASES, ids=lambda one: one.name)
def test_gated(one, implementation):
    check_gated(one, implementation)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_gated_by_gelu(implementation):
    check_gated(GATED_CASES[0], implementation, "gelu")


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_gated_in_bfloat16(implementation):
    check_gated(GATED_CASES[0], implementation, "silu", jnp.bfloat16)


def test_a_checkpoint_can_keep_the_two_products():
    keep = jax.checkpoint_policies.save_only_these_names(PRODUCTS_NAME)

    @functools.partial(jax.checkpoint, policy=keep)
    def inner(lhs, rhs):
        return jnp.sin(_gated(lhs, rhs, rhs, SIZES))  # what the sine's gradient needs is made again

    kept = [x.shape for x in jax.tree.leaves(jax.vjp(inner, LHS, RHS)[1]) if x.shape == (6, 3)]
    assert len(kept) == 2


def test_gated_by_either_name():
    args = LHS, RHS, SIZES
    silu, swiglu = (grouped_matmul(*args, rhs_up=RHS, act=act) for act in ("silu", "swiglu"))
    np.testing.assert_array_equal(silu, swiglu)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_representative_case(implementation):
    test_value_and_gradients(CASES[1], implementation, jnp.float32)


def test_reference_gradients_are_those_of_autodiff():
    rng = np.random.default_rng(1)
    lhs, rhs, sizes = (
        jnp.asarray(rng.normal(size=(9, 4))),
        jnp.asarray(rng.normal(size=(3, 4, 5))),
        jnp.array([4, 0, 3]),
    )
    plain = functools.partial(reference.rows_times_weights, group_sizes=sizes, transpose=False, dtype=lhs.dtype)
    by_hand = functools.partial(grouped_matmul, group_sizes=sizes, implementation="reference")
    cotangent = jnp.asarray(rng.normal(size=(9, 5)), lhs.dtype)
    for got, want in zip(jax.vjp(by_hand, lhs, rhs)[1](cotangent), jax.vjp(plain, lhs, rhs)[1](cotangent)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 45), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_any_group_sizes(implementation, cuts, seed):
    bounds = np.sort(cuts)
    sizes = np.diff(bounds, prepend=0).astype(np.int32)
    rng = np.random.default_rng(seed)
    lhs, rhs = rng.normal(size=(45, 24)).astype(np.float32), rng.normal(size=(4, 24, 20)).astype(np.float32)
    lhs[sizes.sum() :] = np.inf
    got = _compiled(implementation)(lhs, rhs, sizes)
    want = oracle.grouped_matmul(lhs.astype(np.float64), rhs.astype(np.float64), sizes)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@functools.cache
def _compiled(implementation):
    return jax.jit(functools.partial(grouped_matmul, implementation=implementation))


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_dtypes_of_result_and_gradients(preferred):
    lhs, rhs, sizes = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((2, 4, 3), jnp.float32), jnp.array([2, 3], jnp.uint8)
    product = functools.partial(grouped_matmul, group_sizes=sizes, preferred_element_type=preferred)
    assert product(lhs, rhs).dtype == jnp.float32
    assert product(lhs, rhs.astype(jnp.bfloat16)).dtype == (preferred or jnp.bfloat16)
    d_lhs, d_rhs = jax.grad(lambda l, r: product(l, r).sum(), (0, 1))(lhs, rhs)
    assert (d_lhs.dtype, d_rhs.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_vmap_of_values_and_gradients(implementation):
    rng = np.random.default_rng(2)
    lhs, rhs = (
        jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32),
    )
    sizes = jnp.array([[3, 4], [5, 5], [0, 1]], jnp.int32)

    def loss(l, r, s):
        return (grouped_matmul(l, r, s, implementation=implementation) ** 2).sum()

    batched = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None, 0)))(lhs, rhs, sizes)
    for i in range(3):
        single = jax.value_and_grad(loss, (0, 1))(lhs[i], rhs, sizes[i])
        own = jax.tree.map(lambda a, i=i: a[i], batched)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, single)
    outside = jax.grad(lambda r: jax.vmap(loss, (0, None, 0))(lhs, r, sizes).sum())(rhs)
    np.testing.assert_allclose(outside, batched[1][1].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    rng = np.random.default_rng(3)
    lhs, rhs = jnp.asarray(rng.normal(size=(48, 4)), jnp.float32), jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    sizes = jnp.asarray(rng.integers(0, 4, size=(8, 2)), jnp.int32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda l, r, s: grouped_matmul(l, r, s[0]),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )

    def local(l, r, s):
        return jnp.concatenate([grouped_matmul(part, r, own) for part, own in zip(jnp.split(l, 8), s)])

    grads = [
        jax.jit(jax.grad(lambda l, r, f=f: (f(l, r, sizes) ** 2).sum(), (0, 1)))(lhs, rhs) for f in (sharded, local)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


def test_interpreted_kernels_refuse_what_jax_cannot_interpret():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda l, r, s: grouped_matmul(l, r, s, implementation="interpret"),
        mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="check_vma") as error:
        sharded(jnp.ones((16, 4)), jnp.ones((2, 4, 3)), jnp.array([1, 1]))
    assert isinstance(error.value, ExceptionGroup)


def test_remat():
    lhs, rhs, sizes = jnp.ones((64, 16)), jnp.ones((4, 16, 8)), jnp.array([16, 16, 16, 16])
    product = jax.checkpoint(lambda l, r: grouped_matmul(l, r, sizes))
    np.testing.assert_allclose(jax.grad(lambda r: product(lhs, r).sum())(rhs), np.full((4, 16, 8), 16.0))


LHS, RHS, SIZES = jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((LHS[0], RHS, SIZES), {}, ValueError, "lhs must have rank 2"),
        ((LHS, RHS[0], SIZES), {}, ValueError, "rhs must have rank 3"),
        ((LHS, RHS, SIZES[None]), {}, ValueError, "group_sizes must have rank 1"),
        ((LHS[:, :3], RHS, SIZES), {}, ValueError, r"agree in k.*\(6, 3\).*\(2, 4, 3\)"),
        ((LHS, RHS, jnp.array([1, 2, 3])), {}, ValueError, "each of the 2 groups"),
        ((LHS, RHS, jnp.array([-1, 2])), {}, ValueError, "negative"),
        ((LHS, RHS, jnp.array([4, 3])), {}, ValueError, "sum to 7.* 6 rows"),
        ((LHS, RHS, jnp.array([2.0, 3.0])), {}, TypeError, "group_sizes must be integers"),
        ((LHS.astype(int), RHS, SIZES), {}, TypeError, "lhs must be floating"),
        ((LHS, RHS.astype(int), SIZES), {}, TypeError, "rhs must be floating"),
        ((LHS, RHS, SIZES), {"rhs_up": RHS}, ValueError, "rhs_up and act go together, got act=None"),
        ((LHS, RHS, SIZES), {"act": "silu"}, ValueError, "rhs_up and act go together, got act='silu'"),
        ((LHS, RHS, SIZES), {"rhs_up": RHS, "act": "relu"}, ValueError, "act 'relu'.*silu.*swiglu.*gelu"),
        ((LHS, RHS, SIZES), {"rhs_up": RHS[:1], "act": "silu"}, ValueError, r"rhs_up .*\(2, 4, 3\), got \(1, 4, 3\)"),
        ((LHS, RHS, SIZES), {"rhs_up": RHS.astype(int), "act": "silu"}, TypeError, "rhs_up must be floating"),
        ((LHS, RHS, SIZES), {"preferred_element_type": jnp.int32}, TypeError, "preferred_element_type"),
        ((LHS, RHS, SIZES), {"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        ((LHS, RHS, SIZES), {"implementation": "triton"}, NotImplementedError, "grouped_matmul.*'triton'.*'cpu'.*xla"),
    ],
)
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        grouped_matmul(*args, **settings)


@pytest.mark.usefixtures("unchecked")
def test_numpy_inputs():
    out = grouped_matmul(np.ones((3, 2), np.float32), np.ones((1, 2, 2), np.float32), np.array([3]))
    np.testing.assert_array_equal(out, np.full((3, 2), 2.0))


@pytest.mark.parametrize("field", [{"rows": 48}, {"columns": 8}, {"depth": 0}, {"warps": 3}, {"stages": 0}])
def test_impossible_tiles(field):
    with pytest.raises(ValueError, match=f"Tiles.{next(iter(field))} must be"):
        Tiles(**{"rows": 64, "columns": 64, "depth": 32, **field})


@needs_aot
@pytest.mark.latest
def test_compiled_for_h100_without_temporaries():
    from jaxlab.core import plan

    target = plan.target("h100")
    lhs, rhs, sizes, cotangent = _shapes(jnp.bfloat16)
    forward = plan.compile(grouped_matmul, lhs, rhs, sizes, target=target, labels=["input"] * 3)
    backward = plan.compile(_gradients, lhs, rhs, sizes, cotangent, target=target, labels=["input"] * 4)
    # Bars: an eighth of ragged_dot's 40 MiB, and 2.5 MiB. In fact nothing at all is stored beside the results.
    assert forward.bytes["temporaries"] <= 2**16
    assert backward.bytes["temporaries"] <= 2**16
    kernels = [*forward.kernels, *backward.kernels]
    assert {kernel.name for kernel in kernels} == {
        "grouped_matmul",
        "grouped_matmul_transposed",
        "grouped_matmul_weights_gradient",
    }
    for kernel in kernels:
        assert kernel.tensor_core
        assert any(name.startswith("wgmma") for name in kernel.ptx_instructions), kernel.name
        # Tiles arrive by asynchronous copies of 16 bytes, results leave 16 bytes at a time.
        assert any(name.startswith("cp.async.cg") for name in kernel.ptx_instructions), kernel.name
        assert not any(name.startswith("ld.global.b16") for name in kernel.ptx_instructions), kernel.name
        assert any(name.startswith("st.global.v4") for name in kernel.ptx_instructions), kernel.name


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(("gpu", "limit"), [("h100", 166), ("a100", 255)])
def test_registers_without_spills(gpu, limit):
    from jaxlab.core import plan

    args = _shapes(jnp.bfloat16)
    compiled = plan.compile(_gradients, *args, target=plan.target(gpu), labels=["input"] * 4)
    assert len(compiled.kernels) == 2
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0
        assert kernel.registers <= limit  # tokamax's kernels: 164-166 on an H100


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(("gpu", "limit"), [("h100", 168), ("a100", 255)])
def test_gated_compiled_for_gpus(gpu, limit):
    from jaxlab.core import plan

    lhs, rhs, sizes, cotangent = _shapes(jnp.bfloat16)

    def gradients(lhs, rhs, rhs_up, sizes, cotangent):
        return jax.vjp(lambda *args: _gated(*args, sizes), lhs, rhs, rhs_up)[1](cotangent)

    target = plan.target(gpu)
    forward = plan.compile(_gated, lhs, rhs, rhs, sizes, target=target, labels=["input"] * 4)
    backward = plan.compile(gradients, lhs, rhs, rhs, sizes, cotangent, target=target, labels=["input"] * 5)
    assert forward.bytes["temporaries"] == 0
    # The two products; their gradients take their place.
    assert backward.bytes["temporaries"] <= 2 * 4096 * 256 * 2 + 2**16
    assert [kernel.name for kernel in forward.kernels] == ["grouped_matmul_gated"]
    assert {kernel.name for kernel in backward.kernels} == {
        "grouped_matmul_products",
        "grouped_matmul_transposed",
        "grouped_matmul_weights_gradient",
    }
    for kernel in (*forward.kernels, *backward.kernels):
        assert kernel.tensor_core
        assert kernel.spill_bytes == 0
        assert kernel.registers <= limit
        assert gpu != "h100" or any(name.startswith("wgmma") for name in kernel.ptx_instructions), kernel.name


@needs_aot
@pytest.mark.latest
def test_compiled_within_shard_map():
    from jaxlab.core import plan

    target = plan.target("h100", topology="1x1x4")
    split, whole = (jax.sharding.NamedSharding(target.mesh, spec) for spec in (P("data"), P()))
    lhs = jax.ShapeDtypeStruct((4 * 512, 128), jnp.bfloat16, sharding=split)
    rhs = jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16, sharding=whole)
    sizes = jax.ShapeDtypeStruct((4, 4), jnp.int32, sharding=split)

    def loss(lhs, rhs, sizes):
        local = jax.shard_map(
            lambda l, r, s: grouped_matmul(l, r, s[0]),
            mesh=target.mesh,
            in_specs=(P("data"), P(), P("data")),
            out_specs=P("data"),
        )
        return local(lhs, rhs, sizes).astype(jnp.float32).sum()

    compiled = plan.compile(jax.grad(loss, (0, 1)), lhs, rhs, sizes, target=target, labels=["input"] * 3)
    assert {kernel.name for kernel in compiled.kernels} == {
        "grouped_matmul_transposed",
        "grouped_matmul_weights_gradient",
    }
    assert [item.op for item in compiled.collectives] == ["all-reduce"]  # of d_rhs, and of nothing else


def _shapes(dtype):
    array = jax.ShapeDtypeStruct
    return array((4096, 512), dtype), array((8, 512, 256), dtype), array((8,), jnp.int32), array((4096, 256), dtype)


def _gradients(lhs, rhs, sizes, cotangent):
    return jax.vjp(lambda l, r: grouped_matmul(l, r, sizes), lhs, rhs)[1](cotangent)


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_with_64_bit_types(implementation):
    with jax.enable_x64(True):
        dtype = jnp.float32 if implementation == "interpret" else jnp.float64
        harness.check(
            grouped_matmul,
            CASES[0],
            implementation,
            dtype,
            oracle=oracle.grouped_matmul,
            gradients=oracle.gradients,
            differentiate=(0, 1),
        )
        if dtype == jnp.float64:
            with pytest.raises(NotImplementedError, match="float64"):
                grouped_matmul(jnp.ones((4, 2)), jnp.ones((1, 2, 3)), jnp.array([4]), implementation="interpret")
