"""Where the time of an offloaded training step goes: a model of the schedule, built from bandwidths (spec 2.7).

Buckets in forward order; the backward pass frees their gradients in reverse. Of each bucket the gradient goes to the
host, Adam runs there, and the weights come back before the next forward pass reaches them:

    gpu    forward 0 .. n-1, backward n-1 .. 0 (with recomputation), casts, Adam of the buckets it keeps
    d2h    gradients           h2d    updated weights, or layers that flow
    host   casts and Adam      validator    the verdict on the gradients' norm

With speculation Adam starts as soon as a gradient arrives, without it after the verdict.
"""

import bisect
import dataclasses
import math

from jaxlab.superoffload.machine import Machine, ModelShape
from jaxlab.superoffload.memory import CapacityError, held_bytes, model_memory, usable
from jaxlab.superoffload.policy import choose_cast, choose_weight_policy
from jaxlab.superoffload.schedule import LANES, Schedule, Task, run

BASELINES = ("zero_offload", "zero_infinity", "fsdp_offload", "gpu_only")
METHODS = ("superoffload", *BASELINES)

# Shares of the host's bandwidth that an Adam reaches, from the paper's latencies for 8 B parameters at 28 bytes each
# on Grace's 500 GB/s: GraceAdam 0.608 s, DeepSpeed's CPU-Adam 0.769 s, torch 1.834 s. Casts on the CPU stream as fast
# as the first.
ADAM_SHARE = {"fast": 0.74, "cpu_adam": 0.58, "torch": 0.24}
_ADAM_BYTES = 28  # read p, m, v, g, write p, m, v
_ADAM_FLOPS = 15
_UNDO_BYTES = 3
GPU_SHARE = 0.35
"""Share of the GPU's peak that forward and backward reach: the one number fitted to the paper's ablation."""
_STEPS = 3  # until the schedule repeats itself


@dataclasses.dataclass(frozen=True)
class _Techniques:
    """What a method does: the rate of Adam, where casts are, and when Adam may start."""

    adam: str = "fast"
    cast: str = "gpu"
    speculation: bool = True
    gpu_buckets: int = 0
    flow: bool = False
    prefetch: bool = True


def simulate(
    model: ModelShape,
    machine: Machine,
    *,
    method: str = "superoffload",
    fast_adam: bool = True,
    superchip_cast: bool = True,
    speculation: bool = True,
    repartition: bool = True,
    bucket_bytes: int = 64 << 20,
    cast: str | None = None,
    verdict_s: float = 2e-5,
) -> Schedule:
    """A step of `model` on one device of `machine` in the steady state. A model, not a measurement.

    The four techniques can be switched off for "superoffload" only; with all of them off it is "zero_offload". The
    baselines have none: "zero_offload" (synchronous, 16-bit transfers, casts and DeepSpeed's Adam on the CPU),
    "zero_infinity" (the same with weights that flow, one layer ahead), "fsdp_offload" (weights that flow without
    looking ahead, torch's Adam), "gpu_only".

    Args:
        model: sizes and batch.
        machine: the device and its host.
        method: one of `METHODS`.
        fast_adam: GraceAdam's rate in place of DeepSpeed's CPU-Adam's.
        superchip_cast: casts where `choose_cast` says; else on the CPU.
        speculation: Adam does not wait for the verdict.
        repartition: `choose_gpu_buckets` buckets stay on the GPU; else none.
        bucket_bytes: float32 bytes of a bucket.
        cast: "gpu" or "cpu", in place of what `superchip_cast` finds; "superoffload" only.
        verdict_s: seconds that the validator takes after the last gradient.

    Raises:
        ValueError: unknown method or cast, bucket_bytes below 4 or no multiple of 4.
        CapacityError: the weights find no place on the device, staying or flowing.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if cast not in (None, "gpu", "cpu"):
        raise ValueError(f"cast: got {cast!r}, expected gpu or cpu")
    elements = _bucket_elements(bucket_bytes)
    if method == "superoffload":
        how = _Techniques(
            adam="fast" if fast_adam else "cpu_adam",
            cast=cast or (choose_cast(machine, elements) if superchip_cast else "cpu"),
            speculation=speculation,
            flow=weight_policy(model, machine) == "flow",
        )
        if repartition:
            how = dataclasses.replace(
                how, gpu_buckets=_gpu_buckets(model, machine, how, elements, _free(model, machine))
            )
    elif method == "gpu_only":
        how = _Techniques(gpu_buckets=bucket_count(model, bucket_bytes), speculation=False)
    else:
        how = _Techniques(
            adam="torch" if method == "fsdp_offload" else "cpu_adam",
            cast="cpu",
            speculation=False,
            flow=method != "zero_offload",
            prefetch=method != "fsdp_offload",
        )
    return _steady_state(_Step(model, machine, how, elements, verdict_s))


def choose_gpu_buckets(model: ModelShape, machine: Machine, *, bucket_bytes: int = 64 << 20) -> int:
    """How many of the first buckets keep their float32 state on the GPU.

    Their gradients come last, so their Adam on the host would delay the next forward pass. The smallest k at which the
    last host bucket is back no later than the backward pass and k Adams on the GPU have ended, by simulation; at most
    as many as device memory holds at 12 bytes an element.

    Raises:
        ValueError: bucket_bytes below 4 or no multiple of 4.
        CapacityError: the weights find no place on the device.
    """
    return gpu_buckets_within(model, machine, weight_policy(model, machine), _free(model, machine), bucket_bytes)


def gpu_buckets_within(model: ModelShape, machine: Machine, policy: str, free_bytes: int, bucket_bytes: int) -> int:
    """`choose_gpu_buckets` for a weight policy and the device memory that is free for them.

    Several devices that share every bucket and the tokens evenly choose as one device does for all tokens, out of the
    memory of all.
    """
    elements = _bucket_elements(bucket_bytes)
    how = _Techniques(cast=choose_cast(machine, elements), flow=policy == "flow")
    return _gpu_buckets(model, machine, how, elements, free_bytes)


def weight_policy(model: ModelShape, machine: Machine, *, n_devices: int = 1) -> str:
    """`choose_weight_policy` for a model whose blocks are recomputed; their inputs can go to the host.

    Raises:
        CapacityError: the weights find no place on a device.
    """
    device, _ = usable(machine)

    def free(offload_inputs: bool) -> tuple[int, int]:
        memory = model_memory(model, method="superoffload", offload_inputs=offload_inputs, n_devices=n_devices)
        weights = memory.terms["device: weights"]
        return weights, device - (memory.device_bytes - weights)

    weights, kept = free(False)
    tokens = math.ceil(model.tokens / n_devices)
    offloaded = free(True)[1]
    return choose_weight_policy(
        machine, tokens=tokens, weight_bytes=weights, free_bytes=kept, free_bytes_remat=offloaded
    )


def adam_bytes(speculation: bool) -> int:
    """Host bytes a parameter that a step of Adam moves, with the undo log's if it is speculated on."""
    return _ADAM_BYTES + _UNDO_BYTES * speculation


def bucket_count(model: ModelShape, bucket_bytes: int) -> int:
    """Buckets of all parameters, `bucket_bytes` of float32 each."""
    return -(-model.n_params // _bucket_elements(bucket_bytes))


def _bucket_elements(bucket_bytes: int) -> int:
    if bucket_bytes < 4 or bucket_bytes % 4:
        raise ValueError(f"bucket_bytes: expected a positive multiple of 4, got {bucket_bytes}")
    return bucket_bytes // 4


def _free(model: ModelShape, machine: Machine) -> int:
    """Device memory that is left for float32 state; the blocks' inputs go to the host only if nothing is."""
    policy = weight_policy(model, machine)
    for offload_inputs in (False, True):
        memory = model_memory(model, method="superoffload", weight_policy=policy, offload_inputs=offload_inputs)
        if (free := usable(machine)[0] - memory.device_bytes) >= 0:
            return free
    raise CapacityError(f"the model does not fit on {machine.name}\n{memory.table(machine)}")


def _gpu_buckets(model: ModelShape, machine: Machine, how: _Techniques, elements: int, free: int) -> int:
    policy = "flow" if how.flow else "stationary"
    limit = min(-(-model.n_params // elements), free // (held_bytes(policy) * elements))

    def in_time(k: int) -> bool:  # with more buckets on the GPU the host is done earlier and the GPU later
        return _Step(model, machine, dataclasses.replace(how, gpu_buckets=k), elements).host_is_done_in_time()

    low, high = 0, 1
    while high < limit and not in_time(high):  # mostly it is 1 or nearly all
        low, high = high + 1, 2 * high
    return bisect.bisect_left(range(min(high, limit)), True, lo=low, key=in_time)


class _Step:
    """The tasks of a step, bucket by bucket, and how long each takes."""

    def __init__(self, model: ModelShape, machine: Machine, how: _Techniques, elements: int, verdict_s: float = 0.0):
        self.model, self.machine, self.how, self.verdict_s = model, machine, how, verdict_s
        whole, rest = divmod(model.n_params, elements)
        self.sizes = [elements] * whole + [rest] * (rest > 0)
        self.window = max(2, 2 * model.layer_params // elements) if how.prefetch else 1  # buckets of two layers
        rate = ADAM_SHARE[how.adam] * machine.dram_bw
        self.adam_s = max(
            adam_bytes(how.speculation) / rate, _ADAM_FLOPS / machine.host_flops
        )  # a parameter, like the following
        self.gpu_adam_s = _ADAM_BYTES / machine.hbm_bw
        self.forward_s = model.forward_flops / (GPU_SHARE * machine.gpu_flops) / model.n_params
        self.cast_s = 6 / (machine.hbm_bw if how.cast == "gpu" else ADAM_SHARE["fast"] * machine.dram_bw)
        self.link_s = (4 if how.cast == "gpu" else 2) / machine.link_bw

    def tasks(self, steps: int) -> list[Task]:
        """`steps` training steps, each after the last; labels of the step numbered s start with "s "."""
        made: list[Task] = []

        def add(step: int, label: str, lane: str, seconds: float, *after: int | None) -> int:
            made.append(Task(f"{step} {label}", lane, seconds, tuple(i for i in after if i is not None)))
            return len(made) - 1

        ready: list[tuple[int, ...]] = [()] * len(self.sizes)  # after which a bucket's weights are new
        last: int | None = None
        for step in range(steps):
            last = self._forward(add, step, ready, last)
            arrived, last = self._backward(add, step, last)
            verdict = add(step, "verdict", "validator", self.verdict_s, last)
            ready = self._update(add, step, arrived, verdict)
        return made

    def _resident(self, b: int) -> bool:
        return not self.how.flow or b < self.how.gpu_buckets

    def _forward(self, add, step, ready, last):
        done: list[int] = []
        for b, size in enumerate(self.sizes):
            fetched = None
            if not self._resident(b):
                room = done[b - self.window] if b >= self.window else last
                fetched = add(step, f"weights {b}", "h2d", 2 * size / self.machine.link_bw, room, *ready[b])
            last = add(step, f"forward {b}", "gpu", self.forward_s * size, last, fetched, *ready[b])
            done.append(last)
        return last

    def _backward(self, add, step, last):
        arrived: dict[int, int] = {}
        done: dict[int, int] = {}
        count = len(self.sizes)
        for b in reversed(range(count)):
            size, fetched = self.sizes[b], None
            if not self._resident(b) and b < count - self.window:
                fetched = add(step, f"weights {b}", "h2d", 2 * size / self.machine.link_bw, done[b + self.window])
            # Twice the forward pass, and once more to recompute it.
            last = done[b] = arrived[b] = add(step, f"backward {b}", "gpu", 3 * self.forward_s * size, last, fetched)
            if b < self.how.gpu_buckets:
                continue
            if self.how.cast == "gpu":
                last = arrived[b] = add(step, f"cast {b}", "gpu", self.cast_s * size, last)
            arrived[b] = add(step, f"send {b}", "d2h", self.link_s * size, arrived[b])
            if self.how.cast == "cpu":
                arrived[b] = add(step, f"cast {b}", "host", self.cast_s * size, arrived[b])
        return arrived, last

    def _update(self, add, step, arrived, verdict):
        ready: list[tuple[int, ...]] = [(verdict,)] * len(self.sizes)
        for b in reversed(range(len(self.sizes))):
            size = self.sizes[b]
            if b < self.how.gpu_buckets:
                continue
            gate = None if self.how.speculation else verdict
            at = add(step, f"adam {b}", "host", self.adam_s * size, arrived[b], gate)
            if self.how.cast == "cpu":
                at = add(step, f"cast {b}", "host", self.cast_s * size, at)
            if not self.how.flow:
                at = add(step, f"return {b}", "h2d", self.link_s * size, at)
                if self.how.cast == "gpu":
                    at = add(step, f"cast {b}", "gpu", self.cast_s * size, at)
            ready[b] = (at, verdict)
        for b in range(self.how.gpu_buckets):
            ready[b] = (add(step, f"adam {b}", "gpu", self.gpu_adam_s * self.sizes[b], verdict),)
        return ready

    def host_is_done_in_time(self) -> bool:
        """Whether the last host bucket is back by the end of the backward pass and the Adams on the GPU."""
        tasks = self.tasks(1)
        spans = run(tasks)
        kinds = [task.label.split()[1] for task in tasks]
        backward = max(end for kind, (_, end) in zip(kinds, spans) if kind == "backward")
        here = sum(self.gpu_adam_s * size for size in self.sizes[: self.how.gpu_buckets])
        host = range(self.how.gpu_buckets, len(self.sizes))
        back = {f"0 {kind} {b}" for kind in ("return", "cast", "adam") for b in host}
        finish = max((end for task, (_, end) in zip(tasks, spans) if task.label in back), default=0.0)
        return finish <= backward + here


def _steady_state(step: _Step) -> Schedule:
    tasks = step.tasks(_STEPS)
    spans = run(tasks)
    starts = [next(s for task, (s, _) in zip(tasks, spans) if task.label == f"{n} forward 0") for n in range(_STEPS)]
    begin, shown = starts[-2], f"{_STEPS - 2} "
    step_time = starts[-1] - begin
    lanes: dict[str, list[tuple[str, float, float]]] = {lane: [] for lane in LANES}
    for task, (start, end) in sorted(zip(tasks, spans), key=lambda item: item[1]):
        if task.label.startswith(shown):
            lanes[task.lane].append((task.label.removeprefix(shown), start - begin, end - begin))
    busy = sum(end - start for _, start, end in lanes["gpu"])
    return Schedule(
        step_time=step_time,
        tflops=step.model.train_flops / step_time / 1e12,
        gpu_idle=max(0.0, 1 - busy / step_time),
        lanes=lanes,
    )
