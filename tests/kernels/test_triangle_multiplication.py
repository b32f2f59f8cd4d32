"""Triangle multiplication: every implementation against float64 numpy, gradients, transformations, bad inputs, GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab.core import plan
from pallas_kernels.triangle_multiplication import triangle_multiplication, triton, triton_backward
from pallas_kernels.triangle_multiplication import xla as xla_form
from pallas_kernels.triangle_multiplication.triton_tiles import Tiles
from tests.aot import needs_aot, needs_ptxas
from tests.oracles.triangle_multiplication import Triangle

# B, N, C, F; which normalisations there are; whether there is a mask; directions.
BOTH = ("outgoing", "incoming")
CASES = {
    "ragged": ((2, 9, 20, 12), ("ln_in", "ln_out"), True, BOTH),
    "even": ((1, 16, 16, 32), ("ln_in", "ln_out"), False, BOTH[1:]),
    "normalised": ((1, 7, 5, 24), (), True, BOTH[:1]),
    "one-pair": ((1, 1, 3, 2), ("ln_in",), True, BOTH[:1]),
}


def _inputs(shape, given=("ln_in", "ln_out"), masked=True, dtype=np.float32):
    """z, mask, weights by name (float32), and a cotangent."""
    batch, n, channels, hidden = shape
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return jnp.asarray(rng.normal(size=(rows, columns)) / np.sqrt(rows), jnp.float32)

    def affine(size):
        return jnp.asarray(1 + rng.normal(size=size) / 4, jnp.float32), jnp.asarray(rng.normal(size=size), jnp.float32)

    z, d_out = (jnp.asarray(rng.normal(size=(batch, n, n, channels)), dtype) for _ in range(2))
    mask = jnp.asarray(rng.random((batch, n, n)) < 0.7) if masked else None
    weights = {
        "ln_in": affine(channels),
        "w_proj": matrix(channels, 2 * hidden),
        "w_gate": matrix(channels, 2 * hidden),
        "ln_out": affine(hidden),
        "w_out": matrix(hidden, channels),
        "w_out_gate": matrix(channels, channels),
    }
    return z, mask, weights | {name: None for name in ("ln_in", "ln_out") if name not in given}, d_out


def _shapes(shape, dtype=jnp.float32):
    """What `_inputs` gives, as shapes."""
    batch, n, channels, hidden = shape
    weights = jax.eval_shape(lambda: _inputs((1, 1, channels, hidden))[2])
    pairs = jax.ShapeDtypeStruct((batch, n, n, channels), dtype)
    return pairs, jax.ShapeDtypeStruct((batch, n, n), bool), weights, pairs


@functools.partial(jax.jit, static_argnames=("direction", "implementation"))
def _run(z, mask, weights, d_out, direction, implementation):
    """The value, and all gradients by name."""

    def multiply(z, weights):
        return triangle_multiplication(z, mask, **weights, direction=direction, implementation=implementation)

    out, pull = jax.vjp(multiply, z, weights)
    dz, d_weights = pull(d_out)
    return out, {"z": dz, **d_weights}


def _exact(x):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)


def _compare(name, implementation, direction, dtype=jnp.float32, tolerances=(5e-6, 5e-5)):
    shape, given, masked, _ = CASES[name]
    z, mask, weights, d_out = _inputs(shape, given, masked, dtype)
    out, gradients = _run(z, mask, weights, d_out, direction, implementation)
    exact = Triangle(*_exact((z, mask)), **_exact(weights), direction=direction)
    wanted = exact.gradients(_exact(d_out))
    assert out.dtype == gradients["z"].dtype == dtype
    pairs = [("out", out, exact.out, tolerances[0])]
    for key, gradient in gradients.items():
        leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted[key]), strict=True)
        pairs += [(key, got, want, tolerances[1]) for got, want in leaves]
        assert key == "z" or all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    for what, got, want, tolerance in pairs:
        error = np.abs(_exact(got) - want).max() / np.abs(want).max()
        assert error < tolerance, (what, error)


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of a few pairs and tiles of 16, so that every case has several of them."""
    monkeypatch.setattr(xla_form, "_PAIRS", 20)
    monkeypatch.setattr(xla_form, "_CHANNELS", 5)
    monkeypatch.setattr(triton_backward, "_PROGRAMS", 4)
    for module in (triton, triton_backward):
        for name in [name for name in vars(module) if name.endswith("_TILES")]:
            monkeypatch.setattr(module, name, dict.fromkeys((2, 4), Tiles(16, 16)))
    _run.clear_cache()
    yield
    _run.clear_cache()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize(("name", "direction"), [(name, way) for name, case in CASES.items() for way in case[-1]])
def test_value_and_gradients(implementation, name, direction):
    _compare(name, implementation, direction)


@pytest.mark.latest
@pytest.mark.parametrize("implementation", [None, ("reference",)])
def test_as_shipped(implementation):
    _compare("ragged", implementation, "incoming")


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_bfloat16(implementation):
    _compare("ragged", implementation, "outgoing", jnp.bfloat16, (3e-2, 3e-2))


def test_double_precision():
    with jax.enable_x64(True):
        _compare("even", None, "outgoing", jnp.float64, (1e-12, 1e-6))  # gradients of weights are rounded to float32
        z, mask, weights, _ = _inputs((1, 5, 4, 3))
        run = jax.jit(functools.partial(triangle_multiplication, **weights), static_argnames="implementation")
        kernels, plain = (run(z, mask, implementation=name) for name in ("interpret", "reference"))
        np.testing.assert_allclose(kernels, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_invalid_pairs_are_inert(implementation):
    """What stands in a pair that is not valid changes nothing but its own result, and takes no gradient from others."""
    z, _, weights, d_out = _inputs((1, 7, 5, 6))
    valid = jnp.arange(7) < 5
    mask = (valid[:, None] & valid)[None]
    d_out = jnp.where(mask[..., None], d_out, 0)
    loud = jnp.where(mask[..., None], z, 1e3)
    out, gradients = _run(loud, mask, weights, d_out, "incoming", implementation)
    alone, own = _run(z[:, :5, :5], None, weights, d_out[:, :5, :5], "incoming", "reference")
    np.testing.assert_allclose(out[:, :5, :5], alone, atol=2e-6)
    assert not np.asarray(gradients["z"])[~np.asarray(mask)].any()
    np.testing.assert_allclose(gradients["w_proj"], own["w_proj"], atol=1e-5)
    np.testing.assert_allclose(gradients["w_out"], own["w_out"], atol=1e-5)


def test_all_pairs_invalid():
    z, mask, weights, d_out = _inputs((1, 4, 3, 2), given=("ln_in",))
    for implementation in ("reference", "xla"):
        out, gradients = _run(z, jnp.zeros_like(mask), weights, d_out, "outgoing", implementation)
        assert not np.asarray(out).any()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert not np.asarray(gradients["z"]).any()


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_vmap_and_remat(implementation):
    z, mask, weights, _ = _inputs((2, 5, 4, 3))

    def gradients(implementation):
        @jax.checkpoint
        def loss(z, mask, weights):
            return (triangle_multiplication(z[None], mask[None], **weights, implementation=implementation) ** 2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 2)), (0, 0, None)))(z, mask, weights)

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4),
        gradients(implementation),
        gradients("reference"),
    )


@pytest.mark.latest
def test_inside_shard_map():
    """A batch over four devices: the weights' gradients are summed over them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    z, mask, weights, _ = _inputs((4, 5, 4, 6))

    def local(z, mask, weights):
        return triangle_multiplication(z, mask, **weights)

    def gradients(multiply):
        return jax.jit(jax.grad(lambda z, weights: jnp.sum(multiply(z, mask, weights) ** 2), (0, 1)))(z, weights)

    data = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(data, data, PartitionSpec()), out_specs=data)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4),
        gradients(sharded),
        gradients(local),
    )


def _temporaries(implementation, n=128, width=64):
    z, mask, weights, _ = _shapes((1, n, width, width))

    def loss(z, weights, mask):
        return jnp.sum(triangle_multiplication(z, mask, **weights, implementation=implementation) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(z, weights, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * n * n * width)


def test_gradients_take_few_arrays():
    """In arrays of the size of z: a, b, t, result and cotangent, and chunks; JAX's own differentiation keeps 21."""
    ours, plain = _temporaries(None), _temporaries("reference")
    assert ours < 6
    assert ours < 0.3 * plain


def test_wrong_arguments(unchecked):
    z, mask, weights, _ = _inputs((2, 5, 4, 3))
    run = functools.partial(triangle_multiplication, z, **weights)

    def changed(**other):
        return functools.partial(triangle_multiplication, z, **(weights | other))

    scale, offset = weights["ln_in"]
    wrong = [
        (ValueError, r"z: expected 4 axes.*\(5, 5, 4\)", lambda: triangle_multiplication(z[0], **weights)),
        (ValueError, r"z: expected 4 axes.*\(2, 5, 4, 4\)", lambda: triangle_multiplication(z[:, :, :4], **weights)),
        (ValueError, "z: expected no empty axis", lambda: triangle_multiplication(z[:, :0, :0], **weights)),
        (ValueError, "w_proj: expected an even number.*5", changed(w_proj=weights["w_proj"][:, :5])),
        (ValueError, r"w_proj: expected shape \(4, 6\)", changed(w_proj=weights["w_proj"][:3])),
        (ValueError, r"w_gate: expected shape \(4, 6\).*\(4, 4\)", changed(w_gate=weights["w_gate"][:, :4])),
        (ValueError, r"w_out: expected shape \(3, 4\).*\(2, 4\)", changed(w_out=weights["w_out"][:2])),
        (ValueError, r"w_out_gate: expected shape \(4, 4\)", changed(w_out_gate=weights["w_out"])),
        (ValueError, r"ln_in offset: expected shape \(4,\)", changed(ln_in=(scale, offset[:3]))),
        (ValueError, r"ln_out scale: expected shape \(3,\)", changed(ln_out=(scale, offset))),
        (ValueError, "ln_out: expected a pair.*1 arrays", changed(ln_out=(scale,))),
        (ValueError, r"mask: expected shape \(2, 5, 5\)", lambda: run(mask[:1])),
        (ValueError, "direction: expected one of.*'both'", lambda: run(mask, direction="both")),
        (ValueError, "unknown implementation 'cudnn'", lambda: run(mask, implementation="cudnn")),
        (TypeError, "mask: expected booleans.*int32", lambda: run(mask.astype(jnp.int32))),
        (TypeError, "mask: expected booleans.*float32", lambda: run(mask.astype(jnp.float32))),
        (TypeError, "z: expected a floating", lambda: triangle_multiplication(z.astype(jnp.int32), **weights)),
        (TypeError, "w_out: expected a floating", changed(w_out=weights["w_out"].astype(jnp.int32))),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_what_the_kernels_refuse():
    z, _, weights, _ = _inputs((1, 4, 144, 3))
    with pytest.raises(NotImplementedError, match="up to 128 channels, got 144 and 3"):
        triangle_multiplication(z, **weights, implementation="interpret")
    z, _, weights, _ = _inputs((8, 4, 3, 3))
    with pytest.raises(NotImplementedError, match=r"triangle_multiplication.*'triton'.*'cpu'.*xla"):
        triangle_multiplication(z, **weights, implementation="triton")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        triangle_multiplication(z.astype(jnp.float64), **weights, implementation="interpret")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = PartitionSpec("data")
    sharded = jax.shard_map(
        lambda z: triangle_multiplication(z, **weights, implementation="interpret"),
        mesh=mesh, in_specs=data, out_specs=data,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="check_vma"):
        sharded(z)


@pytest.mark.parametrize("field", [{"channels": 48}, {"positions": 8}, {"depth": 24}, {"warps": 3}, {"stages": 0}])
def test_impossible_tiles(field):
    with pytest.raises(ValueError, match=f"Tiles.{next(iter(field))} must be"):
        Tiles(**{"channels": 64, "positions": 64, **field})


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowered_for_gpus(platform):
    z, mask, weights, d_out = _shapes((1, 24, 16, 16), jnp.bfloat16)
    for implementation in (None, "triton"):
        run = functools.partial(_run, direction="incoming", implementation=implementation)
        text = jax.jit(run).trace(z, mask, weights, d_out).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("triangle_product") >= 4


def _gradients(direction, implementation, z, mask, weights, d_out):
    def multiply(z, weights):
        return triangle_multiplication(z, mask, **weights, direction=direction, implementation=implementation)

    return jax.vjp(multiply, z, weights)[1](d_out)


def _compiled(n, direction, implementation, dtype=jnp.bfloat16, batch=1):
    shapes = _shapes((batch, n, 128, 128), dtype)
    program = functools.partial(_gradients, direction, implementation)
    return plan.compile(program, *shapes, target=plan.target("h100"), labels=["input"] * 4)


@needs_aot
@needs_ptxas
@pytest.mark.latest
def test_compiled_for_h100():
    made = _compiled(190, "incoming", None)
    assert made.bytes["temporaries"] <= 4 * 190 * 192 * 128 * 2 + 2**22  # rows padded to 16 bytes
    assert made.bytes["temporaries"] <= 0.3 * _compiled(190, "incoming", "reference").bytes["temporaries"]
    names = {kernel.name for kernel in made.kernels}
    assert {name.removeprefix("triangle_") for name in names if "product" not in name} == {
        "project", "output_dt", "output_dw", "project_dz", "project_dw"
    }  # fmt: skip
    assert {name[-2:] for name in names if "product" in name} == {"nt", "nn", "tn"}
    for kernel in made.kernels:
        assert kernel.spill_bytes == 0, kernel.name
        assert any(name.startswith("wgmma") for name in kernel.ptx_instructions), kernel.name
        assert any(name.startswith("st.global.v4") for name in kernel.ptx_instructions), kernel.name
        assert not any(name.startswith(("atom", "red")) for name in kernel.ptx_instructions), kernel.name


@needs_aot
@needs_ptxas
def test_large_problems_compiled_for_h100():
    """Offsets beyond 32 bits: arrays of 5 GiB are addressed in 64."""
    made = _compiled(1024, "outgoing", None, batch=20)
    assert made.bytes["temporaries"] <= 4.1 * 20 * 1024**2 * 128 * 2
    assert all(kernel.spill_bytes == 0 for kernel in made.kernels)
