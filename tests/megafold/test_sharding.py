import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxlab.core import make_mesh, plan
from jaxlab.core.plan import Collective
from jaxlab.megafold import ops
from jaxlab.megafold.config import Kernels
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.modules import AlphaFold3
from jaxlab.megafold.modules.pair import PairUpdates
from jaxlab.megafold.sharding import COLUMNS, pair_sharded, spread
from pallas_kernels.transition import transition
from tests import two_processes
from tests.megafold import multiprocess_cases as cases
from tests.megafold.multiprocess_cases import CHANNELS, DEPTH, DEVICES, HEADS, HIDDEN, PROBLEMS, TINY, TOKENS, WIDTH

MESH = AbstractMesh((8,), ("pair",))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.latest) if name == "ending" else name for name in PROBLEMS]
)
def test_as_on_one_device(name):
    cases.check(name)


outcomes = two_processes.outcomes(cases)
test_two_processes = two_processes.in_two(cases)


def gathered(channels, rows=TOKENS):
    """Float32 of all tokens, `rows` of them for each."""
    return Collective("all-gather", ("pair",), rows * TOKENS * channels * 4, 1)


def exchanged(channels, times, itemsize=4):
    """Rows for columns, or for channels: what a device has."""
    return Collective("all-to-all", ("pair",), TOKENS * TOKENS * channels * itemsize // DEVICES, times)


PADDED = -(-HIDDEN // DEVICES) * DEVICES
TRAFFIC = {
    "starting": [gathered(HEADS)],
    "ending": [gathered(HEADS), exchanged(CHANNELS, 2), exchanged(1, 1, itemsize=1)],
    "incoming": [exchanged(2 * PADDED, 1), exchanged(PADDED, 1)],
    "tokens": [Collective("all-gather", ("pair",), TOKENS * HEADS * WIDTH * 4, 2)],
    "samples": [gathered(HEADS)],
    "averaging": [gathered(HEADS * WIDTH, DEPTH)],
    "transition": [],
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_what_travels(name):
    """Forward, on 8 devices: these collectives, of these sizes, and no others."""
    problem, mesh = PROBLEMS[name], make_mesh({"pair": DEVICES})
    function = functools.partial(cases.sharded(problem, mesh), **problem.options)
    lay = {"z": PartitionSpec(None, "pair"), "m": PartitionSpec(None, None, "pair"), "s": PartitionSpec(None, "pair")}
    place = {key: NamedSharding(mesh, lay.get(key, PartitionSpec())) for key in problem.arrays}
    if name == "ending":
        place["mask"] = NamedSharding(mesh, PartitionSpec(None, "pair"))
    if name == "transition":
        place["x"] = NamedSharding(mesh, PartitionSpec(None, "pair"))

    def run(arrays, weights):
        return function(**arrays, **weights)

    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), dict(problem.weights))
    jitted = jax.jit(run, in_shardings=(place, everywhere), compiler_options=cases.QUICK_TO_COMPILE)
    found = plan.collectives_of(jitted.lower(dict(problem.arrays), dict(problem.weights)).compile().as_text(), mesh)
    assert sorted(found, key=str) == sorted(TRAFFIC[name], key=str)


def test_memory():
    """The pair stack at N = 256, four gradients' worth: a fifth at most of what one device takes."""
    updates, n = PairUpdates(4, 32, 4, 0.0, Kernels()), 256
    z, mask = jax.ShapeDtypeStruct((1, n, n, 128), jnp.float32), jax.ShapeDtypeStruct((1, n, n), bool)
    params = jax.eval_shape(updates.init, jax.random.key(0), z, mask)

    def step(params, z, mask, d):
        return jax.vjp(lambda params, z: updates.apply(params, z, mask), params, z)[1](d)

    def temporaries(mesh):
        def laid(x, *spec):
            return (
                x
                if mesh is None
                else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
            )

        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            args = jax.tree.map(laid, params), laid(z, None, "pair"), laid(mask, None, "pair"), laid(z, None, "pair")
            compiled = jax.jit(step, compiler_options=cases.QUICK_TO_COMPILE).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(make_mesh({"pair": DEVICES})) <= 0.2 * temporaries(None)


def test_network():
    """Every part of the network under a mesh in force, batch over `data`, pairs over `pair`, as on one device."""
    rng, model = np.random.default_rng(0), AlphaFold3(TINY)

    def draw(x):
        if x.dtype == bool:
            return rng.random(x.shape) < 0.8
        return rng.integers(0, 3, x.shape) if x.dtype == np.int32 else 0.3 * rng.normal(size=x.shape)

    shapes = abstract_batch(TINY, 2)
    batch = {name: jnp.asarray(draw(x), x.dtype) for name, x in shapes.items()}
    batch["atom_token"] = jnp.broadcast_to(jnp.arange(64) // 4, (2, 64))
    x, sigma = jnp.asarray(draw(jnp.zeros((2, 4, 64, 3)))), jnp.ones((2, 4))
    params = jax.tree.map(
        lambda x: jnp.asarray(draw(x)), jax.eval_shape(model.init, jax.random.key(0), batch, x, sigma)
    )

    def run(mesh):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.jit(model.apply, compiler_options=cases.QUICK_TO_COMPILE)(params, batch, x, sigma)

    got, want = run(make_mesh({"data": 2, "pair": 4})), run(None)
    assert got["trunk"].z.sharding.spec[:2] == ("data", "pair")
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        cases.assert_close(ours, theirs, 1e-5, where=jax.tree_util.keystr(path))


def test_without_a_mesh_the_operation_itself():
    assert spread("transition") is transition
    assert spread("triangle_attention") is ops.triangle_attention


def test_under_a_mesh():
    """Batch over `data`, pairs over `pair`, as modules ask for it; and what the devices do not divide stays whole."""
    weights, mesh = jax.tree.map(jnp.asarray, PROBLEMS["transition"].weights), make_mesh({"data": 2, "pair": 4})
    for lead, shape, spec in (
        (None, (2, 8, 3), ("data", "pair")),
        (COLUMNS, (2, 4, 8), ("data", None, "pair")),
        (None, (4, 3, 4, 1), ("data", None, "pair")),
        (None, (3, 8, 2), (None, "pair")),
        (None, (2, 3), ("data",)),  # channels never lie over devices
    ):
        x = jax.random.normal(jax.random.key(0), (*shape, CHANNELS))
        with jax.set_mesh(mesh):
            y = spread("transition", lead)(x, **weights)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), y.ndim)
        np.testing.assert_allclose(y, transition(x, **weights), atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs():
    def call(name, *changes, **options):
        problem = PROBLEMS[name]
        arrays = dict(problem.arrays) | dict(changes)
        return pair_sharded(problem.op.__name__, MESH)(**arrays, **problem.weights, **{**problem.options, **options})

    odd = np.zeros((1, 20, 20, CHANNELS), np.float32)
    for name in ("starting", "outgoing"):
        with pytest.raises(ValueError, match=r"z: expected axis 1 to be a multiple of 8.*'pair', got 20"):
            call(name, ("z", odd), ("mask", np.ones((1, 20, 20), bool)))
    with pytest.raises(ValueError, match=r"m: expected axis 2 to be a multiple of 8.*got 20"):
        call("outer", ("m", odd), ("mask", np.ones((1, 20, 20), bool)))
    with pytest.raises(ValueError, match="x: expected axis 1 to be a multiple of 8"):
        call("transition", ("x", odd))
    with pytest.raises(ValueError, match="s: expected axis 1 to be a multiple of 8"):
        call("tokens", ("s", odd[:, 0]), ("z", odd), ("mask", np.ones((1, 20), bool)))
    with pytest.raises(ValueError, match="node"):
        call("starting", node="middle")
    with pytest.raises(ValueError, match="mask: expected shape"):
        call("starting", ("mask", np.ones((1, TOKENS), bool)))
    with pytest.raises(TypeError, match="mask"):
        call("starting", ("mask", np.ones((1, TOKENS, TOKENS), np.int32)))
    with pytest.raises(ValueError, match=r"name: expected one of triangle_attention, .*got 'local_attention'"):
        pair_sharded("local_attention", MESH)
    with pytest.raises(ValueError, match=r"axis: expected one of the mesh, \('pair',\), got 'rows'"):
        pair_sharded("transition", MESH, "rows")
