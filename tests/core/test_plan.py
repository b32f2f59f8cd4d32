"""Plans against figures worked out by hand, and against the anchors of other compilations of the same programs."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from jaxlab.core.errors import MissingExtra
from tests.aot import needs_aot, needs_ptxas
from tests.core.plan_cases import MIB, moved, shaped


def replicated(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


# Targets


@needs_aot
def test_a_target_is_a_mesh_over_described_devices():
    over = plan.target("h100", "1x128x8", {"fsdp": 128, "tensor": -1})
    assert dict(over.mesh.shape) == {"fsdp": 128, "tensor": 8}
    assert over.mesh.size == 1024
    assert over.memory_bytes == 84_978_434_048
    assert plan.target("a100", "1x2x4").mesh.shape == {"data": 8}


@needs_aot
def test_presets_differ_in_memory():
    memory = {gpu: plan.target(gpu).memory_bytes / 2**30 for gpu in plan.GPUS}
    known = {"a100": 79, "a100_40": 39.5, "h100": 79, "h200": 140, "gh200": 95, "b200": 179, "mi250x": 64}
    assert memory == pytest.approx(known, abs=1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"gpu": "h1000"}, "h1000.*a100, a100_40, h100, h200, gh200, b200, mi250x, cpu"),
        ({"gpu": None}, "None.*a100, a100_40, h100"),
        ({"topology": "8"}, "'8'.*1x128x8.*a100, a100_40, h100"),
        ({"topology": "1x0x8"}, "1x0x8"),
        ({"topology": "1x2x"}, "1x2x"),
        ({"topology": 8}, "topology.*8"),
        ({"memory_factor": 1.5}, "memory_factor.*1.5"),
        ({"gpu": "cpu", "topology": "1x1x4096"}, "4096"),
        ({"gpu": "cpu", "mesh": {"rows": 8}}, "rows"),
        ({"gpu": "cpu", "mesh": {"data": 3}}, "3"),
    ],
)
def test_a_wrong_target_is_named(arguments, told):
    with pytest.raises(ValueError, match=told):
        plan.target(**arguments)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    for module in ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", "jax_cuda12_plugin", "jax_cuda13_plugin"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match="'aot'"):
        plan.target("h100")
    assert plan.target("cpu").platform == "cpu"


# Bytes


@pytest.mark.latest
@needs_aot
def test_bytes_of_a_sharded_step_are_those_counted_by_hand():
    """A ZeRO-3 step of a two-matrix network: 4 ways fsdp, 2 ways tensor, 2 ways data."""
    over = plan.target("h100", "1x2x8", {"data": 2, "fsdp": 4, "tensor": 2})

    def place(*args, **kw):
        return shaped(over.mesh, *args, **kw)

    def step(params, moments, x):
        def loss(params):
            hidden = jax.nn.relu(x @ params["up"])
            return jnp.mean((hidden @ params["down"]).astype(jnp.float32) ** 2)

        grads = jax.grad(loss)(params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g.astype(jnp.float32), moments, grads)
        return jax.tree.map(lambda p, m: (p - 0.1 * m).astype(p.dtype), params, moments), moments

    def tree(dtype):
        return {
            "up": place((1024, 4096), "fsdp", "tensor", dtype=dtype),
            "down": place((4096, 1024), "tensor", "fsdp", dtype=dtype),
        }

    args = tree(jnp.bfloat16), tree(jnp.float32), place((512, 1024), ("data", "fsdp"), dtype=jnp.bfloat16)
    labels = ("parameters", "optimizer", "input")
    kept = plan.compile(step, *args, target=over, labels=labels)
    donated = plan.compile(step, *args, target=over, labels=labels, donate_argnums=(0, 1))
    weights = 2 * 1024 * 4096 // 8
    for made in (kept, donated):
        assert made.bytes["parameters"] == 2 * weights
        assert made.bytes["optimizer"] == 4 * weights
        assert made.bytes["input"] == 512 * 1024 * 2 // 8
        assert made.bytes["host"] == 0
        assert made.bytes["total"] == sum(made.bytes.values()) - made.bytes["total"]
        assert made.fits
    assert kept.bytes["outputs"] == pytest.approx(6 * weights, abs=64)
    assert donated.bytes["outputs"] <= 64
    # A tensor half of the first weight is gathered and its gradient summed back; moments never travel.
    half = 1024 * 4096 * 2 // 2
    traffic = {}
    for item in donated.collectives:
        traffic[item.op, item.axes] = traffic.get((item.op, item.axes), 0) + item.bytes * item.count
    assert half <= traffic["all-gather", ("fsdp",)] <= 4 * half
    assert half <= traffic["reduce-scatter", ("fsdp",)] <= 2 * half
    # The shards of the gradients are averaged over the replicas in bf16, activations over the tensor axis.
    assert traffic["all-reduce", ("data",)] == 2 * weights
    assert ("all-reduce", ("tensor",)) in traffic
    assert donated.bytes["temporaries"] < 4 * half


@pytest.mark.latest
@needs_aot
def test_host_arguments_leave_their_label(nodes):
    def update(moment, grads):
        moment = 0.9 * jax.device_put(moment, jax.memory.Space.Device) + grads
        return jax.device_put(moment, jax.memory.Space.Host), moment.sum()

    moment = shaped(nodes.mesh, (16, 1024, 1024), "node", memory_kind="pinned_host")
    grads = shaped(nodes.mesh, (16, 1024, 1024), "node")
    made = plan.compile(update, moment, grads, target=nodes, labels=("optimizer", "input"), donate_argnums=0)
    shard = 8 * 1024 * 1024 * 4
    assert made.bytes["optimizer"] == 0
    assert made.bytes["host"] == made.bytes["input"] == shard
    assert made.bytes["outputs"] < 1024
    # What moves over is the whole shard: the copy on the device is a temporary.
    assert made.bytes["temporaries"] >= shard
    assert made.bytes["total"] == made.bytes["input"] + made.bytes["outputs"] + made.bytes["temporaries"]
    kept = plan.compile(update, moment, grads, target=nodes, labels=("optimizer", "input"))
    assert f"{shard // MIB}.00 MiB of outputs" in kept.notes[0]


@needs_aot
def test_naive_attention_with_a_pair_bias(h100):
    """N = 384 rows, 4 heads of 32, bf16, four gradients: 1298 MiB of temporaries, 109 MiB of arguments."""

    def attention(q, k, v, bias):
        weights = jax.nn.softmax(jnp.einsum("snhd,smhd->shnm", q, k) * 32**-0.5 + bias)
        return jnp.einsum("shnm,smhd->snhd", weights, v)

    gradients = jax.grad(lambda *args: attention(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3))
    rows, bias = replicated(384, 384, 4, 32), replicated(4, 384, 384)
    made = plan.compile(gradients, rows, rows, rows, bias, target=h100, labels=("input",) * 4)
    assert made.bytes["input"] == 3 * 384 * 384 * 128 * 2 + 4 * 384 * 384 * 2
    assert made.bytes["input"] / MIB == pytest.approx(109, abs=0.2)
    assert made.bytes["temporaries"] / MIB == pytest.approx(1298, rel=0.02)


@pytest.mark.latest
@needs_aot
def test_ragged_dot_masks_densely(h100):
    made = plan.compile(
        jax.lax.ragged_dot,
        replicated(4096, 512),
        replicated(8, 512, 256),
        replicated(8, dtype=jnp.int32),
        target=h100,
        labels=("input", "parameters", "input"),
    )
    assert made.bytes["temporaries"] / MIB == pytest.approx(40, abs=0.5)
    assert made.bytes["parameters"] == 8 * 512 * 256 * 2
    assert made.bytes["outputs"] == 4096 * 256 * 2


@needs_aot
def test_a_plan_too_large_does_not_fit():
    over = plan.target("mi250x", memory_factor=0.5)
    x = replicated(24_000, 2**20)
    made = plan.compile(lambda x: x + 1, x, target=over, labels=("input",))
    assert not made.fits
    table = made.table()
    assert "does not fit" in table
    assert "H100 target with 64 GB a device" in table
    assert table.index("input") < table.index("a device   ")
    smaller = plan.compile(lambda x: x + 1, replicated(8_000, 2**20), target=over, labels=("input",))
    assert smaller.fits
    assert "fits" in smaller.table()


@needs_aot
def test_constants_count(h100):
    table = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    made = plan.compile(lambda x: x @ table, replicated(8, 1024, dtype=jnp.float32), target=h100, labels=("input",))
    assert made.bytes["constants"] == 4 * MIB
    assert made.bytes["total"] > 4 * MIB


# Kernels


def tiled_matmul(x, y, name):
    def kernel(x_ref, y_ref, out_ref):
        def add(i, total):
            x = pltriton.load(x_ref.at[:, pl.ds(i * 64, 64)])
            y = pltriton.load(y_ref.at[pl.ds(i * 64, 64), :])
            return total + pltriton.dot(x, y)

        total = jax.lax.fori_loop(0, x_ref.shape[1] // 64, add, jnp.zeros(out_ref.shape, jnp.float32))
        pltriton.store(out_ref, total.astype(out_ref.dtype))

    (m, k), n = x.shape, y.shape[1]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(m // 64, n // 64),
        in_specs=[pl.BlockSpec((64, k), lambda i, j: (i, 0)), pl.BlockSpec((k, 64), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((64, 64), lambda i, j: (i, j)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
        name=name,
    )(x, y)


@pytest.mark.latest
@needs_aot
def test_kernels_keep_their_names_and_tell_their_instructions():
    def program(x, y, small):
        product = tiled_matmul(x, y, "tiled-matmul.a")
        return tiled_matmul(product, y, "tiled-matmul.a") + jnp.sin(product), tiled_matmul(
            small, small, "tiled-matmul.a"
        )

    square, small = replicated(1024, 1024), replicated(512, 512)
    hopper = plan.kernels_of(program, square, square, small)
    # Two shapes make two variants; the second call of the first shape is the same kernel.
    assert [kernel.name for kernel in hopper] == ["tiled-matmul.a"] * 2
    for kernel in hopper:
        assert kernel.tensor_core
        assert any(opcode.startswith("wgmma.mma_async") for opcode in kernel.ptx_instructions)
        assert "ret" in kernel.ptx_instructions
        assert sum(kernel.ptx_instructions.values()) > 100
    (ampere,) = plan.kernels_of(lambda x: tiled_matmul(x, x, "tiled"), square, gpu="a100")
    assert ampere.name == "tiled"
    assert any(opcode.startswith("mma.sync") for opcode in ampere.ptx_instructions)
    assert not any(opcode.startswith("wgmma") for opcode in ampere.ptx_instructions)


@needs_aot
@needs_ptxas
def test_registers_and_spills_come_from_ptxas(h100, monkeypatch):
    x = replicated(256, 256)
    made = plan.compile(lambda x: tiled_matmul(x, x, "tiled"), x, target=h100, labels=("input",))
    (kernel,) = made.kernels
    settings = {"target": h100, "labels": ("input",), "read_kernels": False}
    assert plan.compile(lambda x: tiled_matmul(x, x, "tiled"), x, **settings).kernels == ()
    assert 32 <= kernel.registers <= 255
    assert kernel.spill_bytes == 0
    assert f"{kernel.registers}" in made.table()
    monkeypatch.setattr("jaxlab.core.plan.ptx.find_ptxas", lambda: None)
    plan.ptx._resources.cache_clear()
    without = plan.compile(lambda x: tiled_matmul(x, x, "tiled"), x, target=h100, labels=("input",))
    assert (without.kernels[0].registers, without.kernels[0].spill_bytes) == (None, None)
    assert "ptxas" in without.notes[0]
    plan.ptx._resources.cache_clear()


# The plan as a whole


def test_the_cpu_needs_no_extra_and_runs_nothing():
    over = plan.target("cpu", mesh={"data": 4, "tensor": 2})
    assert over.memory_bytes > 2**28
    ran = []

    def watched(w, x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum(x @ w)

    w, x = shaped(over.mesh, (256, 512), None, "tensor"), shaped(over.mesh, (1024, 256), "data")
    made = plan.compile(watched, w, x, target=over, labels=("parameters", "input"))
    jax.effects_barrier()
    assert ran == []
    assert made.bytes["parameters"] == 256 * 512 * 4 // 2
    assert made.bytes["input"] == 1024 * 256 * 4 // 4
    assert made.bytes["outputs"] <= 64
    summed = {op: size for (op, _), size in moved(made).items()}
    assert summed == {"all-reduce": (4, 1)}
    assert made.kernels == ()
    # What is read back from the persistent compile cache tells the same.
    assert plan.compile(watched, w, x, target=over, labels=("parameters", "input")).bytes == made.bytes


@needs_aot
def test_a_plan_is_json_and_a_table(nodes):
    w = shaped(nodes.mesh, (1024, 1024), "expert", "tensor", dtype=jnp.bfloat16)
    made = plan.compile(lambda w: w @ w, w, target=nodes, labels=("parameters",))
    told = json.loads(json.dumps(made.to_dict()))
    assert told["fits"] is True
    assert told["bytes"] == made.bytes
    assert told["target"]["mesh"] == {"node": 2, "expert": 4, "tensor": 2}
    assert [item["op"] for item in told["collectives"]] == [item.op for item in made.collectives]
    table = made.table()
    for word in ("h100 1x2x8", "16 devices", "fits", "parameters", "temporaries", "256.00 KiB", "all-gather"):
        assert word in table
    assert made.hlo.startswith("HloModule")


@needs_aot
def test_labels_may_be_trees_and_static_arguments_have_none(h100):
    state = {"params": replicated(8, 8), "moments": (replicated(4, 8), replicated(4, 8))}

    def step(state, power, x):
        return x**power + state["params"].sum() + state["moments"][0].sum()

    kinds = {"params": "parameters", "moments": "optimizer"}
    for labels in ((kinds, "input"), (kinds, "input", "input")):
        made = plan.compile(step, state, 3, replicated(8), target=h100, labels=labels, static_argnums=1)
        assert {kind: made.bytes[kind] for kind in ("parameters", "optimizer", "input")} == {
            "parameters": 128,
            "optimizer": 128,
            "input": 16,
        }


@pytest.mark.usefixtures("unchecked")
def test_wrong_labels_and_places_are_named():
    over = plan.target("cpu")
    x = replicated(8)
    with pytest.raises(ValueError, match="got 'weights', expected one of parameters, optimizer, input, cache"):
        plan.compile(jnp.sin, x, target=over, labels=("weights",))
    with pytest.raises(ValueError, match="got 2, expected one for each of 1"):
        plan.compile(jnp.sin, x, target=over, labels=("input", "input"))
    elsewhere = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    part = plan.target("cpu", "1x1x2")
    other = shaped(jax.sharding.Mesh(np.array(jax.devices()[-1:]), ("data",)), (8,))
    with pytest.raises(ValueError, match=r"expected one over target\.mesh"):
        plan.compile(jnp.sin, other, target=part, labels=("input",))
    assert plan.compile(jnp.sin, shaped(elsewhere, (8,)), target=part, labels=("input",)).bytes["input"] == 32


@needs_aot
def test_an_already_jitted_step_keeps_its_donation_and_shardings(nodes):
    where = NamedSharding(nodes.mesh, P("expert"))
    step = jax.jit(lambda state, x: (state + x, x.sum()), donate_argnums=0, out_shardings=(where, None))
    state = shaped(nodes.mesh, (1024, 1024), "expert")
    made = plan.compile(step, state, state, target=nodes, labels=("parameters", "input"))
    assert made.bytes["outputs"] < 1024


@pytest.mark.latest
@needs_aot
def test_compiling_leaves_the_process_as_it_was(h100, tmp_path):
    environment, devices = dict(os.environ), jax.devices()
    folder, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    before = set(os.listdir(folder)) if folder and os.path.isdir(folder) else set()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for _ in range(2):
            made = plan.compile(lambda x: jnp.cos(x) @ x, replicated(128, 128), target=h100, labels=("input",))
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    after = set(os.listdir(folder)) if folder and os.path.isdir(folder) else set()
    assert not [name for name in after - before if "lambda" in name]
    assert dict(os.environ) == environment
    assert jax.devices() == devices
    assert made.bytes["input"] == 128 * 128 * 2
    assert float(jnp.ones(4).sum()) == 4


@needs_aot
def test_the_example_of_the_package_runs(capsys):
    example = [line[4:] for line in plan.__doc__.splitlines() if line.startswith("    ")]
    exec("\n".join(example), {"jax": jax})
    assert "64 devices, fsdp 8 x tensor 8" in capsys.readouterr().out


def test_search_finds_the_last_that_fits_in_few_calls():
    def made(total, limit, start, least):
        calls = []

        def counted(n):
            calls.append(n)
            return total(n)

        return plan.search(counted, limit=limit, start=start, least=least), calls

    for total in (lambda n: 1000 + 10 * n, lambda n: 1300 + 13 * n, lambda n: 1000 + 30 * n + (n % 7) * 3):
        for limit in (1000, 1009, 1313, 5000, 54321):
            best = max((n for n in range(6000) if n and total(n) <= limit), default=0)
            found, calls = made(total, limit, 1000, 10)
            assert found == best
            assert {best + 1, best or 1} <= set(calls)
            assert len(calls) <= 8
    assert made(lambda n: n, 5, 6, 1) == (0, [])
