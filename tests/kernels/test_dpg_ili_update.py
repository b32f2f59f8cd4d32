"""dpg_ili_update against a float64 oracle: values, exactness of equal branches, compiled for GPUs, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from pallas_kernels.dpg_ili_update import dpg_ili_update, triton
from tests.aot import needs_aot, needs_ptxas
from tests.oracles.dpg_ili_update import update

NAMES = ("z", "z_src", "z_inv", "eps_null", "eps_src", "eps_tgt", "eps_cross",
         "gamma", "t_start", "t_end", "t", "t_next", "mask", "w_cfg", "w_dpg")  # fmt: skip
SHAPES = {"square": (2, 8, 8, 4), "ragged": (1, 5, 7, 3), "one": (1, 1, 1, 1)}
# gamma, t_start, t_end, t, t_next: a whole window, a step within one, one that ends within it.
STEPS = ((0.286879, 1.0, 0.75, 1.0, 0.75), (0.641170, 0.5, 0.25, 0.375, 0.25), (0.822196, 0.25, 0.0, 0.25, 0.125))


def _arrays(name, step=STEPS[0], dtype=np.float32, eps_dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = SHAPES[name]
    latents = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    predictions = (jnp.asarray(rng.normal(size=shape), eps_dtype) for _ in range(4))
    mask = jnp.asarray(rng.random(shape[:3]) < 0.5)
    return dict(zip(NAMES, (*latents, *predictions, *step, mask, 1.1, 3.0)))


@functools.partial(jax.jit, static_argnames="implementation")
def _run(args, *, implementation=None):
    return dpg_ili_update(**args, implementation=implementation)


def _compare(args, implementation, tolerance=2e-6):
    got = _run(args, implementation=implementation)
    want = update(*args.values())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == args["z"].dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max())


@pytest.mark.latest
@pytest.mark.parametrize("implementation", ["reference", None, "interpret"])
@pytest.mark.parametrize(("name", "step"), [("square", STEPS[0]), ("ragged", STEPS[1]), ("ragged", STEPS[2]),
                                            ("one", STEPS[1])])  # fmt: skip
def test_values(name, step, implementation):
    _compare(_arrays(name, step), implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_dtypes(implementation):
    """Predictions of a network in bfloat16, and latents too: sums and steps are float32 all the same."""
    _compare(_arrays("ragged", eps_dtype=jnp.bfloat16), implementation)
    _compare(_arrays("ragged", dtype=jnp.bfloat16, eps_dtype=jnp.bfloat16), implementation, 2**-8)


def test_several_blocks_of_places(monkeypatch):
    monkeypatch.setattr(triton, "_BLOCK", 16)
    _run.clear_cache()
    _compare(_arrays("ragged"), "interpret")
    _run.clear_cache()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_branches_give_the_inversion_bit_for_bit(implementation, dtype):
    """Whatever the network predicts, small or large, and however its sums are rounded."""
    for size in (1e-9, 1e-4, 1.0, 1e4):
        args = _arrays("square", STEPS[1], dtype, dtype)
        args |= {"z_src": args["z"], "eps_null": args["eps_null"] * size, "w_cfg": 1.7, "w_dpg": 4.3}
        args |= dict.fromkeys(("eps_src", "eps_tgt", "eps_cross"), args["eps_src"] * size)
        for got in _run(args, implementation=implementation):
            np.testing.assert_array_equal(got, args["z_inv"])


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_a_source_prompt_that_says_nothing(implementation):
    """Without a direction nothing is projected out; a channel in which there is one is not concerned."""
    args = _arrays("square")
    args["eps_cross"] = args["eps_cross"].at[..., :2].set(args["eps_null"][..., :2])
    args["eps_cross"] = args["eps_cross"].at[..., 1].add(1e-8)
    assert np.isfinite(_run(args, implementation=implementation)[0]).all()
    _compare(args, implementation)


def test_scalars_compile_nothing_anew():
    run = jax.jit(lambda args: dpg_ili_update(**args))
    for step in STEPS:
        run(_arrays("square", step) | {"w_dpg": step[0]})
    assert run._cache_size() == 1


def test_over_a_mesh():
    """Images divided over devices."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    args = {name: jnp.asarray(value) for name, value in _arrays("square").items()}
    specs = {name: P("data") if value.ndim else P() for name, value in args.items()}
    sharded = jax.shard_map(_run, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
    for got, want in zip(jax.jit(sharded)(args), _run(args)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_places():
    args = _arrays("square")
    none = {name: value[:0] if np.ndim(value) else value for name, value in args.items()}
    assert [x.shape for x in dpg_ili_update(**none)] == [(0, 8, 8, 4)] * 2


@needs_aot
@needs_ptxas
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_compiled_for_gpus(gpu):
    """One kernel; beside its results a few scalars are stored."""
    args = {k: jax.ShapeDtypeStruct(np.shape(v), jnp.asarray(v).dtype) for k, v in _arrays("square").items()}
    image, places = (jax.ShapeDtypeStruct((4, 64, 64, *rest), args[x].dtype) for x, rest in (("z", (4,)), ("mask", ())))
    args = {k: x if not x.shape else places if k == "mask" else image for k, x in args.items()}
    made = plan.compile(dpg_ili_update, *args.values(), target=plan.target(gpu), labels=["input"] * len(args))
    (kernel,) = made.kernels
    assert kernel.name == "dpg_ili_update"
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 64
    assert made.bytes["temporaries"] <= 2**10


def test_no_derivative():
    args = _arrays("square")
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(lambda z: dpg_ili_update(**(args | {"z": z}))[0].sum())(args["z"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("z", np.zeros((8, 8, 4), np.float32), ValueError, "z: expected 4 axes"),
        ("z_inv", np.zeros((1, 8, 8, 4), np.float32), ValueError, "z_inv: expected the shape of z"),
        ("eps_tgt", np.zeros((2, 8, 8, 3), np.float32), ValueError, "eps_tgt: expected the shape of z"),
        ("z_src", np.zeros((2, 8, 8, 4), np.float16), TypeError, "z_src: expected z's dtype"),
        ("eps_src", np.zeros((2, 8, 8, 4), np.float16), TypeError, "eps_src: expected eps_null's dtype"),
        ("z", np.zeros((2, 8, 8, 4), np.int32), TypeError, "z: expected z's dtype, floating"),
        ("mask", np.zeros((2, 8, 8, 4), bool), ValueError, "mask: expected shape"),
        ("mask", np.zeros((2, 8, 8), np.float32), TypeError, "mask: expected booleans"),
        ("gamma", np.ones(2, np.float32), ValueError, "gamma: expected a number or a scalar"),
    ],
)
def test_bad_arguments(name, value, error, said):
    with pytest.raises(error, match=said):
        dpg_ili_update(**(_arrays("square") | {name: value}))
