"""Mixtures of experts really trained: losses beside a dense twin, loads of experts, dispatches that change nothing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

SYSTEM = "xmoe"
ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "xmoe_training"
"""Metrics, checkpoints and models of the runs; a killed one goes on from here."""

RUNS = {
    "fine_grained": "64 experts, 6 a token, 2 shared",
    "top2": "8 experts, 2 a token",
    "dense_twin": "dense, equal active parameters",
}
"""Config -> what it is."""

MODES = ("local", "pft", "rbd", "padded")
CHANGES = ("steps=100", "eval_batches=8", "mesh={node: 2, expert: 4}")
FIRST = 20
"""Steps over which training has not yet amplified what rounding differs by."""


def items() -> Iterator[Item]:
    """Three training runs, then one training under four ways of dispatching."""
    from jaxlab import core

    for name, what in RUNS.items():
        config = _config(name, ("rows=64",))
        yield Item(
            name=name,
            table="Trained on the Python standard library's source as bytes, one CPU device",
            settings=core.to_dict(config),
            run=lambda name=name, what=what, config=config: _trained(name, what, config),
            seeds=(config.seed,),
        )
    for mode in MODES:
        config = _config("laptop", (*CHANGES, f"moe.dispatch={mode}"))
        yield Item(
            name=f"dispatch {mode}",
            table="The laptop's model on 2 x 4 forced CPU devices, by dispatch, nothing dropped",
            settings=core.to_dict(config),
            run=lambda mode=mode: _dispatched(mode),
            seeds=(config.seed,),
        )


def pages() -> None:
    """Draws the pictures of the system's page, from runs made on this machine."""
    runs = {name: _rows(_folder(_config(name, ("rows=64",)))) for name in RUNS}
    if all(runs.values()):
        _curves(runs).savefig(FOLDER / "xmoe_training_loss.png", dpi=100, bbox_inches="tight")
        for name in ("fine_grained", "top2"):
            report = _folder(_config(name, ("rows=64",))) / "report"
            shutil.copyfile(report / "plot_01.png", FOLDER / f"xmoe_training_load_{name}.png")
    losses = {mode: _losses(mode) for mode in MODES}
    if all(losses.values()):
        _differences(losses).savefig(FOLDER / "xmoe_training_dispatch.png", dpi=100, bbox_inches="tight")


def _config(name: str, changes: Sequence[str]) -> Any:
    from jaxlab import core
    from jaxlab.xmoe.recipe import XMoEConfig

    return core.load_config(XMoEConfig, core.find_config(f"configs/xmoe/{name}.yaml"), changes)


def _folder(config: Any) -> Path:
    from jaxlab import core

    told = json.dumps(core.to_dict(config), sort_keys=True)
    return WORK / hashlib.sha256(told.encode()).hexdigest()[:12]


def _rows(folder: Path) -> list[dict[str, float]]:
    from jaxlab import core

    path = folder / "metrics.jsonl"
    return [row for row in core.jsonl.read(path) if "loss" in row] if path.exists() else []


def _cross_entropy(rows: list[dict[str, float]], config: Any) -> list[float]:
    """The loss of each step without the balance losses of the sparse layers."""
    sparse = sum(run.stop - run.start for run in config.model.layer_runs() if run.sparse)
    return [row["loss"] - config.aux_loss_coef * sparse * row.get("aux_loss", 0.0) for row in rows]


def _losses(mode: str) -> list[float]:
    return [row["loss"] for row in _rows(_folder(_config("laptop", (*CHANGES, f"moe.dispatch={mode}"))))]


def _trained(name: str, what: str, config: Any) -> dict[str, Any]:
    """Trains, counts what the router does, and keeps the recipe's report beside the run."""
    import dataclasses
    import math

    from jaxlab.models import cost
    from jaxlab.xmoe import recipe

    folder = _folder(config)
    report = recipe.run(dataclasses.replace(config, folder=str(folder)))
    report.save(folder / "report")
    told, count = report.metrics, cost.parameter_count(config.model)
    tail = _cross_entropy(_rows(folder)[-50:], config)
    row = {
        "config": name,
        "what": what,
        "parameters": count.total,
        "active": count.active,
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.length,
        "cross-entropy, last 50 steps": sum(tail) / len(tail),
        "validation": math.log(told["validation_perplexity"]),
    }
    if config.model.moe is not None:
        redundancy = {nodes: (measured, uniform) for nodes, measured, uniform in _table(report, "Redundancy")}
        row |= {
            "idle experts": told["idle_experts"],
            "busiest / mean": told["busiest_over_mean"],
            "redundancy, 4 nodes": redundancy[4][0],
            "uniform": redundancy[4][1],
        }
    return row


def _table(report: Any, title: str) -> Any:
    return next(rows for name, _, rows in report.tables if name.startswith(title))


def _dispatched(mode: str) -> dict[str, Any]:
    """Trains in a process of its own, which has eight devices."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-m", __name__, mode], cwd=ROOT, env=environment, check=True)
    rows = _rows(_folder(_config("laptop", (*CHANGES, f"moe.dispatch={mode}"))))
    losses, reference = [row["loss"] for row in rows], _losses(MODES[0])
    apart = [abs(a - b) / b for a, b in zip(losses, reference)]
    other = mode != MODES[0]
    return {
        "dispatch": mode,
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
        f"largest relative difference from {MODES[0]}, first {FIRST} steps": max(apart[:FIRST]) if other else None,
        "all steps": max(apart) if other else None,
        "rows without room": int(sum(row["dropped_recv"] for row in rows)),
    }


def _train(mode: str) -> None:
    from jaxlab.training import train

    config = _config("laptop", (*CHANGES, f"moe.dispatch={mode}"))
    train(config, _folder(config))


def _smooth(values: Sequence[float], width: int = 20) -> list[float]:
    """The mean of the last `width` values, of fewer at the start."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _curves(runs: dict[str, list[dict[str, float]]]) -> Any:
    from jaxlab.core.figures import COLOURS, figure

    drawn, axes = figure(7.0, 3.8)
    for (name, rows), colour in zip(runs.items(), COLOURS):
        steps, losses = [row["step"] for row in rows], _cross_entropy(rows, _config(name, ("rows=64",)))
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.4, label=RUNS[name])
    axes.set_ylim(top=4.0)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats a byte (mean of 20 steps)")
    axes.legend(frameon=False)
    return drawn


def _differences(losses: dict[str, list[float]]) -> Any:
    from jaxlab.core.figures import COLOURS, figure

    drawn, axes = figure(7.0, 3.2)
    reference = losses[MODES[0]]
    for mode, colour in zip(MODES[1:], COLOURS):
        apart = [max(abs(a - b) / b, 1e-9) for a, b in zip(losses[mode], reference)]
        axes.semilogy(range(1, len(apart) + 1), apart, color=colour, linewidth=1.2, label=mode)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss: relative difference from {MODES[0]}")
    axes.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    _train(sys.argv[1])
