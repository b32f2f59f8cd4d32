"""The engine by its laws, small schedules by hand, and the paper's ablation by order and sign: all of it is a model."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.superoffload.machine import Machine, ModelShape, get_machine
from jaxlab.superoffload.memory import CapacityError
from jaxlab.superoffload.schedule import LANES, Schedule, Task, run
from jaxlab.superoffload.simulation import BASELINES, choose_gpu_buckets, simulate

GH200 = get_machine("gh200")
FIVE_B = ModelShape(44, 3072, 4, 1024)
BUCKET = 1 << 24
OFF = {"fast_adam": False, "superchip_cast": False, "speculation": False, "repartition": False}


@st.composite
def programs(draw):
    tasks = []
    for i in range(draw(st.integers(1, 14))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else ()
        tasks.append(Task(f"t {i}", draw(st.sampled_from(LANES[:3])), draw(st.integers(0, 4)), tuple(after)))
    return tasks


@given(programs())
@settings(max_examples=150, deadline=None)
def test_laws_of_the_engine(tasks):
    spans = run(tasks)
    ready = [max((spans[i][1] for i in task.after), default=0) for task in tasks]
    for task, (start, end), earliest in zip(tasks, spans, ready):
        assert end == start + task.seconds
        assert start >= earliest
    for lane in LANES[:3]:
        mine = [i for i, task in enumerate(tasks) if task.lane == lane]
        for i, j in itertools.combinations(mine, 2):
            assert spans[i][1] <= spans[j][0] or spans[j][1] <= spans[i][0], "two tasks at once"
        for i in mine:  # nobody waits beside an idle lane
            busy = sum(min(end, spans[i][0]) - max(start, ready[i])
                       for start, end in (spans[j] for j in mine if j != i)
                       if end > ready[i] and start < spans[i][0])  # fmt: skip
            assert busy == spans[i][0] - ready[i]
        served = sorted((i for i in mine if tasks[i].seconds), key=lambda i: spans[i])
        for i, j in itertools.pairwise(served):
            assert ready[i] <= ready[j] or ready[j] > spans[i][0], "a later one overtook"


# Two buckets, the second one smaller.
TWO = ModelShape(2, 512, 4, 256, vocab=32768)
FIRST, SECOND = BUCKET, TWO.n_params - BUCKET
SLOW_HOST = Machine("slow host", 10**12, 10**12, 1e14, 1e18, 1e18, 2e10, 1e15, 8)
FORWARD = TWO.forward_flops / TWO.n_params / (0.35 * 1e14)  # seconds a parameter
VERDICT = 2e-5


def test_two_buckets_by_hand():
    """Transfers and the GPU's memory take no time, the host is slow: what is left is arithmetic."""
    assert 0 < SECOND < FIRST
    fast, slow = 0.74 * 2e10, 0.58 * 2e10
    adam, cast = 28 / slow, 6 / fast
    # Synchronous: forward, backward with recomputation, then on the host cast, two Adams, two casts.
    sync = simulate(TWO, SLOW_HOST, method="zero_offload")
    hosted = cast * FIRST + (adam + cast) * TWO.n_params
    assert sync.step_time == pytest.approx(4 * FORWARD * TWO.n_params + hosted, rel=1e-6)
    assert sync.gpu_idle == pytest.approx(hosted / sync.step_time, rel=1e-6)
    assert sync.tflops == pytest.approx(TWO.train_flops / sync.step_time / 1e12)
    # Speculative: Adam starts once the last bucket's gradient is there and never stops.
    early = simulate(TWO, SLOW_HOST, repartition=False)
    start = FORWARD * TWO.n_params + 3 * FORWARD * SECOND
    assert early.step_time == pytest.approx(start + (28 + 3) / fast * TWO.n_params, rel=1e-6)
    # All on the GPU.
    alone = simulate(TWO, dataclasses.replace(SLOW_HOST, hbm_bw=1e11), method="gpu_only")
    assert alone.step_time == pytest.approx((4 * FORWARD + 28e-11) * TWO.n_params + VERDICT, rel=1e-6)
    assert alone.lanes["host"] == alone.lanes["d2h"] == alone.lanes["h2d"] == []
    assert [label for label, _, _ in alone.lanes["gpu"]] == [
        "forward 0", "forward 1", "backward 1", "backward 0", "adam 0", "adam 1",
    ]  # fmt: skip


def test_buckets_that_stay_on_the_gpu():
    """With free transfers the host ends in time if (n - k) sigma <= (n - 1) tau_b + k tau_o."""
    model = ModelShape(24, 1024, 4, 512, vocab=16000)
    machine = dataclasses.replace(SLOW_HOST, gpu_flops=1e15, dram_bw=1e12, hbm_bw=1e13, link_bw=1e18)
    elements = 10**6
    n = model.n_params / elements
    backward = 3 * model.forward_flops / n / (0.35 * 1e15) + 6e-13 * elements  # the gradient is cast, too
    host, gpu = 31 / (0.74 * 1e12) * elements, 28e-13 * elements
    k = choose_gpu_buckets(model, machine, bucket_bytes=4 * elements)
    assert 10 < k < n - 10
    assert k == pytest.approx((n * host - (n - 1) * backward) / (host + gpu), abs=3)
    # A host as fast as one likes needs no help; one that is hopeless gets next to nothing; device memory is a limit.
    assert choose_gpu_buckets(model, dataclasses.replace(machine, dram_bw=1e15), bucket_bytes=4 * elements) <= 1
    hopeless = dataclasses.replace(machine, dram_bw=1e10)
    most = math.ceil(n)
    assert choose_gpu_buckets(model, hopeless, bucket_bytes=4 * elements) >= most - 4
    tight = dataclasses.replace(hopeless, hbm_bytes=4 * 10**9)
    assert 10 < choose_gpu_buckets(model, tight, bucket_bytes=4 * elements) < most - 20


def check(schedule):
    """Conservation: lanes do one thing at a time, and every bucket goes its way in order."""
    at = {}
    for lane, intervals in schedule.lanes.items():
        assert intervals == sorted(intervals, key=lambda interval: interval[1:])
        for (_, _, end), (_, start, _) in itertools.pairwise(intervals):
            assert end <= start + 1e-12
        for label, start, end in intervals:
            at.setdefault((*label.split(), lane), []).append((start, end))
    (((_, verdict),),) = [spans for (kind, *_), spans in at.items() if kind == "verdict"] or [((None, 0.0),)]
    forward = [spans[0] for (kind, *_), spans in at.items() if kind == "forward"]
    backward = [spans[0] for (kind, *_), spans in at.items() if kind == "backward"]
    assert max(end for _, end in forward) <= min(start for start, _ in backward) + 1e-12
    for (kind, *where), spans in at.items():
        number, lane = where[0], where[-1]
        if kind == "send":
            assert spans[0][0] >= at["backward", number, "gpu"][0][1] - 1e-12
        if kind == "adam" and lane == "host":
            assert spans[0][0] >= at["send", number, "d2h"][0][1] - 1e-12
        if kind == "adam" and lane == "gpu":
            assert spans[0][0] >= max(end for _, end in backward) - 1e-12
        if kind == "return":
            assert spans[0][0] >= at["adam", number, "host"][0][1] - 1e-12
    return verdict


@pytest.mark.latest
def test_the_papers_ablation():
    """TFLOP/s of 5 B, each technique on top of the last; paper: 116, 128, 144, 209, 239."""
    on, steps = dict(OFF), [simulate(FIVE_B, GH200, **OFF)]
    for technique in OFF:
        on[technique] = True
        steps.append(simulate(FIVE_B, GH200, **on))
    rates = [step.tflops for step in steps]
    gains = [after / before - 1 for before, after in itertools.pairwise(rates)]
    assert all(gain > 0.03 for gain in gains), gains
    assert gains.index(max(gains)) == 2  # speculation
    assert rates == pytest.approx([116.2, 128.2, 144.5, 209.4, 238.9], rel=0.15)
    assert steps[0] == simulate(FIVE_B, GH200, method="zero_offload")
    assert 1.5 < rates[-1] / rates[0] < 2.5
    idle = [step.gpu_idle for step in steps]
    assert idle == sorted(idle, reverse=True)
    assert idle[0] > 0.5
    assert idle[-1] < 0.05
    for step in steps:
        check(step)
    # Adam is all over with the backward pass, but for the few buckets on the GPU.
    last = steps[-1]
    assert max(end for _, _, end in last.lanes["host"]) < last.step_time


@pytest.mark.parametrize("name", ["1B", "3.5B"])
def test_the_band_against_zero_offload(name):
    layers, hidden = {"1B": (20, 2048), "3.5B": (70, 2048)}[name]
    model = ModelShape(layers, hidden, 4, 1024)
    ratio = simulate(model, GH200).tflops / simulate(model, GH200, method="zero_offload").tflops
    assert 1.5 < ratio < 2.5


def test_baselines_and_weights_that_flow():
    model = ModelShape(8, 2048, 4, 1024)
    rates = {method: simulate(model, GH200, method=method).tflops for method in ("superoffload", *BASELINES)}
    assert rates["fsdp_offload"] < rates["zero_infinity"] <= rates["zero_offload"] < rates["superoffload"]
    for method in BASELINES:
        check(simulate(model, GH200, method=method))
    small = dataclasses.replace(GH200, hbm_bytes=int(1.85 * 10**9))
    flow = simulate(model, small)
    check(flow)
    fetched = [label for label, _, _ in flow.lanes["h2d"]]
    assert all(label.startswith("weights") for label in fetched)
    assert len(fetched) > len(set(fetched))  # some of them in both passes
    with pytest.raises(CapacityError):
        simulate(dataclasses.replace(model, batch=1), small)


def test_json_text_and_picture():
    schedule = simulate(ModelShape(4, 1024, 4, 512), GH200)
    read = json.loads(schedule.to_json())
    lanes = {lane: [tuple(interval) for interval in intervals] for lane, intervals in read.pop("lanes").items()}
    assert Schedule(**read, lanes=lanes) == schedule
    text = Schedule(
        2.0, 3.0, 0.25,
        {"gpu": [("forward 0", 0.0, 0.5), ("backward 0", 0.5, 1.5)], "d2h": [("send 0", 1.5, 2.0)]},
    ).to_ascii(width=8)  # fmt: skip
    assert text.splitlines() == [
        "step 2000.0 ms, 3.0 TFLOP/s, GPU idle 25.0% (modelled)",
        "gpu |ffbbbb..|",
        "d2h |......ss|",
        "     f forward, b backward, s send",
    ]
    drawn = schedule.figure()
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(reversed(LANES))
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"forward", "backward", "send", "adam", "return", "cast", "verdict"} == shown
    again = schedule.figure().axes[0]
    paths = [[path.vertices.tolist() for path in bars.get_paths()] for bars in axes.collections]
    assert paths == [[path.vertices.tolist() for path in bars.get_paths()] for bars in again.collections]


def test_bad_inputs(unchecked):
    with pytest.raises(ValueError, match="method: got 'zero9', expected one of superoffload, zero_offload"):
        simulate(FIVE_B, GH200, method="zero9")
    for size in (3, 6):
        with pytest.raises(ValueError, match=f"bucket_bytes: expected a positive multiple of 4, got {size}"):
            choose_gpu_buckets(FIVE_B, GH200, bucket_bytes=size)
    with pytest.raises(ValueError, match="t 0: expected to come after earlier tasks, got 0"):
        run([Task("t 0", "gpu", 1.0, (0,))])
    with pytest.raises(ValueError, match="t 0: expected seconds of at least 0, got -1"):
        run([Task("t 0", "gpu", -1)])
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        simulate(ModelShape(1, 64, 1, 64), GH200).to_ascii(0)
