import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.packed_moe_matmul import packed_moe_matmul, reference, triton, unpack
from pallas_kernels.packed_moe_matmul.bits import Slots
from tests.kernels import harness
from tests.oracles import packed_moe_matmul as oracle

IMPLEMENTATIONS = ("reference", "xla", "interpret")
ALL_WORDS = np.arange(2**16, dtype=np.uint16)

# Five experts: a pair, an expert alone in its slot (packed), and two in slots of their own (dense).
SLOTS, MEMBERS = np.array([1, 0, 3, 0, 2], np.int32), np.array([0, 1, 0, 0, 0], np.int32)
PACKED_SLOTS = np.array([1, 0, 2, 0, 2], np.int32)
PACKED_MEMBERS = np.array([0, 1, 0, 0, 1], np.int32)


def random_words(rng, *shape):
    """Any sign and mask, magnitudes up to 2."""
    return (rng.integers(0, 2**16, shape) & ~0x0800 | 0x0400).astype(np.uint16)


def plain(x, words, sizes, slots, members, *, implementation):
    return packed_moe_matmul(x, words, sizes, slots, members, implementation=implementation)


def gated(x, words, up, dense, dense_up, sizes, slots, members, *, implementation):
    more = {"words_up": up, "dense": dense, "dense_up": dense_up, "act": "silu"}
    return packed_moe_matmul(x, words, sizes, slots, members, implementation=implementation, **more)


def _cleared(x):
    return np.nan_to_num(x)


def plain_oracle(x, words, sizes, slots, members):
    return oracle.product(_cleared(x), oracle.matrices(words, None, slots, members), sizes)


def plain_gradients(x, words, sizes, slots, members, cotangent):
    return (oracle.gradient(oracle.matrices(words, None, slots, members), sizes, _cleared(cotangent)),)


def gated_oracle(x, words, up, dense, dense_up, sizes, slots, members):
    gate, up = oracle.matrices(words, dense, slots, members), oracle.matrices(up, dense_up, slots, members)
    return oracle.gated_product(_cleared(x), gate, up, sizes, "silu")


def gated_gradients(x, words, up, dense, dense_up, sizes, slots, members, cotangent):
    gate, up = oracle.matrices(words, dense, slots, members), oracle.matrices(up, dense_up, slots, members)
    return (oracle.gated_gradient(_cleared(x), gate, up, sizes, "silu", _cleared(cotangent)),)


OPS = {
    plain: (plain_oracle, plain_gradients),
    gated: (gated_oracle, gated_gradients),
}


def case(name, op, m, k, n, sizes):
    def make(rng):
        # Scaled so that gates stay near one.
        x, cotangent = rng.normal(size=(m, k)) / k**0.5, rng.normal(size=(m, n))
        for array in (x, cotangent):  # What rows of no expert hold must not matter.
            array[sum(sizes) :] = np.nan
        sizes_ = np.asarray(sizes, np.int32)
        if op is plain:
            return (x, random_words(rng, 3, k, n), sizes_, PACKED_SLOTS, PACKED_MEMBERS), cotangent
        words, up = random_words(rng, 2, 2, k, n)
        dense, dense_up = rng.normal(size=(2, 2, k, n))
        return (x, words, up, dense, dense_up, sizes_, SLOTS, MEMBERS), cotangent

    return op, harness.Case(name, make, max(k, n))


# Few shapes, many group sizes: a shape is compiled once. Seven rows are few: they take the decode kernel.
CASES = [
    case("plain", plain, 30, 24, 20, (7, 0, 11, 4, 8)),
    case("plain tail", plain, 30, 24, 20, (5, 9, 0, 3, 0)),
    case("plain all empty", plain, 30, 24, 20, (0, 0, 0, 0, 0)),
    case("plain one has all", plain, 30, 24, 20, (0, 30, 0, 0, 0)),
    case("gated", gated, 30, 24, 20, (7, 0, 11, 4, 8)),
    case("gated tail", gated, 30, 24, 20, (5, 9, 1, 3, 0)),
    case("plain, few rows, both of a pair", plain, 7, 24, 20, (1, 1, 2, 1, 1)),
    case("plain, few rows, uneven pair", plain, 7, 24, 20, (0, 2, 0, 4, 0)),
    case("gated, few rows, both of a pair", gated, 7, 24, 20, (1, 1, 2, 2, 1)),
    case("gated, few rows, one of a pair", gated, 7, 24, 20, (1, 2, 0, 0, 1)),
    case("one element", plain, 1, 1, 1, (0, 0, 0, 1, 0)),
    case("several tiles", plain, 150, 150, 70, (131, 1, 0, 17, 0)),
]


def check(one, implementation, dtype):
    op, inputs = one
    value, gradients = OPS[op]
    harness.check(op, inputs, implementation, dtype, oracle=value, gradients=gradients, differentiate=(0,))


@pytest.mark.parametrize("one", CASES, ids=lambda one: one[1].name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradient(one, implementation):
    check(one, implementation, jnp.float32)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("index", [4, 8])
def test_in_bfloat16(index, implementation):
    check(CASES[index], implementation, jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gelu(implementation):
    rng = np.random.default_rng(6)
    x, (words, up) = rng.normal(size=(3, 4)).astype(np.float32), random_words(rng, 2, 1, 4, 5)
    places = np.array([1, 1]), np.array([0, 0]), np.array([1, 0])
    got = packed_moe_matmul(x, words, *places, words_up=up, act="gelu", implementation=implementation)
    matrices = (oracle.matrices(stack, None, *places[1:]) for stack in (words, up))
    np.testing.assert_allclose(got, oracle.gated_product(x, *matrices, places[0], "gelu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pos", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_word(pos, dtype):
    want = oracle.unpack(ALL_WORDS, pos)
    for got in (unpack(ALL_WORDS, pos, dtype), jax.jit(unpack, static_argnums=2)(ALL_WORDS, pos, dtype)):
        assert got.dtype == dtype
        got = np.asarray(got, np.float64)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got), want < 0)  # no negative zero


@pytest.mark.parametrize(("implementation", "rows"), [("xla", 128), ("interpret", 128), ("interpret", 8)])
def test_every_word_within_the_products(implementation, rows):
    # Rows of the identity times a matrix are the matrix: nothing is rounded.
    words = ALL_WORDS.reshape(1, rows, -1)
    run = jax.jit(functools.partial(packed_moe_matmul, implementation=implementation))
    for pos in (0, 1):
        sizes = np.array([rows, 0]) if pos == 0 else np.array([0, rows])
        got = run(jnp.eye(rows), words, sizes, np.zeros(2, np.int32), np.arange(2))
        np.testing.assert_array_equal(got, oracle.unpack(words[0], pos))


def test_words_are_loaded_once_for_both_members(monkeypatch):
    loads, decodes = [], []
    load, decode = triton._load, triton.decode

    def counting_load(ref, *where):
        loads.extend([ref.shape] if ref.dtype == jnp.uint16 else [])
        return load(ref, *where)

    def counting_decode(words, pos, dtype):
        decodes.append(words.shape)
        return decode(words, pos, dtype)

    monkeypatch.setattr(triton, "_load", counting_load)
    monkeypatch.setattr(triton, "decode", counting_decode)
    places = [jnp.array([1, 1]), jnp.array([0, 0]), jnp.array([0, 1])]
    # A shape of its own, so that it is traced here.
    jax.jit(functools.partial(packed_moe_matmul, implementation="interpret")).lower(
        jnp.ones((2, 17)), jnp.ones((1, 17, 33), jnp.uint16), *places
    )
    # One loop for a row alone, one for a row and its mate's.
    assert len(loads) == 2
    assert len(decodes) == 3


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), min_size=4, max_size=4), seed=st.integers(0, 99), twins=st.booleans())
def test_any_sizes_and_addresses(implementation, cuts, seed, twins):
    rng = np.random.default_rng(seed)
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    # Any two experts may share a slot, also with the same member.
    places = rng.permutation(4) if not twins else rng.integers(0, 4, 4)
    slots, members = (part.astype(np.int32) for part in np.divmod(places, 2))
    x, words = rng.normal(size=(6, 24)).astype(np.float32), random_words(rng, 2, 24, 20)
    x[sizes.sum() :] = np.inf
    got = _compiled(implementation)(x, words, sizes, slots, members)
    want = plain_oracle(np.where(np.isinf(x), 0, x).astype(np.float64), words, sizes, slots, members)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@functools.cache
def _compiled(implementation):
    return jax.jit(functools.partial(packed_moe_matmul, implementation=implementation))


def test_reference_gradient_is_that_of_autodiff():
    rng = np.random.default_rng(1)
    x, words = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), jnp.asarray(random_words(rng, 2, 4, 5))
    sizes, slots, members = jnp.array([4, 0, 3]), jnp.array([0, 1, 0]), jnp.array([0, 0, 1])
    more = {"words_up": words[::-1], "act": "gelu"}
    weights = (Slots(words), Slots(words[::-1]))

    def by_autodiff(x):
        places = (sizes, slots, members)
        return reference.rows_times_experts(x, weights, *places, act="gelu", transpose=False, dtype=x.dtype)

    def by_hand(x):
        return packed_moe_matmul(x, words, sizes, slots, members, implementation="reference", **more)

    cotangent = jnp.asarray(rng.normal(size=(9, 5)), x.dtype)
    got, want = (jax.jit(lambda x, f=f: jax.vjp(f, x)[1](cotangent)[0])(x) for f in (by_hand, by_autodiff))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_only_rows_have_a_gradient():
    rng = np.random.default_rng(2)
    x, words = jnp.ones((4, 3)), jnp.asarray(random_words(rng, 1, 3, 2))
    dense = jnp.ones((1, 3, 2), jnp.bfloat16)
    places = jnp.array([2, 1]), jnp.array([0, 1]), jnp.array([1, 0])

    def loss(x, words, dense):
        return packed_moe_matmul(x, words, *places, dense=dense).sum()

    with pytest.raises(TypeError, match="uint16"):
        jax.grad(loss, 1)(x, words, dense)
    with pytest.raises(NotImplementedError, match=r"differentiable in x only.*stop_gradient"):
        jax.jit(jax.grad(loss, (0, 2)))(x, words, dense)
    d_x, d_words = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, words, dense)
    assert d_words.dtype == jax.dtypes.float0
    want = np.repeat([oracle.unpack(np.asarray(words[0]), 1).sum(1), [2.0] * 3, [0.0] * 3], [2, 1, 1], 0)
    np.testing.assert_allclose(d_x, want, rtol=1e-6)
    stopped = jax.grad(lambda dense: loss(x, words, jax.lax.stop_gradient(dense)))(dense)
    assert not stopped.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_traced_addresses_of_nothing_are_nan(implementation):
    words, x = jnp.full((1, 3, 2), 0x6400, jnp.uint16), jnp.ones((9, 3))
    run = jax.jit(functools.partial(packed_moe_matmul, implementation=implementation))
    for slots, members in (([1, 0], [0, 0]), ([-1, 0], [0, 0]), ([0, 0], [2, 0])):
        got = run(x, words, jnp.array([4, 3]), jnp.array(slots), jnp.array(members))
        np.testing.assert_array_equal(np.isnan(got[:, 0]), [True] * 4 + [False] * 5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_vmap_of_values_and_gradients(implementation):
    rng = np.random.default_rng(3)
    x, words = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32), jnp.asarray(random_words(rng, 2, 4, 3))
    sizes = jnp.array([[3, 4, 1], [5, 5, 0], [0, 1, 2]], jnp.int32)
    slots, members = jnp.array([0, 1, 0]), jnp.array([0, 0, 1])

    def loss(x, sizes):
        return (packed_moe_matmul(x, words, sizes, slots, members, implementation=implementation) ** 2).sum()

    batched = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, sizes)
    each = jax.jit(jax.value_and_grad(loss))
    single = [each(*one) for one in zip(x, sizes)]
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: a[i], batched)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, single[i])


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    # Rows over four, the outputs of every matrix over two: packing commutes with any split of a matrix.
    rng = np.random.default_rng(4)
    x, words = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32), jnp.asarray(random_words(rng, 2, 4, 6))
    dense = jnp.asarray(rng.normal(size=(1, 4, 6)), jnp.bfloat16)
    sizes = jnp.asarray(rng.integers(0, 3, size=(4, 4)), jnp.int32)
    slots, members = jnp.array([0, 2, 1, 0]), jnp.array([1, 0, 0, 0])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(x, words, dense, sizes):
        return packed_moe_matmul(x, words, sizes[0], slots, members, dense=dense)

    columns = P(None, None, "tensor")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), columns, columns, P("data")), out_specs=P("data", "tensor"),
        check_vma=check_vma,
    )  # fmt: skip

    def apart(x, words, dense, sizes):
        return jnp.concatenate([local(part, words, dense, own[None]) for part, own in zip(jnp.split(x, 4), sizes)])

    got, want = (
        jax.jit(jax.value_and_grad(lambda x, f=f: (f(x, words, dense, sizes) ** 2).sum()))(x) for f in (sharded, apart)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_interpreted_kernels_refuse_what_jax_cannot_interpret():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    words = jnp.ones((1, 4, 3), jnp.uint16)
    sharded = jax.shard_map(
        lambda x: packed_moe_matmul(
            x, words, jnp.array([1]), jnp.array([0]), jnp.array([0]), implementation="interpret"
        ),
        mesh=mesh, in_specs=P("data"), out_specs=P("data"),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="check_vma"):
        sharded(jnp.ones((16, 4)))


def test_no_rows_and_no_experts():
    words, none = jnp.ones((1, 3, 2), jnp.uint16), jnp.zeros((0,), jnp.int32)
    zero, one = jnp.array([0]), jnp.array([1])
    assert packed_moe_matmul(jnp.ones((0, 3), jnp.bfloat16), words, zero, zero, zero).shape == (0, 2)
    np.testing.assert_array_equal(packed_moe_matmul(jnp.ones((4, 3)), words, none, none, none), np.zeros((4, 2)))
    empty_dense = packed_moe_matmul(jnp.ones((1, 3)), words | 0x2000, one, zero, zero, dense=jnp.ones((0, 3, 2)))
    assert (empty_dense != 0).all()


@pytest.mark.usefixtures("unchecked")
def test_numpy_and_half_precision_inputs():
    words = np.full((1, 2, 2), 0x2700, np.uint16)  # one half for member 0
    for implementation in ("xla", "interpret"):
        x, places = np.ones((3, 2), np.float16), (np.array([3], np.uint8), np.array([0]), np.array([0]))
        out = packed_moe_matmul(x, words, *places, implementation=implementation)
        assert out.dtype == np.float16
        np.testing.assert_array_equal(out, np.full((3, 2), 1.0))


def test_with_64_bit_types():
    with jax.enable_x64(True):
        check(CASES[8], None, jnp.float64)
        check(CASES[6], "interpret", jnp.float32)
        x, words, one = jnp.ones((4, 2)), jnp.ones((1, 2, 3), jnp.uint16), jnp.array([0])
        with pytest.raises(NotImplementedError, match="float64"):
            packed_moe_matmul(x, words, one, one, one, implementation="interpret")


X, WORDS, DENSE = jnp.ones((6, 4)), jnp.ones((2, 4, 3), jnp.uint16), jnp.ones((1, 4, 3))
SIZES, PLACES, POS = jnp.array([2, 3]), jnp.array([0, 1]), jnp.array([0, 1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": X[0]}, ValueError, "x must have rank 2"),
        ({"words": WORDS[0]}, ValueError, "words must have rank 3"),
        ({"group_sizes": SIZES[None]}, ValueError, "group_sizes must have rank 1"),
        ({"x": X[:, :3]}, ValueError, r"agree in k.*\(6, 3\).*\(2, 4, 3\)"),
        ({"words": WORDS[:0]}, ValueError, "at least one slot"),
        ({"slot_of": jnp.array([0, 1, 0])}, ValueError, "slot_of must have one entry for each of the 2 experts"),
        ({"pos_of": jnp.array([0])}, ValueError, "pos_of must have one entry"),
        ({"slot_of": jnp.array([0, 2])}, ValueError, "slot_of must be below the 2 slots, got 2 for expert 1"),
        ({"slot_of": jnp.array([-1, 2])}, ValueError, "got -1 for expert 0"),
        ({"slot_of": jnp.array([0, 3]), "dense": DENSE}, ValueError, "below the 3 slots"),
        ({"pos_of": jnp.array([0, 2])}, ValueError, "pos_of must be 0 or 1, got 2"),
        ({"group_sizes": jnp.array([-1, 2])}, ValueError, "negative"),
        ({"group_sizes": jnp.array([4, 3])}, ValueError, "sum to 7.* 6 rows"),
        ({"group_sizes": jnp.array([2.0, 3.0])}, TypeError, "group_sizes must be integers"),
        ({"slot_of": jnp.array([0.0, 1.0])}, TypeError, "slot_of must be integers"),
        ({"x": X.astype(int)}, TypeError, "x must be floating"),
        ({"words": WORDS.astype(jnp.int16)}, TypeError, "words must be uint16, got int16"),
        ({"words": WORDS.astype(jnp.bfloat16)}, TypeError, "words must be uint16, got bfloat16"),
        ({"words_up": WORDS}, ValueError, "words_up and act go together, got act=None with"),
        ({"act": "silu"}, ValueError, "got act='silu' without words_up"),
        ({"words_up": WORDS, "act": "tanh"}, ValueError, "unknown act 'tanh'.*silu.*gelu"),
        ({"words_up": WORDS[:1], "act": "silu"}, ValueError, "words_up must have the shape of words"),
        ({"words_up": X, "act": "silu"}, TypeError, "words_up must be uint16"),
        ({"words_up": WORDS, "act": "silu", "dense": DENSE}, ValueError, "dense and dense_up go together"),
        ({"dense_up": DENSE}, ValueError, "dense_up goes with words_up"),
        ({"dense": DENSE[:, :3]}, ValueError, r"dense must be \[slots, 4, 3\]"),
        ({"dense": DENSE.astype(int)}, TypeError, "dense must be floating"),
        (
            {"dense": DENSE, "dense_up": jnp.ones((2, 4, 3)), "words_up": WORDS, "act": "silu"},
            ValueError,
            "dense_up must have the shape of dense",
        ),
        ({"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        ({"implementation": "triton"}, NotImplementedError, "packed_moe_matmul.*'triton'.*'cpu'.*xla"),
    ],
)
def test_bad_inputs(changed, error, match):
    good = {"x": X, "words": WORDS, "group_sizes": SIZES, "slot_of": PLACES, "pos_of": POS}
    with pytest.raises(error, match=match):
        packed_moe_matmul(**(good | changed))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((WORDS.astype(jnp.int32), 0), TypeError, "words must be uint16, got int32"),
        ((WORDS, 2), ValueError, "pos must be 0 or 1, got 2"),
        ((WORDS, -1), ValueError, "pos must be 0 or 1, got -1"),
        ((WORDS, jnp.array([0, 1, 3])), ValueError, "got 3"),
        ((WORDS, 0.0), TypeError, "pos must be an integer"),
        ((WORDS, jnp.array([0, 1])), ValueError, r"broadcast.*\(2,\).*\(2, 4, 3\)"),
        ((WORDS, 0, jnp.int32), TypeError, "dtype must be floating, got int32"),
    ],
)
def test_bad_inputs_of_unpack(args, error, match):
    with pytest.raises(error, match=match):
        unpack(*args)


def test_unpack_broadcasts_positions_and_traces_them():
    words = jnp.asarray(random_words(np.random.default_rng(5), 2, 3, 4))
    pos = jnp.array([1, 0])[:, None, None]
    want = np.stack([oracle.unpack(np.asarray(w), p) for w, p in zip(words, (1, 0))])
    for got in (unpack(words, pos), jax.jit(unpack)(words, pos), jax.vmap(unpack)(words, pos[:, 0, 0])):
        np.testing.assert_array_equal(np.asarray(got, np.float64), want)
    wrong = np.isnan(jax.jit(unpack)(words, pos * 2))
    np.testing.assert_array_equal(wrong, np.broadcast_to(np.array([True, False])[:, None, None], wrong.shape))
    assert unpack(words, 1, jnp.float16).dtype == jnp.float16
