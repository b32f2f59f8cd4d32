import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.xmoe import uneven_all_to_all
from tests.aot import needs_aot
from tests.oracles import expert_parallel as oracle

DEVICES, ROWS, WIDTH, ROOM = 8, 12, 3, 16
LAYOUTS = {("expert",): {"expert": 8}, ("node", "expert"): {"node": 2, "expert": 4}}


def over(axes, call):
    """`call(x, sizes)` on every device of the axes, on stacked arguments [W,...]."""
    spec = PartitionSpec(axes)
    body = jax.shard_map(
        lambda *args: jax.tree.map(lambda leaf: leaf[None], call(*(arg[0] for arg in args))),
        mesh=make_mesh(LAYOUTS[axes]),
        in_specs=spec,
        out_specs=spec,
    )
    return jax.jit(body)


@functools.cache
def exchanged(axes, implementation):
    @functools.partial(over, axes)
    def forward(x, sizes):
        return uneven_all_to_all(x, sizes, axes, out_rows=ROOM, implementation=implementation)

    def both(x, sizes, cotangent):
        def loss(x):
            y, *counts = forward(x, sizes)
            return jnp.sum(y * cotangent), (y, *counts)

        return jax.grad(loss, has_aux=True)(x)

    return jax.jit(both)


@st.composite
def sizes_of_rows(draw):
    """[W,W] with rows that sum to at most ROWS: nothing, everything to one device, or a bit to each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from(["even", "one", "few", "none"]))
    concentration = {"even": 5.0, "few": 0.1}.get(spread, 1.0)
    sizes = np.zeros((DEVICES, DEVICES), np.int32)
    for source in range(DEVICES):
        total = rng.integers(0, ROWS + 1)
        shares = rng.dirichlet(np.full(DEVICES, concentration))
        sizes[source] = rng.multinomial(total, shares)
        if spread == "one":
            sizes[source] = np.eye(DEVICES, dtype=np.int32)[3] * total
    return sizes * (spread != "none")


@pytest.mark.latest
@pytest.mark.parametrize(
    ("axes", "implementation"),
    [(("expert",), None), (("expert",), "gather"), (("expert",), "padded"), (("node", "expert"), None)],
)
def test_rows_and_gradients(axes, implementation):
    run = exchanged(axes, implementation)

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(sizes=sizes_of_rows(), seed=st.integers(0, 2**32 - 1))
    def check(sizes, seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(DEVICES, ROWS, WIDTH)).astype(np.float32)
        cotangent = rng.normal(size=(DEVICES, ROOM, WIDTH)).astype(np.float32)
        for device, used in enumerate(sizes.sum(1)):
            x[device, used:] = np.nan
        gradient, (received, kept, lost) = run(x, sizes, cotangent)
        want, want_kept, want_lost = oracle.exchange(x, sizes, ROOM)
        np.testing.assert_array_equal(received, want)
        np.testing.assert_array_equal(kept, want_kept)
        np.testing.assert_array_equal(lost, want_lost)
        np.testing.assert_array_equal(gradient, oracle.exchange_gradient(cotangent, sizes, ROWS).astype(np.float32))

    check()


def test_replicated_rows_and_integers():
    """Rows that are equal on all devices may be sent, and the gradient is their sum; integers travel, too."""
    spec = PartitionSpec("expert")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=make_mesh({"expert": 8}), in_specs=(PartitionSpec(), spec), out_specs=(spec, spec)
    )
    def send(x, labels):
        sizes = jnp.ones(DEVICES, jnp.int8)
        y, *_ = uneven_all_to_all(x, sizes, "expert", out_rows=DEVICES)
        return y, uneven_all_to_all(labels, sizes, "expert", out_rows=DEVICES)[0]

    x = jnp.arange(8.0)[:, None]
    y, labels = send(x, jnp.arange(64).reshape(64, 1))
    np.testing.assert_array_equal(y[:, 0], np.repeat(np.arange(8.0), 8))
    np.testing.assert_array_equal(labels.reshape(8, 8), np.arange(64).reshape(8, 8).T)
    sent = jnp.zeros((64, 1), int)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(send(x, sent)[0] * jnp.arange(64.0)[:, None])))(x)
    np.testing.assert_array_equal(gradient[:, 0], np.arange(64.0).reshape(8, 8).sum(1))


@pytest.mark.parametrize(("rows", "room"), [(0, 4), (4, 0), (0, 0)])
def test_no_rows(rows, room):
    call = over(("expert",), lambda x, sizes: uneven_all_to_all(x, sizes, "expert", out_rows=room))
    sizes = np.zeros((DEVICES, DEVICES), np.int32)
    sizes[:, 0] = rows
    received, kept, lost = call(np.ones((DEVICES, rows, WIDTH), np.float32), sizes)
    assert received.shape == (DEVICES, room, WIDTH)
    assert not np.any(received)
    assert int(np.sum(kept)) == 0
    assert lost.tolist() == [8 * rows] + [0] * 7


def test_ragged_is_refused_for_a_cpu():
    call = over(("expert",), functools.partial(_ragged, axes=("expert",)))
    with pytest.raises(NotImplementedError, match=r"'ragged' runs on cuda and rocm only.*try instead: padded, gather"):
        call(np.ones((DEVICES, ROWS, WIDTH), np.float32), np.ones((DEVICES, DEVICES), np.int32))


def _ragged(x, sizes, *, axes):
    return uneven_all_to_all(x, sizes, axes, out_rows=ROOM, implementation="ragged")[0]


@needs_aot
@pytest.mark.latest
@pytest.mark.parametrize("axes", [("expert",), ("node", "expert")])
def test_ragged_compiles_for_16_gpus(axes):
    """From a machine with CPUs: forward and gradient, each one ragged collective over all 16, little beside."""
    from jaxlab.core import plan

    mesh = {"expert": 16} if len(axes) == 1 else {"node": 2, "expert": 8}
    target = plan.target("h100", topology="1x2x8", mesh=mesh)
    rows, width, room = 1024, 256, 2048
    spec = PartitionSpec(axes)

    def forward(x, sizes):
        return uneven_all_to_all(x, sizes, axes, out_rows=room)[0]

    sharded = jax.shard_map(forward, mesh=target.mesh, in_specs=spec, out_specs=spec)

    def gradient(x, sizes, cotangent):
        return jax.vjp(lambda x: sharded(x, sizes), x)[1](cotangent)

    def described(rows, width, dtype):
        shape = (16 * rows, width) if width else (16 * rows,)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(target.mesh, spec))

    x, sizes = described(rows, width, jnp.bfloat16), described(16, None, jnp.int32)
    for call, args, size in (
        (sharded, (x, sizes), room),
        (gradient, (x, sizes, described(room, width, jnp.bfloat16)), rows),
    ):
        compiled = plan.compile(call, *args, target=target, labels=["input"] * len(args))
        ragged = [found for found in compiled.collectives if found.op == "ragged-all-to-all"]
        assert [(found.axes, found.count) for found in ragged] == [(axes, 1)]
        assert compiled.bytes["temporaries"] <= 2**16 + size * width * 2


def test_bad_inputs(unchecked):
    @functools.partial(functools.partial, x=np.ones((4, 2)), axis="expert", sizes=np.zeros(8, int), out_rows=4)
    def call(*, x, axis, sizes, **settings):
        def body(x):
            return uneven_all_to_all(x, sizes, axis, **settings)[0]

        specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec("expert")}
        return jax.eval_shape(jax.shard_map(body, mesh=make_mesh({"expert": 8}), **specs), x)

    assert call().shape == (32, 2)
    with pytest.raises(ValueError, match=r"axis \('data',\) is not bound"):
        call(axis="data")
    with pytest.raises(ValueError, match="unknown implementation 'dense'; expected one of: ragged, padded, gather"):
        call(implementation="dense")
    with pytest.raises(ValueError, match="out_rows must not be negative, got -1"):
        call(out_rows=-1)
    with pytest.raises(ValueError, match=r"x must be \[M, H\], got shape \(4,\)"):
        call(x=np.ones(4))
    with pytest.raises(ValueError, match=r"one entry for each of the 8 devices on \('expert',\), got shape \(4,\)"):
        call(sizes=np.zeros(4, int))
    with pytest.raises(TypeError, match="send_sizes must be integers, got float32"):
        call(sizes=np.zeros(8, np.float32))
    with pytest.raises(ValueError, match=r"axis \('expert',\) is not bound"):
        uneven_all_to_all(jnp.ones((4, 2)), jnp.zeros(8, jnp.int32), "expert", out_rows=4)
