"""`jaxlab sfpo train|eval|compare`; nothing heavy is imported before they run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import print_table, usage

app = typer.Typer(rich_markup_mode="rich")

_LAPTOP = "configs/sfpo/laptop.yaml"
_Seeds = Annotated[list[int] | None, typer.Option("--seed", help="May be given again; default the config's.")]


@app.callback()
def _group() -> None: ...


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A study's config, or one with a `source`, for a pretrained model (YAML).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=value", help="Values over the YAML file's.")
    ] = None,
    method: Annotated[str, typer.Option(help="grpo, sfpo, ...; see compare.")] = "sfpo",
    seed: Annotated[int, typer.Option(help="Of the order of problems and of sampling.")] = 0,
    folder: Annotated[Path, typer.Option(help="Gets warm start, metrics, checkpoints, and the policy as model/.")] = (
        Path("out/sfpo/train")
    ),
) -> None:
    """Train a policy by one method; the same command again resumes where it was killed.

    The policy of a study starts from a small decoder made ready first, that of a config with a `source` from any model
    that jaxlab reads.
    """
    from jaxlab.sfpo import language_model
    from jaxlab.sfpo.study import Study

    if (given := _language_model(config, overrides or (), seed)) is not None:
        with usage("CONFIG"):
            trainer = language_model.trainer(given, method, folder=folder)
        trainer.train()
        typer.echo(_told(folder, method, trainer.export(folder / "model")))
        return
    settings = _load(config, overrides or (), methods=(method,), seeds=(seed,))
    study = Study(settings, folder)
    curve = study.run(method, seed)
    model = study.export(method, seed, folder / "model")
    typer.echo(
        f"warm start: {study.start.steps} steps\n"
        f"{curve.steps[-1]} steps of {method}, {curve.rollouts[-1]:.0f} completions: accuracy "
        f"{curve.sampled[0]:.3f} -> {curve.sampled[-1]:.3f}, greedy {curve.greedy[0]:.3f} -> {curve.greedy[-1]:.3f}\n"
        f"a step: {curve.rollout_seconds:.3f} s of rollouts, {curve.update_seconds:.3f} s of updates\n"
        f"metrics: {study.place(method, seed)}\npolicy: {model}"
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that train wrote, or any other model's.")],
    family: Annotated[str, typer.Option(help="Of the problems.")] = "chain_sum",
    problems: Annotated[int, typer.Option(min=1, help="How many, held out from training.")] = 512,
    show: Annotated[int, typer.Option(min=0, help="Problems to show with the likeliest answer.")] = 5,
) -> None:
    """How often a policy is right on held-out problems."""
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.sfpo import accuracy, families

    with usage("--family, --problems"):
        _, rows = families.problems(family, 1, problems)
    (network, params), tokenizer = load_pretrained(model), load_tokenizer(model)
    found = accuracy.measure(network, params, accuracy.answers(rows, tokenizer))
    typer.echo(f"{len(rows)} problems: {found.sampled:.3f} right at temperature 1, {found.greedy:.3f} greedily")
    if shown := rows[:show]:
        length = max(len(tokenizer.encode(row["answer"])) for row in shown) + 1
        sampling = SamplingParams(max_tokens=length, temperature=0.0)
        out = generate(network, params, [row["prompt"] for row in shown], sampling, tokenizer=tokenizer)
        for row, text in zip(shown, out.text or ()):
            typer.echo(f"{row['prompt']}{text}" + ("" if text == row["answer"] else f"   (right: {row['answer']})"))


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD ... a.b=value",
            help="grpo, sfpo, more_passes, larger_rate, dr_grpo, dapo, rloo, lookahead, no_correction; the others are "
            "compared with the first. Default: the config's.",
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="A study's config (YAML).")] = _LAPTOP,
    seed: _Seeds = None,
    folder: Annotated[Path, typer.Option(help="Gets every run, and the report with its pictures.")] = (
        Path("out/sfpo/compare")
    ),
) -> None:
    """Train by several methods and seeds, and tell what each needed to get as far as the first one."""
    from jaxlab.sfpo import recipe

    given = list(arguments or ())
    changes: dict[str, Any] = {"folder": str(folder)}
    if methods := tuple(each for each in given if "=" not in each):
        changes["methods"] = methods
    if seed:
        changes["seeds"] = tuple(seed)
    settings = _load(config, [each for each in given if "=" in each], **changes)
    report = recipe.run(settings)
    path = report.save(folder)
    for title, columns, rows in report.tables:
        print_table(title, columns, rows)
    typer.echo(f"report: {path}")


def _language_model(config: str, overrides: Sequence[str], seed: int) -> Any:
    """The config of a run on a pretrained model; None where the file is a study's."""
    import dataclasses

    from jaxlab import core
    from jaxlab.core.untrusted import read_yaml
    from jaxlab.sfpo.language_model import LanguageModelConfig

    with usage("CONFIG"):
        path = core.find_config(config)
        content = read_yaml(path)
        if not isinstance(content, dict) or "source" not in content:
            return None
        loaded = core.load_config(LanguageModelConfig, path, tuple(overrides))
    return dataclasses.replace(loaded, rl=dataclasses.replace(loaded.rl, seed=seed))


def _told(folder: Path, method: str, model: Path) -> str:
    from jaxlab import core
    from jaxlab.sfpo.comparison import Costs

    rows = [row for row in core.jsonl.read(folder / "metrics.jsonl") if "reward" in row]
    costs, first, last = Costs.of(rows), rows[0], rows[-1]
    return (
        f"{last['step']} steps of {method}: reward {first['reward']:.3f} -> {last['reward']:.3f}, entropy "
        f"{first['entropy']:.3f} -> {last['entropy']:.3f}; groups without a signal in the last: "
        f"{last['zero_variance_fraction']:.0%}\n"
        f"a step: {costs.sampling:.3f} s of rollouts, {costs.slow_fast or costs.plain:.3f} s of updates\n"
        f"metrics: {folder}\npolicy: {model}"
    )


def _load(config: str, overrides: Sequence[str], **changes: Any) -> Any:
    import dataclasses

    from jaxlab import recipes
    from jaxlab.sfpo import recipe

    with usage("CONFIG"):
        return dataclasses.replace(recipes.load(recipe.run, config, overrides), **changes)
