import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.layernorm_linear import layernorm_linear, triton
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import compare
from tests.oracles import layernorm_fusions as oracle

# Several tiles and shares of rows, the last of each ragged; K and N below a tile, above one, no powers of two.
CASES = {
    "narrow": ((11, 47), 12, 5),
    "rows in parts": ((2, 70), 300, 20),
    "many columns": ((150,), 16, 150),
    "one element": ((), 1, 1),
}


def _inputs(name, dtype=jnp.float32, weights=jnp.float32):
    rng = np.random.default_rng(0)
    lead, k, n = CASES[name]
    x = jnp.asarray(rng.normal(size=(*lead, k)) + 3, dtype)
    w = rng.normal(size=(k, n)) / np.sqrt(k)
    others = [jnp.asarray(a, weights) for a in (*rng.normal(size=(2, k)), w, rng.normal(size=n))]
    return (x, *others), jnp.asarray(rng.normal(size=(*lead, n)), dtype)


@functools.partial(jax.jit, static_argnames="implementation")
def _run(args, d_out, implementation=None):
    out, pullback = jax.vjp(functools.partial(layernorm_linear, implementation=implementation), *args)
    return out, *pullback(d_out)


def _exact(args, d_out):
    args, d_out = [np.asarray(a, np.float64) for a in args], np.asarray(d_out, np.float64)
    return oracle.layernorm_linear(*args), *oracle.layernorm_linear_gradients(*args, d_out)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, implementation):
    args, d_out = _inputs(name)
    compare(_run(args, d_out, implementation), _exact(args, d_out), 5e-6, 5e-5)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_bfloat16_beside_float32_weights(implementation):
    """Means of 300 deviations: statistics in bfloat16, or stored in it, would leave nothing of the rows."""
    args, d_out = _inputs("rows in parts", jnp.bfloat16)
    args = ((args[0] * 0.25 + 75).astype(jnp.bfloat16), *args[1:])
    got = _run(args, d_out, implementation)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 2 + [jnp.float32] * 4
    compare(got, _exact(args, d_out), 2e-2, 2e-2)


def test_bias_is_optional_and_plain_autodiff_may_be_asked_for_in_turn():
    (*args, b), d_out = _inputs("narrow")
    without = _run(tuple(args), d_out, ("reference", "xla"))[0]
    np.testing.assert_allclose(without + b, _run((*args, b), d_out)[0], atol=1e-5)
    compare(_run(tuple(args), d_out, ("reference", "xla"))[1:], _exact((*args, b), d_out)[1:-1], 5e-5, 5e-5)


def test_float64():
    with jax.enable_x64(True):
        args, d_out = _inputs("narrow", jnp.float64, jnp.float64)
        compare(_run(args, d_out), _exact(args, d_out), 1e-12, 1e-11)
        args, d_out = _inputs("one element")
        compare(_run(args, d_out, "interpret"), _exact(args, d_out), 5e-6, 5e-5)
        with pytest.raises(NotImplementedError, match="got float64"):
            layernorm_linear(*[a.astype(jnp.float64) for a in args], implementation="interpret")


@pytest.mark.parametrize(("shape", "n"), [((0, 3), 2), ((4, 3), 0)])
def test_nothing_to_do(shape, n):
    args = jnp.ones(shape), jnp.ones(3), jnp.ones(3), jnp.ones((3, n)), jnp.ones(n)
    out, *gradients = _run(args, jnp.ones((shape[0], n)))
    assert out.shape == (shape[0], n)
    for d, a in zip(gradients, args, strict=True):
        assert d.shape == a.shape
        assert not np.asarray(d).any()


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_vmap_and_remat(implementation):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 20, 6), (3, 6, 4)))
    ones, zeros = jnp.ones(6), jnp.zeros(6)

    def loss(x, w, scale, implementation=implementation):
        return (layernorm_linear(x, scale, zeros, w, implementation=implementation) ** 2).sum()

    plain = jax.value_and_grad(functools.partial(loss, implementation="reference"), (0, 1, 2))
    gradients = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2))
    got, want = (jax.jit(jax.vmap(f, (0, 0, None)))(x, w, ones) for f in (gradients, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    args, d_out = _inputs("narrow")
    args, d_out = (args[0].reshape(-1, 12)[:512], *args[1:]), d_out.reshape(-1, 5)[:512]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P("data"), P(), P(), P(), P())
    sharded = jax.shard_map(layernorm_linear, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    out, pullback = jax.jit(functools.partial(jax.vjp, sharded))(*args)
    compare((out, *jax.jit(pullback)(d_out)), _exact(args, d_out), 5e-6, 5e-5)
    if check_vma:
        interpreted = functools.partial(layernorm_linear, implementation="interpret")
        with pytest.raises(NotImplementedError, match="check_vma"):
            jax.shard_map(interpreted, mesh=mesh, in_specs=specs, out_specs=P("data"))(*args)


@pytest.mark.parametrize(("rows", "depth", "most"), [(1, 64, 264), (577, 64, 4), (640, 64, 7), (100000, 64, 264)])
def test_shares_of_rows_are_whole_and_none_is_empty(rows, depth, most):
    shares = triton.shares_of(rows, depth, most)
    assert 1 <= shares <= most
    steps = [[int(end) for end in triton.share_steps(i, shares, rows, depth)] for i in range(shares)]
    assert [low for low, _ in steps] == [0, *(high for _, high in steps[:-1])]
    assert steps[-1][1] == -(-rows // depth)
    assert all(low < high for low, high in steps)


X, ONES, W = jnp.ones((4, 3)), jnp.ones(3), jnp.ones((3, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((jnp.float32(1), ONES, ONES, W), {}, ValueError, r"x: expected \[..., K\].*\(\)"),
        ((X[:, :0], ONES[:0], ONES[:0], W[:0]), {}, ValueError, r"x: expected .* K at least 1, got shape \(4, 0\)"),
        ((X, ONES[:2], ONES, W), {}, ValueError, r"scale: expected shape \[3\].*\(2,\)"),
        ((X, ONES, ONES[:, None], W), {}, ValueError, r"offset: expected shape \[3\].*\(3, 1\)"),
        ((X, ONES, ONES, W[:2]), {}, ValueError, r"w: expected shape \[3, any\] beside x .*\(4, 3\), got \(2, 2"),
        ((X, ONES, ONES, ONES), {}, ValueError, r"w: expected shape \[3, any\].*\(3,\)"),
        ((X, ONES, ONES, W, ONES), {}, ValueError, r"b: expected shape \[2\].*\(3,\)"),
        ((X.astype(int), ONES, ONES, W), {}, TypeError, "x: expected a floating dtype, got int32"),
        ((X, ONES, ONES, W.astype(int)), {}, TypeError, "w: expected a floating dtype, got int32"),
        ((X, ONES, ONES, W), {"eps": -1e-5}, ValueError, "eps: expected at least 0, got -1e-05"),
        ((X, ONES, ONES, W), {"implementation": "cuda"}, ValueError, "unknown implementation 'cuda'.*reference, xla"),
        ((X, ONES, ONES, W), {"implementation": "triton"}, NotImplementedError, "layernorm_linear.*'cpu'.*xla"),
    ],
)  # fmt: skip
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        layernorm_linear(*args, **settings)


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_for_gpus_that_are_not_there(platform, implementation):
    args, d_out = _inputs("narrow", jnp.bfloat16)
    text = _run.trace(args, d_out, implementation).lower(lowering_platforms=(platform,)).as_text()
    for kernel in ("layernorm_linear", "layernorm_linear_rows_gradient", "layernorm_linear_weights_sums"):
        assert f'"{kernel}"' in text


def _gradients(d_out, *args):
    return jax.vjp(layernorm_linear, *args)[1](d_out)


@functools.cache
def _compiled(m, k, n, function=layernorm_linear):
    from jaxlab.core import plan

    target, array = plan.target("h100"), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = array((m, k)), array((k,)), array((k,)), array((k, n)), array((n,))
    args = args if function is layernorm_linear else (array((m, n)), *args)
    return plan.compile(function, *args, target=target, labels=["input"] * len(args))


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(
    ("m", "k", "n", "temporaries"),
    [(589824, 128, 16, 8), (18432, 768, 1536, 20), (1536, 449, 8, 12)],
)
def test_compiled_for_h100(m, k, n, temporaries):
    """Bars in MiB: the partial sums of the weights, and two numbers a row; x has 144, 27 and 1.3."""
    forward, backward = _compiled(m, k, n), _compiled(m, k, n, _gradients)
    assert forward.bytes["temporaries"] <= k * n * 2 + n * 4 + 2**16  # the weights with the scale in them
    assert backward.bytes["temporaries"] <= temporaries * 2**20
    kernels = [*forward.kernels, *backward.kernels]
    assert len(kernels) == 3
    for kernel in kernels:
        assert any(name.startswith("wgmma.mma") for name in kernel.ptx_instructions), kernel.name
        assert kernel.spill_bytes == 0, kernel.name


@needs_aot
def test_offsets_beyond_32_bits():
    """Rows of 8 GiB are addressed by unsigned products of 64 bits."""
    small, large = (_compiled(m, 128, 16).kernels[0].ptx_instructions for m in (589824, 2**25))
    assert "mul.wide.s32" in small
    assert "mul.wide.s32" not in large
    assert large["mul.wide.u32"] > small["mul.wide.u32"]
