"""`jaxlab eaglet synth|filter|sft|rl|eval|play`: the stages of a study, each kept in its folder.

Nothing heavy is imported before they run.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import check_choice, print_table, usage

app = typer.Typer(rich_markup_mode="rich")

_Config = Annotated[str, typer.Argument(help="A study's config (YAML).")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=value", help="Values over the YAML file's.")]
_Folder = Annotated[Path, typer.Option(help="Keeps every stage; a later one makes the earlier ones it needs.")]
_METHOD = (
    "none, gold, other_type, packaged, untrained, sft_all, sft, grpo, grpo_expert, grpo_novice, grpo_success, dpo or "
    "best_of."
)
_OUT = Path("out/eaglet")


@app.callback()
def _group() -> None: ...


@app.command()
def synth(
    config: _Config,
    overrides: _Overrides = None,
    folder: _Folder = _OUT,
    base_url: Annotated[
        str | None, typer.Option(help="Endpoint of a strong model; default: plans of gold paths.")
    ] = None,
    model: Annotated[str, typer.Option(help="Its name there.")] = "",
    show: Annotated[int, typer.Option(min=0, help="Plans to show.")] = 3,
) -> None:
    """Write a plan for each training task, without its solution showing through or from gold paths."""
    from jaxlab.eaglet.synth import OpenAIPlanSource, PlanSourceError

    study = _study(config, overrides, folder)
    source = None
    if base_url is not None:
        source = OpenAIPlanSource(base_url, model, gold=study.env.gold_actions, path=folder / "answers.jsonl")
    try:
        pairs = study.plans(source)
    except PlanSourceError as error:
        raise typer.BadParameter(f"{error}; {len(error.finished)} plans are kept", param_hint="--base-url") from None
    for task, plan in pairs[:show]:
        typer.echo(f"{task.instruction}\n  {plan.plan or f'({plan.reason})'}")
    typer.echo(f"{len(pairs)} plans, {sum(plan.ok for _, plan in pairs)} of the right format: {folder / 'plans.jsonl'}")


@app.command("filter")
def filter_(config: _Config, overrides: _Overrides = None, folder: _Folder = _OUT) -> None:
    """Keep the plans that harm neither the expert nor the novice."""
    from jaxlab.eaglet import recipe

    study = _study(config, overrides, folder)
    report = study.filtered()
    told = recipe.precision_recall(report, recipe.faults(study))
    typer.echo(
        f"{len(report.kept)} of {len(report.table)} plans kept: {folder / 'kept.jsonl'}\n"
        f"if they are of gold paths: {told['filter_precision']:.0%} of those dropped have a fault, and "
        f"{told['filter_recall']:.0%} of those with a fault are dropped"
    )


@app.command()
def sft(
    config: _Config,
    overrides: _Overrides = None,
    folder: _Folder = _OUT,
    unfiltered: Annotated[bool, typer.Option("--unfiltered", help="Learn from all plans.")] = False,
) -> None:
    """Train a planner on plans: the cold start."""
    study = _study(config, overrides, folder)
    method = "sft_all" if unfiltered else "sft"
    planner = study.planner(method)
    task = study.held_out["seen"][0]
    typer.echo(f"{task.instruction}\n  {planner(task).plan}\nplanner: {folder / method}")


@app.command()
def rl(
    config: _Config,
    overrides: _Overrides = None,
    folder: _Folder = _OUT,
    reward: Annotated[str, typer.Option(help="gain, expert, novice or success.")] = "gain",
    export: Annotated[Path | None, typer.Option(help="Writes the planner there, too, in 16 bits.")] = None,
) -> None:
    """Train the planner on what executors gain from its plans; the same command again resumes where it was killed."""
    from jaxlab import core

    methods = {"gain": "grpo", **{name: f"grpo_{name}" for name in ("expert", "novice", "success")}}
    check_choice("--reward", reward, tuple(methods))
    study, method = _study(config, overrides, folder), methods[reward]
    planner = study.planner(method)
    if export is not None:
        planner.save(export, dtype="float16")
    rows = core.jsonl.read(folder / "runs" / method / "metrics.jsonl")
    typer.echo(
        f"{len(rows)} updates: reward {rows[0]['reward']:.3f} -> {rows[-1]['reward']:.3f}, environment steps "
        f"{sum(row['env_steps'] for row in rows):.0f}\nmetrics: {folder / 'runs' / method}\n"
        f"planner: {export or folder / method}"
    )


@app.command("eval")
def evaluate(
    config: _Config,
    overrides: _Overrides = None,
    folder: _Folder = _OUT,
    method: Annotated[str, typer.Option(help=_METHOD)] = "grpo",
    split: Annotated[str, typer.Option(help="seen or unseen.")] = "seen",
) -> None:
    """Success, reward and steps of three executors on held-out tasks, with plans and without."""
    from jaxlab.eaglet.evaluation import MEASURES, compare

    study = _study(config, overrides, folder)
    check_choice("--split", split, ("seen", "unseen"))
    _method(study, method)
    without, reports = study.evaluate("none", split), study.evaluate(method, split)
    rows = []
    for name, report in reports.items():
        gained = compare(report, without[name])
        for measure in MEASURES:
            before, after, gain = (getattr(each, measure) for each in (without[name], report, gained))
            rows.append((name, measure, before.mean, after.mean, gain.mean, f"{gain.low:+.2f} to {gain.high:+.2f}"))
    columns = ("executor", "", "without a plan", method, "gain", "95 %")
    print_table(f"{len(study.held_out[split])} tasks, {split}", columns, rows)


@app.command()
def play(
    config: _Config = "configs/eaglet/laptop.yaml",
    overrides: _Overrides = None,
    folder: _Folder = _OUT,
    method: Annotated[str, typer.Option(help=_METHOD)] = "packaged",
    executor: Annotated[str, typer.Option(help="expert, novice or other.")] = "novice",
    split: Annotated[str, typer.Option(help="seen or unseen.")] = "seen",
    number: Annotated[int, typer.Option(min=0, help="Which task of the split.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the episode.")] = 0,
) -> None:
    """Show one episode without a plan and with one, by default of the planner that comes along, side by side."""
    from jaxlab.eaglet.plans import plan_steps
    from jaxlab.eaglet.rollouts import rollout

    study = _study(config, overrides, folder)
    check_choice("--split", split, ("seen", "unseen"))
    check_choice("--executor", executor, tuple(study.executors))
    _method(study, method)
    tasks = study.held_out[split]
    if number >= len(tasks):
        raise typer.BadParameter(f"expected a number below {len(tasks)}, got {number}", param_hint="--number")
    task, source = tasks[number], study.source(method, split)
    plan = source(task).plan if source is not None else ""
    runs = [rollout(study.env, study.executors[executor], task, plan=each, seed=seed) for each in ("", plan)]
    typer.echo(f"Task: {task.instruction}\nPlan: {'; '.join(plan_steps(plan)) or '(none)'}\n")
    print_table(
        f"{executor}, seed {seed}",
        ("", "without a plan", "with it"),
        [
            (step + 1, *(run.actions[step] if step < run.steps else "" for run in runs))
            for step in range(max(run.steps for run in runs))
        ]
        + [("reward", *(run.reward for run in runs)), ("steps", *(run.steps for run in runs))],
    )


def _study(config: str, overrides: list[str] | None, folder: Path) -> Any:
    from jaxlab import recipes
    from jaxlab.eaglet import recipe
    from jaxlab.eaglet.study import Study

    with usage("CONFIG"):
        return Study(recipes.load(recipe.run, config, overrides or ()), folder)


def _method(study: Any, name: str) -> None:
    from jaxlab.eaglet.study import check_method

    with usage():
        check_method("--method", name, study.config.world)
