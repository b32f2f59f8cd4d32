import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.transition import transition, triton
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import compare
from tests.oracles import layernorm_fusions as oracle

# Rows, channels and hidden units of several tiles, the last ragged; the wide ones are more than a fused kernel takes.
CASES = {"narrow": ((11, 27), 12, 40), "wide": ((140,), 130, 20), "one element": ((), 1, 1)}


def _inputs(name, dtype=jnp.float32, weights=jnp.float32):
    rng = np.random.default_rng(0)
    lead, c, f = CASES[name]
    w_in, w_out = rng.normal(size=(c, 2 * f)) / np.sqrt(c), rng.normal(size=(f, c)) / np.sqrt(f)
    others = [jnp.asarray(a, weights) for a in (*rng.normal(size=(2, c)), w_in, w_out)]
    x, d_out = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, *lead, c)))
    return (x + 3, *others), d_out


@functools.partial(jax.jit, static_argnames=("implementation", "row_chunk"))
def _run(args, d_out, implementation=None, row_chunk=None):
    op = functools.partial(transition, implementation=implementation, row_chunk=row_chunk)
    out, pullback = jax.vjp(op, *args)
    return out, *pullback(d_out)


def _exact(args, d_out):
    args, d_out = [np.asarray(a, np.float64) for a in args], np.asarray(d_out, np.float64)
    return oracle.transition(*args), *oracle.transition_gradients(*args, d_out)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, implementation):
    args, d_out = _inputs(name)
    # A chunk that divides nothing: sums must not take the rows of two chunks twice.
    got = _run(args, d_out, implementation, row_chunk=50)
    compare(got, _exact(args, d_out), 5e-6, 5e-5)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_bfloat16_beside_float32_weights(implementation):
    """Means of 300 deviations: statistics in bfloat16, or stored in it, would leave nothing of the rows."""
    args, d_out = _inputs("narrow", jnp.bfloat16)
    args = ((args[0] * 0.25 + 75).astype(jnp.bfloat16), *args[1:])
    got = _run(args, d_out, implementation)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 2 + [jnp.float32] * 4
    compare(got, _exact(args, d_out), 2e-2, 3e-2)


def test_float64():
    with jax.enable_x64(True):
        args, d_out = _inputs("narrow", jnp.float64, jnp.float64)
        compare(_run(args, d_out), _exact(args, d_out), 1e-12, 1e-11)
        with pytest.raises(NotImplementedError, match="got float64"):
            transition(*args, implementation="interpret")
        args, d_out = _inputs("one element")
        compare(_run(args, d_out, "interpret"), _exact(args, d_out), 5e-6, 5e-5)


@pytest.mark.parametrize(("rows", "hidden"), [(0, 2), (4, 0)])
def test_nothing_to_do(rows, hidden):
    args = jnp.ones((rows, 3)), jnp.ones(3), jnp.ones(3), jnp.ones((3, 2 * hidden)), jnp.ones((hidden, 3))
    for d, a in zip(_run(args, args[0]), (args[0], *args), strict=True):
        assert d.shape == a.shape
        assert not np.asarray(d).any()


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_vmap_and_remat(implementation):
    rng = np.random.default_rng(1)
    x, w_in, w_out = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 20, 6), (3, 6, 8), (4, 6)))

    def loss(x, w_in, w_out, implementation=implementation):
        return (transition(x, jnp.ones(6), jnp.zeros(6), w_in, w_out, implementation=implementation) ** 2).sum()

    plain = jax.value_and_grad(functools.partial(loss, implementation="reference"), (0, 1, 2))
    gradients = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2))
    got, want = (jax.jit(jax.vmap(f, (0, 0, None)))(x, w_in, w_out) for f in (gradients, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    args, d_out = _inputs("narrow")
    args, d_out = (args[0].reshape(-1, 12)[:256], *args[1:]), d_out.reshape(-1, 12)[:256]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P("data"), P(), P(), P(), P())
    sharded = jax.shard_map(transition, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    out, pullback = jax.jit(functools.partial(jax.vjp, sharded))(*args)
    compare((out, *jax.jit(pullback)(d_out)), _exact(args, d_out), 5e-6, 5e-5)
    if check_vma:
        interpreted = functools.partial(transition, implementation="interpret")
        with pytest.raises(NotImplementedError, match="check_vma"):
            jax.shard_map(interpreted, mesh=mesh, in_specs=specs, out_specs=P("data"))(*args)


@pytest.mark.parametrize(("implementation", "bar"), [("xla", 0.25), ("reference", None)])
def test_row_chunk_bounds_what_is_stored(implementation, bar):
    """[M, 2F] in float32 is the unit; "reference", which stores it and more, shows that the measure sees it."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = array((4096, 16)), array((16,)), array((16,)), array((16, 256)), array((128, 16))
    compiled = _run.trace(args, args[0], implementation, row_chunk=256).lower().compile()
    stored = compiled.memory_analysis().temp_size_in_bytes / (4096 * 256 * 4)
    assert stored <= bar if bar else stored > 1


X, ONES, W_IN, W_OUT = jnp.ones((4, 3)), jnp.ones(3), jnp.ones((3, 4)), jnp.ones((2, 3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((X[:, :0], ONES[:0], ONES[:0], W_IN[:0], W_OUT), {}, ValueError, "x: .*K at least 1"),
        ((X, ONES[:2], ONES, W_IN, W_OUT), {}, ValueError, r"scale: expected shape \[3\].*\(2,\)"),
        ((X, ONES, X, W_IN, W_OUT), {}, ValueError, r"offset: expected shape \[3\].*\(4, 3\)"),
        ((X, ONES, ONES, W_IN[:2], W_OUT), {}, ValueError, r"w_in: expected shape \[3, any\].*\(2, 4\)"),
        ((X, ONES, ONES, W_IN[:, :3], W_OUT), {}, ValueError, r"w_in: expected an even width.*\(3, 3\)"),
        ((X, ONES, ONES, W_IN, W_OUT[:1]), {}, ValueError, r"w_out: expected shape \[2, 3\].*\(1, 3\)"),
        ((X, ONES, ONES, W_IN, W_OUT[:, :2]), {}, ValueError, r"w_out: expected shape \[2, 3\].*\(2, 2\)"),
        ((X.astype(int), ONES, ONES, W_IN, W_OUT), {}, TypeError, "x: expected a floating dtype, got int32"),
        ((X, ONES, ONES, W_IN, W_OUT.astype(int)), {}, TypeError, "w_out: expected a floating dtype, got int32"),
        ((X, ONES, ONES, W_IN, W_OUT), {"eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
        ((X, ONES, ONES, W_IN, W_OUT), {"row_chunk": 0}, ValueError, "row_chunk: expected at least 1, or None, got 0"),
        ((X, ONES, ONES, W_IN, W_OUT), {"implementation": "cuda"}, ValueError, "unknown implementation 'cuda'"),
        ((X, ONES, ONES, W_IN, W_OUT), {"implementation": "triton"}, NotImplementedError, "transition.*'cpu'.*xla"),
    ],
)  # fmt: skip
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        transition(*args, **settings)


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_for_gpus_that_are_not_there(platform, implementation):
    args, d_out = _inputs("narrow", jnp.bfloat16)
    text = _run.trace(args, d_out, implementation).lower(lowering_platforms=(platform,)).as_text()
    for kernel in ("transition", "transition_rows_gradient", "transition_weights_sums"):
        assert f'"{kernel}"' in text


def _gradients(d_out, *args):
    return jax.vjp(transition, *args)[1](d_out)


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(
    ("m", "c", "f", "forward", "backward"),
    [(589824, 128, 512, 1, 20), (18432, 768, 1536, 24, 60)],
)
def test_compiled_for_h100(m, c, f, forward, backward):
    """Bars of temporaries in MiB; [M, 2F] has 1152 and 108."""
    from jaxlab.core import plan

    target, array = plan.target("h100"), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = array((m, c)), array((c,)), array((c,)), array((c, 2 * f)), array((f, c))
    kernels = []
    for function, given, bar in ((transition, args, forward), (_gradients, (args[0], *args), backward)):
        compiled = plan.compile(function, *given, target=target, labels=["input"] * len(given))
        assert compiled.bytes["temporaries"] <= bar * 2**20
        kernels += compiled.kernels
    assert len(kernels) == (3 if c <= triton.WIDEST[2] else 4)
    for kernel in kernels:
        assert any(name.startswith("wgmma.mma") for name in kernel.ptx_instructions), kernel.name
        assert kernel.spill_bytes == 0, kernel.name
