import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.token_gather import token_gather
from pallas_kernels.token_gather.triton import Tiles
from tests.aot import needs_aot, needs_ptxas
from tests.kernels import harness
from tests.oracles import token_rows as oracle

IMPLEMENTATIONS = ("reference", "xla", "interpret")


def masked(x, token_ids, inv, num_valid, *, implementation):
    """What a user may look at: rows past the last are unspecified."""
    rows = token_gather(x, token_ids, inv, num_valid, implementation=implementation)
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < num_valid, rows, 0)


def case(name, s, k, h, kept=1.0, rows=None):
    def make(rng):
        made = oracle.buffer(rng, s, k, kept=kept, rows=rows)
        cotangent = rng.normal(size=(len(made.slots), h))
        return (rng.normal(size=(s, h)), made.token_ids, made.inv, np.int32(made.num_valid)), cotangent

    return harness.Case(name, make, k)


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
        masked,
        one,
        implementation,
        dtype,
        oracle=lambda x, ids, inv, n: oracle.gather(x, ids, n),
        gradients=lambda x, ids, inv, n, c: [oracle.gather_gradient(c, ids, n, len(x))],
        differentiate=(0,),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_value_and_gradient(one, implementation):
    check(one, implementation)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_representative_case(implementation):
    check(CASES[1], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    check(CASES[1], implementation, jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_past_the_last_row_does_not_matter(implementation):
    made = oracle.buffer(np.random.default_rng(1), 6, 2, kept=0.5)
    ids = jnp.asarray(np.where(np.arange(12) < made.num_valid, made.token_ids, 10**6))
    settings = {"num_valid": made.num_valid, "implementation": implementation}
    rows, pullback = jax.vjp(lambda x: token_gather(x, ids, jnp.asarray(made.inv), **settings), jnp.ones((6, 4)))
    np.testing.assert_array_equal(rows[: made.num_valid], 1.0)
    poison = jnp.where(jnp.arange(12)[:, None] < made.num_valid, jnp.ones((12, 4)), jnp.nan)
    np.testing.assert_array_equal(pullback(poison)[0][:, 0], (np.asarray(made.inv) < 12).sum(1))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_vmap(implementation):
    rng = np.random.default_rng(2)
    made = [oracle.buffer(rng, 5, 2, kept=0.7) for _ in range(3)]
    x = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    ids, inv, count = (
        jnp.asarray(np.stack([getattr(b, name) for b in made])) for name in ("token_ids", "inv", "num_valid")
    )

    def loss(*args):
        return (masked(*args, implementation=implementation) ** 3).sum()

    got = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, ids, inv, count)
    for i in range(3):
        want = jax.value_and_grad(loss)(x[i], ids[i], inv[i], count[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), got, want)


def over_eight_devices(op, arrays, *, check_vma):
    """`op` of eight devices' own arrays (stacked), in a shard_map, and the gradient in the first."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *a: op(*(x[0] for x in a))[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    together = jax.jit(jax.value_and_grad(lambda *a: (sharded(*a) ** 2).sum()))(*arrays)
    alone = jax.jit(jax.value_and_grad(lambda *a: (jax.lax.map(lambda one: op(*one), a) ** 2).sum()))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), together, alone)


@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    rng = np.random.default_rng(3)
    made = [oracle.buffer(rng, 4, 2, kept=0.7) for _ in range(8)]
    arrays = [np.stack([getattr(b, name) for b in made]) for name in ("token_ids", "inv", "num_valid")]
    x = rng.normal(size=(8, 4, 3)).astype(np.float32)
    over_eight_devices(functools.partial(masked, implementation=None), (x, *arrays), check_vma=check_vma)


def test_token_shared_by_devices_adds_their_gradients():
    made = oracle.buffer(np.random.default_rng(4), 4, 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.shard_map(
        lambda x: token_gather(x, jnp.asarray(made.token_ids), jnp.asarray(made.inv), 8),
        mesh=mesh,
        in_specs=P(),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(jax.grad(lambda x: rows(x).sum())(jnp.ones((4, 3))), 16.0)


X, IDS, INV = jnp.ones((2, 3)), jnp.array([1, 0, 0, 1]), jnp.array([[1, 2], [0, 3]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((X[0], IDS, INV, 4), {}, ValueError, "x must have rank 2"),
        ((X, IDS[None], INV, 4), {}, ValueError, "token_ids must have rank 1"),
        ((X, IDS, INV[0], 4), {}, ValueError, "inv must have rank 2"),
        ((X, IDS, INV, jnp.array([4])), {}, ValueError, "num_valid must have rank 0"),
        ((X, IDS, INV[:1], 4), {}, ValueError, r"inv .*2 tokens.*\(1, 2\)"),
        ((X, IDS, INV, 5), {}, ValueError, r"num_valid .*\[0, 4\].*5"),
        ((X, IDS, INV, -1), {}, ValueError, "num_valid"),
        ((X.astype(int), IDS, INV, 4), {}, TypeError, "x must be floating"),
        ((X, IDS.astype(float), INV, 4), {}, TypeError, "token_ids must be integers"),
        ((X, IDS, INV.astype(float), 4), {}, TypeError, "inv must be integers"),
        ((X, IDS, INV, 4.0), {}, TypeError, "num_valid must be integers"),
        ((X, IDS, INV, 4), {"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        ((X, IDS, INV, 4), {"implementation": "triton"}, NotImplementedError, "token_gather.*'triton'.*'cpu'.*xla"),
    ],
)
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        token_gather(*args, **settings)


@pytest.mark.parametrize("field", [{"rows": 3}, {"columns": 0}, {"warps": 5}])
def test_impossible_tiles(field):
    with pytest.raises(ValueError, match=f"Tiles.{next(iter(field))} must be"):
        Tiles(**{"rows": 4, "columns": 64, **field})


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_with_64_bit_types(implementation):
    with jax.enable_x64(True):
        dtype = jnp.float32 if implementation == "interpret" else jnp.float64
        check(CASES[1], implementation, dtype)


@needs_aot
@needs_ptxas
@pytest.mark.latest
def test_compiled_for_h100():
    from jaxlab.core import plan

    array = jax.ShapeDtypeStruct
    x, rows = array((4096, 2048), jnp.bfloat16), array((4096 * 6, 2048), jnp.bfloat16)
    indices = array((4096 * 6,), jnp.int32), array((4096, 6), jnp.int32), array((), jnp.int32)

    def both(x, ids, inv, num_valid, cotangent):
        value, pullback = jax.vjp(lambda x: token_gather(x, ids, inv, num_valid), x)
        return value, pullback(cotangent)

    compiled = plan.compile(both, x, *indices, rows, target=plan.target("h100"), labels=["input"] * 5)
    assert compiled.bytes["temporaries"] == 0
    assert {kernel.name for kernel in compiled.kernels} == {"token_gather", "token_gather_gradient"}
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 64
        assert any(name.startswith("st.global.v4") for name in kernel.ptx_instructions), kernel.name
        assert not any(name.startswith(("atom", "red.")) for name in kernel.ptx_instructions), kernel.name
