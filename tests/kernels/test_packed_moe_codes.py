"""Quantised pairs: the bytes of a position in 8 and 6 bits, and products with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.packed_moe_matmul import pack_codes, packed_moe_matmul, triton, unpack_codes
from tests.aot import needs_aot, needs_ptxas
from tests.kernels import harness
from tests.kernels.test_packed_moe_matmul import IMPLEMENTATIONS, MEMBERS, SLOTS
from tests.oracles import packed_moe_matmul as oracle

DIRECTIONS = np.array([pair for pair in np.ndindex(3, 3) if pair != (1, 1)]) - 1
# By bits of a position, groups that the Triton kernels take.
GROUPS = {8: 32, 6: 64}


def random_codes(rng, bits, *shape, group):
    *slots, k, n = shape
    codes = rng.integers(0, 256, (*slots, k * bits // 8, n), np.uint8)
    # Weights below 2.
    return codes, rng.uniform(1, 2, (*slots, k // group, n)) / 2 ** (bits - 3)


@pytest.mark.latest
@pytest.mark.parametrize("bits", [8, 6])
def test_every_code_of_both_members(bits):
    levels = 2 ** (bits - 3)
    pairs = np.repeat(DIRECTIONS, levels, 0)
    level = np.tile(np.arange(levels), 8)
    # In any order, so that the quarters of a group see different ones.
    order = np.random.default_rng(0).permutation(level.size)
    first, second, level = (np.stack([part, part[::-1]], 1)[order] for part in (*pairs.T, level))
    codes = pack_codes(first, second, level, bits=bits, group_size=16)
    assert codes.shape == (8 * levels * bits // 8, 2)
    scales = np.full((levels // 2, 2), 0.5, np.float32)
    for pos, coefficient in enumerate((first, second)):
        for dtype in (jnp.bfloat16, jnp.float32):
            got = unpack_codes(codes, scales, pos, dtype, bits=bits)
            assert got.dtype == dtype
            np.testing.assert_array_equal(np.asarray(got, float), coefficient * level / 2)
        np.testing.assert_array_equal(oracle.codes(np.asarray(codes), scales, pos, bits), coefficient * level / 2)


@settings(max_examples=15, deadline=None)
@given(bits=st.sampled_from([8, 6]), seed=st.integers(0, 99), pos=st.integers(0, 1))
def test_any_bytes_and_slices(bits, seed, pos):
    rng = np.random.default_rng(seed)
    codes, scales = random_codes(rng, bits, 2, 24, 3, group=8)
    scales = jnp.asarray(scales, jnp.bfloat16)
    want = np.stack([oracle.codes(c, np.asarray(s, float), pos, bits) for c, s in zip(codes, scales)])
    got = unpack_codes(codes, scales, pos, jnp.float32, bits=bits)
    np.testing.assert_array_equal(np.asarray(got, float), want)
    # A slice of groups, or of columns, is a slice of the bytes.
    rows = codes.shape[1] // 3
    part = unpack_codes(codes[:, rows : 2 * rows, 1:], scales[:, 1:2, 1:], pos, jnp.float32, bits=bits)
    np.testing.assert_array_equal(part, got[:, 8:16, 1:])


def plain(x, codes, scales, sizes, slots, members, *, implementation):
    return packed_moe_matmul(x, codes, sizes, slots, members, scales=scales, implementation=implementation)


def gated(x, codes, up, scales, scales_up, dense, dense_up, sizes, slots, members, *, implementation):
    more = {"words_up": up, "dense": dense, "dense_up": dense_up, "scales": scales, "scales_up": scales_up}
    return packed_moe_matmul(x, codes, sizes, slots, members, act="silu", implementation=implementation, **more)


def experts_of(codes, scales, dense, slots, members):
    # As many bits as make the dense stack's inputs of the rows.
    bits = 8 * codes.shape[1] // dense.shape[1]
    return np.stack(
        [
            oracle.codes(codes[s], scales[s], p, bits) if s < len(codes) else dense[s - len(codes)]
            for s, p in zip(slots, members)
        ]
    )


def matrices(x, codes, scales, slots, members):
    return experts_of(codes, scales, np.zeros((0, x.shape[1], 1)), slots, members)


def plain_oracle(x, codes, scales, sizes, slots, members):
    return oracle.product(np.nan_to_num(x), matrices(x, codes, scales, slots, members), sizes)


def plain_gradients(x, codes, scales, sizes, slots, members, cotangent):
    return (oracle.gradient(matrices(x, codes, scales, slots, members), sizes, np.nan_to_num(cotangent)),)


def gated_oracle(x, codes, up, scales, scales_up, dense, dense_up, sizes, slots, members):
    both = (experts_of(*of, slots, members) for of in ((codes, scales, dense), (up, scales_up, dense_up)))
    return oracle.gated_product(np.nan_to_num(x), *both, sizes, "silu")


def gated_gradients(x, codes, up, scales, scales_up, dense, dense_up, sizes, slots, members, cotangent):
    both = (experts_of(*of, slots, members) for of in ((codes, scales, dense), (up, scales_up, dense_up)))
    return (oracle.gated_gradient(np.nan_to_num(x), *both, sizes, "silu", np.nan_to_num(cotangent)),)


OPS = {plain: (plain_oracle, plain_gradients), gated: (gated_oracle, gated_gradients)}


def case(name, op, bits, m, k, n, sizes, group):
    def make(rng):
        x, cotangent = rng.normal(size=(m, k)) / k**0.5, rng.normal(size=(m, n))
        for array in (x, cotangent):  # What rows of no expert hold must not matter.
            array[sum(sizes) :] = np.nan
        places = (np.asarray(sizes, np.int32), SLOTS, MEMBERS)
        codes, scales = random_codes(rng, bits, 4 if op is plain else 2, k, n, group=group)
        if op is plain:
            return (x, codes, scales, *places), cotangent
        dense, dense_up = rng.normal(size=(2, 2, k, n))
        return (x, codes, codes[::-1], scales, scales[::-1], dense, dense_up, *places), cotangent

    return op, harness.Case(name, make, max(k, n))


# Rows of many and of few (the decode kernel); groups of several steps, and matrices of several tiles.
CASES = [
    case(f"{bits} bits, {name}", op, bits, m, k, n, sizes, group * GROUPS[bits])
    for bits in (8, 6)
    for name, op, m, k, n, sizes, group in (
        ("gated", gated, 30, 128, 20, (7, 0, 11, 4, 8), 1),
        ("gated, few rows", gated, 7, 128, 20, (1, 1, 2, 2, 1), 1),
        ("plain, several tiles", plain, 150, 512, 70, (131, 1, 0, 17, 0), 4),
    )
]


@pytest.mark.parametrize("one", CASES, ids=lambda one: one[1].name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradient(one, implementation):
    check(one, implementation, jnp.float32)


@pytest.mark.latest
@pytest.mark.parametrize(("index", "implementation"), [(0, "interpret"), (4, "interpret"), (3, "xla")])
def test_in_bfloat16(index, implementation):
    check(CASES[index], implementation, jnp.bfloat16)


def check(one, implementation, dtype):
    op, inputs = one
    value, gradients = OPS[op]
    harness.check(op, inputs, implementation, dtype, oracle=value, gradients=gradients, differentiate=(0,))


@pytest.mark.parametrize("bits", [8, 6])
def test_bytes_are_loaded_once_for_both_members(monkeypatch, bits):
    loads, decoded = [], []
    load, decode = triton._load, triton.decode_run

    def counting_load(ref, *where):
        loads.extend([ref.shape] if ref.dtype == jnp.uint8 else [])
        return load(ref, *where)

    def counting_decode(planes, *rest):
        decoded.append(planes)
        return decode(planes, *rest)

    monkeypatch.setattr(triton, "_load", counting_load)
    monkeypatch.setattr(triton, "decode_run", counting_decode)
    places = [jnp.array([1, 1]), jnp.array([0, 0]), jnp.array([0, 1])]
    codes, scales = jnp.ones((1, 64 * bits // 8, 33), jnp.uint8), jnp.ones((1, 1, 33))
    # A shape of its own, so that it is traced here.
    jax.jit(functools.partial(packed_moe_matmul, implementation="interpret")).lower(
        jnp.ones((2, 64)), codes, *places, scales=scales
    )
    # One loop for a row alone, one for a row and its mate's; of 6 bits three planes and four runs.
    planes, runs = (1, 1) if bits == 8 else (3, 4)
    assert (len(loads), len(decoded)) == (2 * planes, 3 * runs)


@pytest.mark.parametrize("bits", [8, 6])
def test_eight_devices(bits):
    # Whole groups of inputs over four devices and outputs over two: slices of the bytes and of the scales.
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(9, 128)), jnp.float32)
    codes, scales = map(jnp.asarray, random_codes(rng, bits, 2, 128, 6, group=32))
    places = jnp.array([3, 2, 4]), jnp.array([0, 1, 0]), jnp.array([1, 0, 0])
    mesh = jax.make_mesh((4, 2), ("inputs", "outputs"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(x, codes, scales):
        return jax.lax.psum(packed_moe_matmul(x, codes, *places, scales=scales), "inputs")

    split = P(None, "inputs", "outputs")
    specs = {"in_specs": (P(None, "inputs"), split, split), "out_specs": P(None, "outputs")}
    got = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(x, codes, scales)
    np.testing.assert_allclose(got, packed_moe_matmul(x, codes, *places, scales=scales), rtol=1e-4, atol=1e-5)


def test_vmap_and_traced_members():
    rng = np.random.default_rng(3)
    codes, scales = map(jnp.asarray, random_codes(rng, 6, 2, 16, 3, group=8))
    x, sizes = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32), jnp.array([[3, 2], [0, 4]])

    def run(x, sizes):
        return packed_moe_matmul(x, codes, sizes, jnp.array([1, 0]), jnp.array([0, 1]), scales=scales)

    batched = jax.jit(jax.vmap(run))(x, sizes)
    for got, one, own in zip(batched, x, sizes):
        np.testing.assert_allclose(got, run(one, own), rtol=1e-5, atol=1e-5)
    pos = jnp.array([1, 2])[:, None, None]
    weights = jax.jit(functools.partial(unpack_codes, bits=6))(codes, scales, pos)
    np.testing.assert_array_equal(weights[0], unpack_codes(codes[0], scales[0], 1, bits=6))
    assert np.isnan(weights[1].astype(jnp.float32)).all()


def test_scales_have_no_gradient_and_small_groups_no_kernel():
    codes, scales = jnp.ones((1, 8, 2), jnp.uint8), jnp.ones((1, 1, 2))
    places = jnp.array([2]), jnp.array([0]), jnp.array([0])

    def loss(scales, implementation=None):
        return packed_moe_matmul(jnp.ones((2, 8)), codes, *places, scales=scales, implementation=implementation).sum()

    with pytest.raises(NotImplementedError, match=r"differentiable in x only.*scales"):
        jax.grad(loss)(scales)
    with pytest.raises(NotImplementedError, match=r"multiple of 16 inputs.*8 bits.*got 8"):
        loss(scales, "interpret")
    assert loss(scales, ("interpret", "xla")) == loss(scales)


X, CODES, SCALES = jnp.ones((6, 16)), jnp.ones((2, 16, 3), jnp.uint8), jnp.ones((2, 2, 3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"scales": None}, TypeError, "words must be uint16, got uint8"),
        ({"words": CODES.astype(jnp.uint16)}, TypeError, "words must be uint8.*scales.*got uint16"),
        ({"words": CODES[:, :15]}, ValueError, r"r = k \(8 bits\) or r = 3 k / 4.*\(2, 15, 3\) and k = 16"),
        ({"scales": SCALES.astype(int)}, TypeError, "scales must be floating"),
        ({"scales": SCALES[:1]}, ValueError, r"scales must be \[2, groups, 3\]"),
        ({"scales": jnp.ones((2, 3, 3))}, ValueError, "as many groups as divide k = 16"),
        ({"scales": SCALES[:, :0]}, ValueError, "as many groups as divide k = 16"),
        ({"scales": jnp.ones((2, 8, 3))}, ValueError, "multiple of 4 inputs, got 2"),
        ({"scales_up": SCALES}, ValueError, "scales_up must be given with scales and words_up"),
        ({"words_up": CODES, "act": "silu"}, ValueError, "scales_up must be given with scales and words_up"),
        (
            {"words_up": CODES.astype(jnp.uint16), "act": "silu", "scales_up": SCALES},
            TypeError,
            "words_up must be uint8",
        ),
        ({"words_up": CODES, "act": "silu", "scales_up": SCALES[:, :1]}, ValueError, "the same for both"),
        ({"dense": jnp.ones((1, 12, 3)), "words": CODES[:, :12]}, ValueError, r"dense must be \[slots, 16, 3\]"),
    ],
)
def test_bad_inputs(changed, error, match):
    places = {"group_sizes": jnp.array([2, 3]), "slot_of": jnp.array([0, 1]), "pos_of": jnp.array([0, 1])}
    with pytest.raises(error, match=match):
        packed_moe_matmul(**({"x": X, "words": CODES, "scales": SCALES} | places | changed))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((CODES.astype(int), SCALES, 0), {}, TypeError, "codes must be uint8"),
        ((CODES, SCALES.astype(int), 0), {}, TypeError, "scales must be floating"),
        ((CODES, SCALES, 0, jnp.int32), {}, TypeError, "dtype must be floating"),
        ((CODES, SCALES, 0.0), {}, TypeError, "pos must be an integer"),
        ((CODES, SCALES, 2), {}, ValueError, "pos must be 0 or 1, got 2"),
        ((CODES, SCALES[0], 0), {}, ValueError, "must agree"),
        ((CODES, SCALES, 0), {"bits": 7}, ValueError, "bits must be one of 8, 6, got 7"),
        ((CODES[:, :14], SCALES, 0), {"bits": 6}, ValueError, "14 rows of 6 bits.*2 groups"),
        ((CODES, jnp.ones((2, 8, 3)), 0), {}, ValueError, "multiple of 4 inputs, got 2"),
    ],
)
def test_bad_inputs_of_unpack_codes(args, settings, error, match):
    with pytest.raises(error, match=match):
        unpack_codes(*args, **({"bits": 8} | settings))


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs_of_pack_codes():
    ones = np.ones((8, 2), int)
    for bits, size, match in ((4, 8, "bits must be one of"), (8, 6, "multiple of 4"), (8, 12, "do not divide 8")):
        with pytest.raises(ValueError, match=match):
            pack_codes(ones, ones, ones, bits=bits, group_size=size)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("rows", [2, 256])
def test_never_holds_more_than_a_decoded_matrix_and_a_half(rows, bits):
    k, n, array = 1024, 3584, jax.ShapeDtypeStruct
    codes, scales = array((4, k * bits // 8, n), jnp.uint8), array((4, k // 128, n), jnp.bfloat16)
    args = array((rows, k), jnp.bfloat16), codes, *[array((8,), jnp.int32)] * 3
    compiled = jax.jit(packed_moe_matmul).lower(*args, scales=scales).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * 2 * k * n


def _programs(x, codes, scales, dense, sizes, slots, members):
    more = {"scales": scales, "dense": dense}
    single = packed_moe_matmul(x, codes, sizes, slots, members, **more)
    more |= {"words_up": codes, "scales_up": scales, "dense_up": dense, "act": "silu"}
    return single, packed_moe_matmul(x, codes, sizes, slots, members, **more)


def _gradient(x, codes, scales, dense, sizes, slots, members):
    cotangent = jnp.ones((x.shape[0], codes.shape[2]), x.dtype) * x[0, 0]
    run = functools.partial(packed_moe_matmul, scales=scales, dense=dense)
    return jax.vjp(lambda x: run(x, codes, sizes, slots, members), x)[1](cotangent)


@functools.cache
def _kernels(gpu):
    from jaxlab.core import plan

    array, found = jax.ShapeDtypeStruct, {}
    for bits in (8, 6):
        for program, rows in ((_programs, 4096), (_gradient, 4096), (_programs, 8)):
            places = [array((8,), jnp.int32)] * 3
            codes, scales = array((3, 512 * bits // 8, 256), jnp.uint8), array((3, 4, 256), jnp.bfloat16)
            dense = array((2, 512, 256), jnp.bfloat16)
            args = array((rows, 512), jnp.bfloat16), codes, scales, dense, *places
            compiled = plan.compile(program, *args, target=plan.target(gpu), labels=["input"] * len(args))
            # The gradient's program makes its own cotangent.
            assert compiled.bytes["temporaries"] <= (2 * rows * 256 + 2**10 if program is _gradient else 0)
            found |= {kernel.name: kernel for kernel in compiled.kernels}
    return found


@needs_aot
def test_compiled_for_h100_without_temporaries():
    kernels = _kernels("h100")
    tiled = {"gmm", "gated_gmm", "gmm_transposed"}
    assert set(kernels) == {f"packed{bits}_{name}" for bits in (8, 6) for name in tiled | {"gemv", "gated_gemv"}}
    for name in (f"packed{bits}_{name}" for bits in (8, 6) for name in tiled):
        instructions = kernels[name].ptx_instructions
        assert any(op.startswith("wgmma") for op in instructions), name
        assert any(op.startswith("cp.async.cg") for op in instructions), name
        assert any(op.startswith("st.global.v4") for op in instructions), name


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(("gpu", "limit"), [("h100", 180), ("a100", 255)])
def test_registers_without_spills(gpu, limit):
    for name, kernel in _kernels(gpu).items():
        assert kernel.spill_bytes == 0, name
        assert kernel.registers <= limit, name
