"""A decoder trained with Adam on the host, speculatively and synchronously, to the same bits; and what that is for."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.superoffload.study import Run, StudyConfig
from jaxlab.training import TrainConfig

if TYPE_CHECKING:
    from jaxlab.superoffload import Machine, ModelShape

__all__ = ["PlanConfig", "StudyConfig", "ablation", "plan", "run", "sizes"]

_GB = 1e9

SIZES = {
    "1B": (20, 2048),
    "3.5B": (70, 2048),
    "5B": (44, 3072),
    "10B": (50, 4096),
    "13B": (65, 4096),
    "15B": (18, 8192),
    "20B": (25, 8192),
    "25B": (30, 8192),
    "50B": (60, 8192),
}
"""Layers and hidden size of the artifact's models."""

CLAIMED = {"gpu_only": "3.5B", "zero_offload": "15B", "superoffload": "25B"}
"""The largest model on one GH200, by the paper."""

TECHNIQUES = (
    ("fast_adam", "+ GraceAdam", 128.23),
    ("superchip_cast", "+ casts on the GPU", 144.49),
    ("speculation", "+ speculation", 209.36),
    ("repartition", "+ repartition", 238.92),
)
"""Switch of `simulate`, label, and the paper's TFLOP/s with it and those before it; 116.20 with none."""
_NONE = 116.20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A training step to compile.

    Attributes:
      method: of `jaxlab.superoffload.compiled.METHODS`.
      offload_inputs: the blocks' inputs wait for the backward pass on the host.
    """

    method: str = "superoffload"
    offload_inputs: bool = False


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles the step for a target, which need not be there; see `jaxlab.superoffload.compiled.compile_step`."""
    from jaxlab.superoffload.compiled import compile_step

    return compile_step(
        config.model,
        target,
        config.method,
        batch=config.batch_size,
        length=config.length,
        offload_inputs=config.offload_inputs,
    )


def run(config: StudyConfig) -> core.Report:
    """Trains in several ways and compares every bit; tells losses, rollbacks, a measured timeline, and modelled sizes.

    Needs nothing but a CPU, which plays both parts; sleeps stand for the link between them.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> core.Report:
    from jaxlab.superoffload import ModelShape, get_machine, pictures, simulate
    from jaxlab.superoffload.study import Study, different_bits

    study = Study(config)
    runs = {way: study.run(way, folder / way.replace(" ", "_")) for way in config.ways}
    first, *others = runs
    differ = {way: different_bits(runs[first], runs[way]) for way in others}
    shown = runs[others[-1] if others else first]
    rows = shown.rows
    machine, shape = get_machine(config.machine), ModelShape(*config.shape)
    schedule, steps = simulate(shape, machine), ablation(shape, machine)
    claims = sizes(machine)
    largest = {
        method: next((n for n, m, *_, fits in reversed(claims) if m == method and fits), "") for method in CLAIMED
    }
    finite = [row["loss"] for row in rows if not row["skipped"]]
    parameters = sum(x.size for name, x in shown.state.items() if name.startswith("p "))
    timelines = [(way, run.timelines[-1]) for way, run in runs.items() if run.timelines]
    return core.Report(
        system="superoffload",
        title=f"{parameters / 1e6:.1f} M parameters, Adam on the host: speculative and synchronous, to the same bits",
        metrics={
            "parameters": parameters,
            "steps": len(rows),
            "first_loss": finite[0],
            "final_loss": finite[-1],
            "different_bits": sum(differ.values()),
            "clipped": int(sum(row["clipped"] for row in rows)),
            "skipped": int(sum(row["skipped"] for row in rows)),
            "rolled_back": int(sum(row["rolled_back"] for row in rows)),
            "final_loss_scale": rows[-1]["loss_scale"],
            "modelled_step_s": schedule.step_time,
            "modelled_gain": steps[-1][1] / steps[0][1],
            **{f"largest_{method}": name for method, name in largest.items()},
        },
        tables=(
            (
                "Ways of one training run (measured on this CPU)",
                (
                    "way",
                    "different bits",
                    "updates",
                    "rolled back, first quarter",
                    "last quarter",
                    "undo bytes a parameter, median",
                    "ms a step, median of the last",
                ),
                [_way_row(way, run, differ.get(way), parameters) for way, run in runs.items()],
            ),
            (
                f"Techniques one by one, {config.shape[0]} x {config.shape[1]} on {machine.name} (modelled)",
                ("technique", "TFLOP/s", "gain", "paper"),
                [
                    (name, tflops, None if i == 0 else tflops / steps[i - 1][1] - 1, paper)
                    for i, (name, tflops, paper) in enumerate(steps)
                ],
            ),
            (
                f"One {machine.name}, 4 x 1024 tokens: GB (arithmetic; compiled ones are in the documentation)",
                ("model", "method", "device", "host", "fits"),
                claims,
            ),
            (
                "The largest that fits (arithmetic), and the paper's",
                ("method", "here", "paper"),
                [(method, largest[method], claimed) for method, claimed in CLAIMED.items()],
            ),
        ),
        plots=(
            ("Loss", pictures.losses(rows)),
            ("Rollbacks", pictures.rollbacks(rows)),
            *((f"Last step, {way} (measured)", timeline.figure()) for way, timeline in timelines),
            (f"A step of the {config.shape[0]} x {config.shape[1]} model (modelled)", schedule.figure()),
            ("Techniques one by one", pictures.ablation(steps)),
        ),
        notes=(
            f"{len(rows)} steps of {config.batch_size} x {config.length} tokens in {config.model.dtype}; losses made "
            f"NaN at {_told(config.nan_at)} and infinite at {_told(config.inf_at)}. Bits are those of p, m, v, count "
            f"and loss scale against '{first}'.",
            "One CPU plays accelerator and host, and sleeps its link: timelines show order and overlap, not a GPU's "
            "speed. Schedules and techniques are modelled, memory is arithmetic.",
        ),
    )


def ablation(shape: "ModelShape", machine: "Machine") -> list[tuple[str, float, float | None]]:
    """Modelled TFLOP/s with the paper's techniques one by one, and the paper's where it has the same model."""
    from jaxlab.superoffload import simulate

    switches: dict[str, Any] = dict.fromkeys((name for name, *_ in TECHNIQUES), False)
    told = [("none", _NONE)]
    found = [simulate(shape, machine, **switches).tflops]
    for name, label, paper in TECHNIQUES:
        switches[name] = True
        told.append((label, paper))
        found.append(simulate(shape, machine, **switches).tflops)
    same = (shape.layers, shape.hidden) == SIZES["5B"] and machine.name == "gh200"
    return [(label, tflops, paper if same else None) for (label, paper), tflops in zip(told, found)]


def sizes(
    machine: "Machine", batch: int = 4, length: int = 1024
) -> list[tuple[str, str, float | None, float | None, bool]]:
    """Model, method, GB of device and of host, and whether that fits, by arithmetic; no GB where nothing was found."""
    from jaxlab.superoffload import CapacityError, ModelShape, plan_offload

    rows: list[tuple[str, str, float | None, float | None, bool]] = []
    for name, (layers, hidden) in SIZES.items():
        for method in CLAIMED:
            try:
                memory = plan_offload(ModelShape(layers, hidden, batch, length), machine, method=method).memory
                rows.append((name, method, memory.device_bytes / _GB, memory.host_bytes / _GB, True))
            except CapacityError:
                rows.append((name, method, None, None, False))
    return rows


def _way_row(way: str, run: Run, differ: int | None, parameters: int) -> tuple[Any, ...]:
    quarter = max(1, len(run.rows) // 4)
    undo = sorted(row["undo_bytes"] for row in run.rows)
    times = sorted(1e3 * timeline.step_time for timeline in run.timelines)
    return (
        way,
        differ,
        int(run.state["count"]),
        int(sum(row["rolled_back"] for row in run.rows[:quarter])),
        int(sum(row["rolled_back"] for row in run.rows[-quarter:])),
        undo[len(undo) // 2] / parameters,
        times[len(times) // 2] if times else None,
    )


def _told(steps: tuple[int, ...]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}" if steps else "no step"
