"""Traffic of compiled programs against figures worked out by hand: every collective, loops, a thousand devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from tests.aot import needs_aot
from tests.core.plan_cases import MIB, moved, shaped

CASES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "node", tiled=True), ("node",), 8 * MIB),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x[0], "tensor", tiled=True)[None], ("tensor",), 4 * MIB),
    "all-reduce": (lambda x: jax.lax.psum(x, ("node", "tensor")), ("node", "tensor"), 4 * MIB),
    "all-to-all": (lambda x: jax.lax.all_to_all(x.reshape(4, 256, 1024), "expert", 0, 0), ("expert",), 4 * MIB),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]),
        ("expert",),
        4 * MIB,
    ),
}


def over_shards(mesh, function):
    spec = P(("node", "expert", "tensor"))
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


@pytest.mark.latest
@needs_aot
def test_each_collective_has_its_bytes_and_axes(nodes):
    def every(x):
        return {op: function(jnp.sin(x * i)) for i, (op, (function, _, _)) in enumerate(CASES.items())}

    x = shaped(nodes.mesh, (16, 1024, 1024), ("node", "expert", "tensor"))
    made = plan.compile(over_shards(nodes.mesh, every), x, target=nodes, labels=("input",))
    assert moved(made) == {(op, axes): (size, 1) for op, (_, axes, size) in CASES.items()}


@needs_aot
def test_ragged_all_to_all(nodes):
    def exchange(x):
        sizes = jnp.full((4,), 256, jnp.int32)
        starts = 256 * jnp.arange(4, dtype=jnp.int32)
        into = jnp.zeros_like(x[0])
        return jax.lax.ragged_all_to_all(x[0], into, starts, sizes, starts, sizes, axis_name="expert")[None]

    x = shaped(nodes.mesh, (16, 1024, 1024), ("node", "expert", "tensor"))
    made = plan.compile(over_shards(nodes.mesh, exchange), x, target=nodes, labels=("input",))
    assert moved(made) == {("ragged-all-to-all", ("expert",)): (4 * MIB, 1)}


@needs_aot
def test_loops_of_known_length_are_multiplied(nodes):
    def thrice_five(x):
        def inner(_, x):
            return jnp.sin(jax.lax.psum(x, "expert"))

        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, inner, jax.lax.psum(x, "node")), x)

    x = shaped(nodes.mesh, (16, 8, 8), ("node", "expert", "tensor"))
    made = plan.compile(over_shards(nodes.mesh, thrice_five), x, target=nodes, labels=("input",))
    assert moved(made) == {("all-reduce", ("expert",)): (256, 15), ("all-reduce", ("node",)): (256, 3)}


@needs_aot
def test_a_thousand_devices_and_a_scanned_gradient():
    over = plan.target("h100", "1x128x8", {"fsdp": 128, "tensor": 8})
    layers, width, inner, batch, length = 32, 4096, 16384, 128, 128

    def loss(weights, x):
        @jax.checkpoint
        def block(x, weight):
            up, down = weight
            return jax.lax.with_sharding_constraint(x + jax.nn.relu(x @ up) @ down, NamedSharding(over.mesh, P("fsdp")))

        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, weights)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    weights = (
        shaped(over.mesh, (layers, width, inner), None, "fsdp", "tensor", dtype=jnp.bfloat16),
        shaped(over.mesh, (layers, inner, width), None, "tensor", "fsdp", dtype=jnp.bfloat16),
    )
    x = shaped(over.mesh, (batch, length, width), "fsdp", dtype=jnp.bfloat16)
    where = jax.tree.map(lambda leaf: leaf.sharding, weights)
    gradient = jax.jit(jax.grad(loss), out_shardings=where)
    made = plan.compile(gradient, weights, x, target=over, labels=("parameters", "input"))
    assert made.bytes["parameters"] == layers * width * inner * 2 * 2 // 1024
    assert made.bytes["outputs"] == pytest.approx(made.bytes["parameters"], abs=64)
    # A layer's tensor slices are gathered forwards and backwards and each gradient goes back to its shard; activations
    # are summed over tensor once forwards, once backwards.
    traffic = {}
    for item in made.collectives:
        assert item.count % layers == 0
        traffic[item.op, item.axes] = traffic.get((item.op, item.axes), 0) + item.bytes * item.count
    slices = layers * width * inner * 2 * 2 // 8
    assert 2 * slices <= traffic["all-gather", ("fsdp",)] <= 3 * slices
    assert traffic["reduce-scatter", ("fsdp",)] == slices
    assert traffic["all-reduce", ("tensor",)] == 2 * layers * (batch // 128) * length * width * 2
    assert len(traffic) == 3


HLO = """HloModule step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %rs = bf16[16,8]{1,0} reduce-scatter(%p), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %ar = f32[4]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, to_apply=%add
  ROOT %r = (s32[], /*index=1*/f32[4]{0}) tuple(%i, %ar)
}

%cond (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: bf16[64,8], s: (s32[], f32[4]), f: f8e4m3fn[32]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %s = (s32[], f32[4]{0}) parameter(1)
  %f = f8e4m3fn[32]{0} parameter(2)
  %start = ((bf16[64,8]{1,0}), bf16[16,8]{1,0}) async-start(%p), calls=%wrapped
  %loop = (s32[], f32[4]{0}) while(%s), body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %open = (s32[], f32[4]{0}) while(%loop), condition=%cond, body=%body
  %ag = (u8[32], u8[128]) all-gather-start(%f), replica_groups=mesh['a'=4,'b'=4], device_ids=([2,4,2]T(1,0,2)) {'a'}
  %ag.done = f8e4m3fn[128]{0} all-gather-done(%ag)
  %part = f8e4m3fn[64]{0} all-gather(%f), replica_groups=mesh['x'=2,'y'=4,'z'=2] {'y':(2)2}, dimensions={0}
  %two = f8e4m3fn[128]{0} all-gather(%f), replica_groups=mesh['x'=2,'y'=4,'z'=2] {'x','y':(1)2}, dimensions={0}
  %two_of = (f8e4m3fn[32], f8e4m3fn[32]) all-reduce(%f, /*index=1*/%f), replica_groups=[4,4]<=[16], to_apply=%add
  %cp = f8e4m3fn[32]{0} collective-permute(%f), source_target_pairs={{0,8},{8,0}}
  %whole = f8e4m3fn[32]{0} all-reduce(%f), replica_groups={}, to_apply=%add
  ROOT %done = bf16[16,8]{1,0} async-done(%start), calls=%wrapped
}
"""


@pytest.mark.latest
def test_every_form_of_groups_is_read():
    cpus = np.array(jax.local_devices(backend="cpu")[:1] * 16).reshape(2, 4, 2)
    mesh = jax.sharding.Mesh(cpus, ("node", "expert", "tensor"))
    found = plan.collectives_of(HLO, mesh)
    assert {(item.op, item.axes, item.bytes): item.count for item in found} == {
        ("reduce-scatter", ("expert",), 1024): 1,
        ("all-reduce", ("tensor",), 16): 8,
        ("all-gather", ("expert",), 128): 1,
        ("all-gather", ("expert",), 64): 1,
        ("all-gather", ("node", "expert"), 128): 1,
        ("all-reduce", ("expert", "tensor"), 64): 1,
        ("collective-permute", ("node",), 32): 1,
        ("all-reduce", ("node", "expert", "tensor"), 32): 1,
    }
