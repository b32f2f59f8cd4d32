import dataclasses

import pytest

from jaxlab.core.plan import GPUS
from jaxlab.superoffload.machine import Machine, ModelShape, get_machine
from jaxlab.superoffload.memory import CapacityError, estimate_memory
from jaxlab.superoffload.plan import plan_offload
from jaxlab.superoffload.policy import choose_cast, choose_weight_policy, weight_flow_efficiency
from tests.oracles import offload_memory as oracle

GH200 = get_machine("gh200")
# Layers and hidden size of the artifact's models.
TABLE = {
    "3.5B": (70, 2048), "5B": (44, 3072), "10B": (50, 4096), "13B": (65, 4096), "15B": (18, 8192), "20B": (25, 8192),
    "25B": (30, 8192), "50B": (60, 8192),
}  # fmt: skip


def shape(name, batch=8, seq=1024):
    return ModelShape(*TABLE[name], batch, seq)


@pytest.mark.latest
def test_machines():
    assert GH200.hbm_bytes == GPUS["gh200"].memory_bytes
    assert (GH200.host_bytes, GH200.link_bw, GH200.dram_bw, GH200.cores) == (480e9, 450e9, 500e9, 72)
    assert GH200.gpu_flops / GH200.host_flops == pytest.approx(330)
    assert get_machine("h100_pcie").link_bw == 32e9
    for name in ("gb200", "mi300a", "cpu2"):
        assert get_machine(name).name == name


def test_parameters():
    """GPT-2 small has 124,439,808, of which 1024 positions are not counted here."""
    assert ModelShape(12, 768, 1, 1).n_params == 124_439_808 - 1024 * 768
    assert ModelShape(3, 16, 1, 1, vocab=7).n_params == oracle.gpt_params(3, 16, 7)
    for name in TABLE:
        assert shape(name).n_params / 1e9 == pytest.approx(float(name[:-1]), rel=0.04)
    small = ModelShape(2, 8, 3, 5, vocab=11)
    assert small.train_flops == 6 * small.n_params * 15 + 3 * 2 * 2 * 8 * 25 * 3


@pytest.mark.latest
def test_efficiency_of_streaming():
    assert weight_flow_efficiency(GH200, 4096) == pytest.approx(0.65, abs=0.005)
    assert weight_flow_efficiency(GH200, 1024) == pytest.approx(0.32, abs=0.005)


def test_weight_policy():
    def choose(tokens, weights, free, remat=None, **more):
        sizes = {"tokens": tokens, "weight_bytes": weights, "free_bytes": free, "free_bytes_remat": remat}
        return choose_weight_policy(GH200, **sizes, **more)

    assert choose(1024, 10, 10) == "stationary"
    assert choose(4096, 11, 10) == "flow"
    assert choose(4096, 11, -5) == "flow"
    assert choose(1024, 11, 10, 11) == "stationary"
    assert choose(4096, 11, 10, 11, min_eff=0.7) == "stationary"
    with pytest.raises(CapacityError, match=r"efficiency 0.32, below 0.6\n(.*\n)*free with remat +9.00 GB"):
        choose(1024, 11 * 10**9, 8 * 10**9, 9 * 10**9)


def test_casts():
    """4n over the link and 6n in HBM against 2n over the link and 6n in DRAM."""
    assert choose_cast(GH200, 1 << 24) == "gpu"
    assert choose_cast(get_machine("h100_pcie"), 1 << 24) == "cpu"
    even = dataclasses.replace(GH200, link_bw=2.0, dram_bw=6.0, hbm_bw=6e9)  # 2n and n + n seconds
    assert choose_cast(dataclasses.replace(even, hbm_bw=1e300), 1 << 24) == "gpu"
    assert choose_cast(even, 1 << 24) == "cpu"
    assert choose_cast(even, 1 << 24, pinned=False) == "gpu"


@pytest.mark.parametrize(("per_node", "nodes"), [(1, 1), (4, 2), (8, 1)])
def test_deepspeed_accounting(per_node, nodes):
    params, largest = 16 * 10**9, 10**8
    where = {"devices_per_node": per_node, "nodes": nodes}

    def ours(accounting, **how):
        memory = estimate_memory(params, accounting=accounting, largest_layer=largest, **how, **where)
        assert memory.device_bytes + memory.host_bytes == sum(memory.terms.values())
        return memory.device_bytes, memory.host_bytes

    where_too = {"per_node": per_node, "nodes": nodes}
    for offload in (False, True):
        assert ours("zero2", offload_optimizer=offload) == oracle.zero2(params, offload=offload, **where_too)
    for optimizer, weights in ((False, False), (True, False), (True, True)):
        got = ours("zero3", offload_optimizer=optimizer, offload_params=weights)
        assert got == oracle.zero3(params, largest, optimizer=optimizer, weights=weights, **where_too)


def test_our_accounting():
    """Bytes a parameter: 2 of weights, 2 of a layer's gradient, on the host 12 + 4; all 16 on a lone GPU."""
    alone = estimate_memory(1000, largest_layer=10)
    assert (alone.device_bytes, alone.host_bytes) == (2000 + 20, 16000)
    flow = estimate_memory(1000, largest_layer=10, offload_params=True)
    assert (flow.device_bytes, flow.host_bytes) == (2 * 20 + 20, 18000)
    assert estimate_memory(1000, offload_optimizer=False).terms == {
        "device: weights": 2000, "device: gradients": 2000, "device: optimizer": 12000,
    }  # fmt: skip
    spread = estimate_memory(1000, largest_layer=10, devices_per_node=2, nodes=2)
    assert (spread.device_bytes, spread.host_bytes) == (500 + 40 + 20, 8000)


@pytest.mark.latest
def test_largest_models_of_one_gh200():
    """25 B against 3.5 B without offload; ZeRO-Offload keeps all 16-bit gradients and stops before (paper: 15 B)."""
    for name in ("3.5B", "25B"):
        plan_offload(shape(name), GH200)
    with pytest.raises(CapacityError, match="superoffload does not fit on gh200"):
        plan_offload(shape("50B"), GH200)
    plan_offload(shape("3.5B"), GH200, method="gpu_only")
    with pytest.raises(CapacityError, match=r"gpu_only does not fit on gh200\n(.*\n)*device total +10\d\.\d\d GB"):
        plan_offload(shape("5B"), GH200, method="gpu_only")
    plan_offload(shape("15B"), GH200, method="zero_offload")
    with pytest.raises(CapacityError, match="zero_offload does not fit"):
        plan_offload(shape("25B"), GH200, method="zero_offload")


def test_what_a_plan_says():
    made = plan_offload(shape("25B"), GH200)
    assert (made.weight_policy, made.cast, made.undo, made.offload_inputs) == ("stationary", "gpu", "residual", False)
    assert made.n_buckets == -(-shape("25B").n_params // 2**24)
    held = made.gpu_buckets * 2**24
    assert 0 < made.gpu_buckets < 10
    assert made.memory.terms["device: optimizer"] == 12 * held
    assert made.memory.terms["host: optimizer"] == 12 * (shape("25B").n_params - held)
    assert made.memory.terms["host: undo"] == 3 * (shape("25B").n_params - held)
    with pytest.raises(CapacityError, match=r"host: undo +294\.89 GB"):
        plan_offload(shape("25B"), GH200, undo="copy")
    assert plan_offload(shape("5B"), GH200).undo == "copy"
    small_host = dataclasses.replace(GH200, host_bytes=17 * shape("5B").n_params)
    assert plan_offload(shape("5B"), small_host).undo == "off"
    alone = plan_offload(shape("3.5B"), GH200, method="gpu_only")
    assert (alone.gpu_buckets, alone.undo, alone.memory.host_bytes) == (alone.n_buckets, "off", 0)


def test_long_sequences_on_eight_devices():
    """13 B at a million tokens, and at two with the blocks' inputs on the host. Weights flow where they do not fit."""
    plan_offload(ModelShape(*TABLE["13B"], 1, 1 << 20), GH200, n_devices=8)
    longer = plan_offload(ModelShape(*TABLE["13B"], 1, 1 << 21), GH200, n_devices=8)
    assert longer.offload_inputs
    assert longer.memory.terms["host: block inputs"] == 2 * (1 << 18) * 4096 * 65
    little = dataclasses.replace(GH200, hbm_bytes=40 * 10**9)
    made = plan_offload(shape("20B"), little, undo="off")
    assert made.weight_policy == "flow"
    assert made.memory.terms["host: weights"] == 2 * shape("20B").n_params
    assert plan_offload(shape("50B"), GH200, n_devices=4).undo in ("copy", "residual")


def test_bad_inputs(unchecked):
    with pytest.raises(ValueError, match="machine: got 'v100', expected one of gh200, gb200, h100_pcie, mi300a, cpu2"):
        get_machine("v100")
    with pytest.raises(ValueError, match="link_bw: expected a positive number, got 0"):
        Machine("m", 1, 1, 1.0, 0, 1.0, 1.0, 1.0, 1)
    with pytest.raises(ValueError, match="hidden: expected a positive number, got -1"):
        ModelShape(1, -1, 1, 1)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        weight_flow_efficiency(GH200, 0)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        choose_cast(GH200, 0)
    with pytest.raises(ValueError, match="min_eff: expected a share"):
        choose_weight_policy(GH200, tokens=1, weight_bytes=1, free_bytes=1, min_eff=1.5)
    with pytest.raises(ValueError, match="weight_bytes: expected at least 0, got -1"):
        choose_weight_policy(GH200, tokens=1, weight_bytes=-1, free_bytes=1)
    with pytest.raises(ValueError, match="accounting: got 'zero1', expected one of ours, zero2, zero3"):
        estimate_memory(1, accounting="zero1")
    with pytest.raises(ValueError, match="nodes: expected at least 1, got 0"):
        estimate_memory(1, nodes=0)
    with pytest.raises(ValueError, match="offload_params: expected False without offload_optimizer"):
        estimate_memory(1, offload_optimizer=False, offload_params=True)
    with pytest.raises(ValueError, match="offload_params: expected False for accounting 'zero2'"):
        estimate_memory(1, accounting="zero2", offload_params=True)
    with pytest.raises(ValueError, match="method: got 'zero4', expected one of superoffload, zero_offload, gpu_only"):
        plan_offload(shape("5B"), GH200, method="zero4")
    with pytest.raises(ValueError, match="undo: got 'log', expected one of auto, copy, residual, off"):
        plan_offload(shape("5B"), GH200, undo="log")
    with pytest.raises(ValueError, match="undo: expected 'auto' or 'off' for 'zero_offload'"):
        plan_offload(shape("5B"), GH200, method="zero_offload", undo="copy")
    with pytest.raises(ValueError, match="n_devices: expected at least 1, got 0"):
        plan_offload(shape("5B"), GH200, n_devices=0)
