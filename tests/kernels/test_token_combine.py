import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_combine import token_combine
from tests.aot import needs_aot, needs_ptxas
from tests.kernels import harness
from tests.kernels.test_token_gather import over_eight_devices
from tests.oracles import token_rows as oracle

IMPLEMENTATIONS = ("reference", "xla", "interpret")


def combine(y, weights, inv, slots, num_valid, *, implementation):
    """What a user may differentiate: the gradient of rows past the last is unspecified."""
    valid = jnp.arange(y.shape[0])[:, None] < num_valid
    # A select's gradient is a select, so what the op says of other rows is dropped; and they are poisoned going in.
    y = jnp.where(valid, y, jnp.nan)
    return token_combine(y, weights, inv, slots, num_valid, implementation=implementation)


def case(name, s, k, h, kept=1.0, rows=None):
    def make(rng):
        made = oracle.buffer(rng, s, k, kept=kept, rows=rows)
        y, weights = rng.normal(size=(len(made.slots), h)), rng.normal(size=(s, k))
        return (y, weights, made.inv, made.slots, np.int32(made.num_valid)), rng.normal(size=(s, h))

    return harness.Case(name, make, max(h, k))


CASES = [
    case("dropless", 13, 3, 20),
    case("some dropped", 13, 3, 20, kept=0.6),
    case("all dropped", 13, 3, 20, kept=0.0),
    case("smaller buffer", 13, 3, 20, rows=17),
    case("larger buffer", 13, 3, 20, kept=0.6, rows=64),
    case("several tiles", 40, 2, 300),
    case("one", 1, 1, 1),
    case("no tokens", 0, 3, 20),
    case("no rows", 13, 3, 20, rows=0),
]


def check(one, implementation, dtype=jnp.float32):
    harness.check(
        combine,
        one,
        implementation,
        dtype,
        oracle=lambda y, w, inv, slots, n: oracle.combine(y, w, slots, n),
        gradients=lambda y, w, inv, slots, n, c: oracle.combine_gradients(y, w, slots, n, c),
        differentiate=(0, 1),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_value_and_gradients(one, implementation):
    check(one, implementation)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_representative_case(implementation):
    check(CASES[1], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    check(CASES[1], implementation, jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_keep_their_dtype_and_dropped_ones_count_as_nothing(implementation):
    made = oracle.buffer(np.random.default_rng(1), 6, 2, kept=0.5)
    kept = made.inv < 12
    weights = jnp.where(kept, jnp.ones((6, 2), jnp.float32), jnp.nan)

    def op(y, weights):
        indices = jnp.asarray(made.inv), jnp.asarray(made.slots), made.num_valid
        return token_combine(y, weights, *indices, implementation=implementation)

    value, pullback = jax.vjp(op, jnp.ones((12, 4), jnp.bfloat16), weights)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value[:, 0], kept.sum(1))
    d_y, d_weights = pullback(value)
    assert (d_y.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(d_weights, np.where(kept, 4.0 * kept.sum(1, keepdims=True), 0))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_vmap(implementation):
    rng = np.random.default_rng(2)
    made = [oracle.buffer(rng, 5, 2, kept=0.7) for _ in range(3)]
    y = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32)
    inv, slots, count = (
        jnp.asarray(np.stack([getattr(b, name) for b in made])) for name in ("inv", "slots", "num_valid")
    )

    def loss(*args):
        return (combine(*args, implementation=implementation) ** 2).sum()

    args = (y, weights, inv, slots, count)
    got = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(*args)
    for i in range(3):
        want = jax.value_and_grad(loss, (0, 1))(*(a[i] for a in args))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    rng = np.random.default_rng(3)
    made = [oracle.buffer(rng, 4, 2, kept=0.7) for _ in range(8)]
    arrays = [np.stack([getattr(b, name) for b in made]) for name in ("inv", "slots", "num_valid")]
    y, weights = rng.normal(size=(8, 8, 3)).astype(np.float32), rng.normal(size=(8, 4, 2)).astype(np.float32)
    over_eight_devices(functools.partial(combine, implementation=None), (y, weights, *arrays), check_vma=check_vma)


def test_within_a_remat():
    made = oracle.buffer(np.random.default_rng(4), 4, 2)
    op = jax.checkpoint(lambda y, w: token_combine(y, w, jnp.asarray(made.inv), jnp.asarray(made.slots), 8))
    np.testing.assert_allclose(jax.grad(lambda w: op(jnp.ones((8, 3)), w).sum())(jnp.ones((4, 2))), 3.0)


Y, W, INV, SLOTS = jnp.ones((4, 3)), jnp.ones((2, 2)), jnp.array([[1, 2], [0, 3]]), jnp.array([2, 0, 1, 3])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((Y[0], W, INV, SLOTS, 4), {}, ValueError, "y must have rank 2"),
        ((Y, W[0], INV, SLOTS, 4), {}, ValueError, "weights must have rank 2"),
        ((Y, W, INV[:, :1], SLOTS, 4), {}, ValueError, r"inv must have the shape of weights, \(2, 2\), got \(2, 1\)"),
        ((Y, W, INV, SLOTS[:3], 4), {}, ValueError, r"slots must have one entry for each of the 4 rows.*\(3,\)"),
        ((Y, W, INV, SLOTS[None], 4), {}, ValueError, "slots must have rank 1"),
        ((Y, W, INV, SLOTS, 5), {}, ValueError, r"num_valid .*\[0, 4\].*5"),
        ((Y.astype(int), W, INV, SLOTS, 4), {}, TypeError, "y must be floating"),
        ((Y, W.astype(int), INV, SLOTS, 4), {}, TypeError, "weights must be floating"),
        ((Y, W, INV.astype(float), SLOTS, 4), {}, TypeError, "inv must be integers"),
        ((Y, W, INV, SLOTS.astype(float), 4), {}, TypeError, "slots must be integers"),
        ((Y, W, INV, SLOTS, 4), {"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        ((Y, W, INV, SLOTS, 4), {"implementation": "triton"}, NotImplementedError, "token_combine.*'triton'.*'cpu'"),
    ],
)
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        token_combine(*args, **settings)


@needs_aot
@needs_ptxas
@pytest.mark.latest
def test_compiled_for_h100():
    from jaxlab.core import plan

    array = jax.ShapeDtypeStruct
    y, weights = array((4096 * 6, 2048), jnp.bfloat16), array((4096, 6), jnp.float32)
    indices = array((4096, 6), jnp.int32), array((4096 * 6,), jnp.int32), array((), jnp.int32)

    def both(y, weights, inv, slots, num_valid, cotangent):
        value, pullback = jax.vjp(lambda y, w: token_combine(y, w, inv, slots, num_valid), y, weights)
        return value, pullback(cotangent)

    cotangent = array((4096, 2048), jnp.bfloat16)
    compiled = plan.compile(both, y, weights, *indices, cotangent, target=plan.target("h100"), labels=["input"] * 6)
    assert compiled.bytes["temporaries"] == 0
    names = {"token_combine", "token_combine_rows_gradient", "token_combine_weights_gradient"}
    assert {kernel.name for kernel in compiled.kernels} == names
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 64
        assert not any(name.startswith(("atom", "red.")) for name in kernel.ptx_instructions), kernel.name
