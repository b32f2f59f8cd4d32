import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import PartitionSpec as P

from pallas_kernels import compat
from pallas_kernels.dispatch import NoImplementation, dispatch, output_like, zeros_alike
from tests.aot import needs_aot

X = jnp.arange(16.0, dtype=jnp.float32)


def _double_kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2


def _triton(x):
    return pl.pallas_call(
        _double_kernel,
        out_shape=output_like(x.shape, x.dtype, x),
        compiler_params=plt.CompilerParams(num_warps=1),
        name="double",
    )(x)


def _picky(x):
    raise NotImplementedError("only on Sundays")


def _wrong(x):
    raise ValueError("x is wrong")


TABLE = {
    "reference": lambda x: x + x,
    "xla": lambda x: x * 2,
    "triton": _triton,
    "picky": _picky,
    "wrong": _wrong,
}


def double(x, implementation=None):
    return dispatch("double", TABLE, implementation, x)


@jax.custom_vjp
def differentiable(x):
    return double(x)


differentiable.defvjp(lambda x: (double(x), None), lambda _, g: (double(g),))


def lowered(fn, x, platform):
    return jax.jit(fn).trace(x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.latest
def test_one_trace_runs_here_and_lowers_for_gpus():
    for fn, x in ((double, X), (jax.vmap(double), X[None]), (jax.grad(lambda x: differentiable(x).sum()), X)):
        np.testing.assert_array_equal(jax.jit(fn)(x).ravel(), fn(x).ravel())
        assert "triton" in lowered(fn, x, "cuda")
        assert "triton" in lowered(fn, x, "rocm")
        assert "triton" not in lowered(fn, x, "cpu")
    np.testing.assert_array_equal(jax.grad(lambda x: differentiable(x).sum())(X), np.full(16, 2.0))


@pytest.mark.latest
def test_within_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for check_vma in (True, False):
        sharded = jax.shard_map(double, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
        np.testing.assert_array_equal(jax.jit(sharded)(X), X * 2)
        named = jax.shard_map(
            lambda x: double(x, "triton"), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
        )
        with pytest.raises(NotImplementedError, match="'cpu'"):
            jax.jit(named)(X)


@needs_aot
@pytest.mark.latest
def test_compiles_for_a_gpu_from_a_cpu():
    from jaxlab.core import plan

    args = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for fn in (double, lambda x: double(x, "triton"), lambda x: double(x, ("picky", "triton"))):
        compiled = plan.compile(fn, args, target=plan.target("h100"), labels=["input"])
        assert [kernel.name for kernel in compiled.kernels] == ["double"]


@pytest.mark.latest
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])])
def test_named_implementation_that_the_platform_cannot_serve(transform):
    with pytest.raises(NotImplementedError, match=r"double.*'triton'.*'cpu'.*reference, xla") as error:
        transform(lambda x: double(x, "triton"))(X)
    assert isinstance(error.value, ExceptionGroup)
    assert "triton" in str(error.value.exceptions[0])
    assert "cuda" in str(error.value.exceptions[0])


def test_names_are_tried_in_order():
    np.testing.assert_array_equal(double(X, ("triton", "reference")), X * 2)
    assert "triton" in lowered(lambda x: double(x, ["triton", "xla"]), X, "cuda")
    assert "triton" not in lowered(lambda x: double(x, ["xla", "triton"]), X, "cuda")
    np.testing.assert_array_equal(double(X, ("picky", "xla")), X * 2)


def test_all_reasons_are_raised_together():
    with pytest.raises(NoImplementation, match="'picky', 'triton'") as error:
        double(X, ("picky", "triton"))
    assert {str(reason) for reason in error.value.exceptions} == {
        "only on Sundays",
        "double: 'triton' runs on cuda and rocm only, not on 'cpu'",
    }
    with pytest.raises(ExceptionGroup) as error:
        double(X, "picky")
    assert [str(reason) for reason in error.value.exceptions] == ["only on Sundays"]
    assert isinstance(error.value.split(NotImplementedError)[0], NoImplementation)


def test_refusals_of_the_default_order():
    table = {**TABLE, "triton": _picky}
    np.testing.assert_array_equal(dispatch("double", table, None, X), X * 2)
    assert "triton" not in lowered(lambda x: dispatch("double", table, None, x), X, "cuda")
    only_gpu = {"xla": _picky, "triton": _triton}
    assert "triton" in lowered(lambda x: dispatch("double", only_gpu, None, x), X, "cuda")
    with pytest.raises(NotImplementedError, match="'cpu'"):
        dispatch("double", only_gpu, None, X)
    np.testing.assert_array_equal(dispatch("double", {"reference": TABLE["reference"]}, None, X), X * 2)
    mosaic = {"mosaic": _triton, "xla": TABLE["xla"]}
    assert "triton" in lowered(lambda x: dispatch("double", mosaic, None, x), X, "cuda")
    assert "triton" not in lowered(lambda x: dispatch("double", mosaic, None, x), X, "rocm")


def test_wrong_arguments_are_never_hidden():
    with pytest.raises(ValueError, match="x is wrong"):
        double(X, ("wrong", "xla"))


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, xla, triton, picky, wrong"):
        double(X, "cuda")
    with pytest.raises(ValueError, match="'mosaic'"):
        double(X, ("xla", "mosaic"))
    with pytest.raises(ValueError, match="empty"):
        double(X, ())
    with pytest.raises(TypeError, match="3"):
        double(X, (3,))


def test_static_settings_and_pytrees():
    table = {"xla": lambda tree, *, scale: {"out": tree["a"] * scale}}
    np.testing.assert_array_equal(dispatch("scaled", table, None, {"a": X}, scale=3)["out"], X * 3)


@pytest.mark.latest
def test_tracing_context_names_the_device():
    with compat.tracing_for("NVIDIA A100-SXM4-80GB"):
        assert jax.sharding.get_abstract_mesh().abstract_device.device_kind == "NVIDIA A100-SXM4-80GB"
        with compat.default_device_for("cuda"):
            assert jax.sharding.get_abstract_mesh().abstract_device.device_kind == "NVIDIA A100-SXM4-80GB"
    with compat.default_device_for("cuda"):
        assert "H100" in jax.sharding.get_abstract_mesh().abstract_device.device_kind
    with compat.default_device_for(None):
        assert jax.sharding.get_abstract_mesh().abstract_device is None
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with compat.tracing_for(mesh=mesh):
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh


@pytest.mark.latest
def test_backend_deprecation_is_silent():
    with warnings.catch_warnings(record=True) as seen:
        compat.silence_triton_deprecation()
        lowered(double, X + 1, "cuda")
    assert not [warning for warning in seen if "Triton" in str(warning.message)]


@pytest.mark.latest
def test_compute_on_host():
    run = jax.jit(compat.compute_on(lambda x: x * 2, compute_type="device_host"))
    np.testing.assert_array_equal(run(X), X * 2)


def test_zeros_vary_as_their_model():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(x):
        return jax.lax.fori_loop(0, 3, lambda _, carry: carry + x, zeros_alike(x.shape, x.dtype, x))

    sharded = jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(sharded)(X), X * 3)
