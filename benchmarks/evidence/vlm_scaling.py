"""The protocol on a small vision-language model trained here: three stages, and other seeds of the whole training."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

SYSTEM = "vlm-scaling"

CONFIG = Path("configs/vlm_scaling/small.yaml")
WORK = Path("out/evidence/vlm_scaling")
SEEDS = (0, 1, 2)
_HEADS = ("greedy", "random", "majority", "best-of", "best-of[blind+solution]", "oracle")


def items() -> Iterator[Item]:
    """Strategies, verdicts, budgets and doubts of each stage; the headline of each seed."""
    from jaxlab import core

    config = _config(0)
    settings = core.to_dict(config)
    vote = f"majority@{config.n}"
    from jaxlab.vlm_scaling.protocol import strategies

    for model in config.models:
        for strategy in strategies(config):
            yield Item(
                name=f"{model}, {strategy.name}",
                table=f"Strategies on {config.questions} questions whose images no stage was trained on: accuracy with "
                f"95 % bootstrap intervals, difference from {vote} (exact McNemar tests, Holm's correction), tokens "
                f"read and written a question; stage {model} (measured)",
                settings=settings,
                run=functools.partial(_strategy, model, strategy.name),
                seeds=(0,),
            )
    for model in config.models:
        for mode in config.modes:
            yield Item(
                name=f"{model}, {mode}",
                table=f"Verdicts of a stage on its own {config.n} samples of each question, by what it is shown; the "
                "last column selects by them (measured)",
                settings=settings,
                run=functools.partial(_verdict, model, mode),
                seeds=(0,),
            )
    for model in config.models:
        for budget in config.budgets:
            yield Item(
                name=f"{model}, {budget} tokens",
                table="The strategy chosen on half of the images for a budget of tokens a question, and what it is "
                "worth on the other half (measured)",
                settings=settings,
                run=functools.partial(_budget, model, budget),
                seeds=(0,),
            )
    for model in config.models:
        yield Item(
            name=f"{model}, doubts",
            table="Moments of doubt: samples with one, accuracy with and without (within questions: fixed effects), "
            "what became of the answer given before it, and accuracy where one was put in, minus without (measured)",
            settings=settings,
            run=functools.partial(_doubts, model),
            seeds=(0,),
        )
    for seed in SEEDS:
        for model in config.models:
            yield Item(
                name=f"seed {seed}, {model}",
                table=f"Accuracies of each stage by the seed of its training, questions and samples; n = {config.n} "
                "(measured)",
                settings=core.to_dict(_config(seed)),
                run=functools.partial(_headline, seed, model),
                seeds=(seed,),
            )


def pages() -> None:
    """Draws the pictures of the system's page; the responses they are of lie in the run's folder."""
    from jaxlab.vlm_scaling import pictures

    kept = json.loads((FOLDER / "vlm_scaling.json").read_text())["items"]
    config = _config(0)
    if not all(f"{model}, doubts" in kept for model in config.models) or not (WORK / "0").exists():
        return
    reports = {model: _found(0, model).report for model in config.models}
    for model, report in reports.items():
        drawn = pictures.accuracy_by_tokens(report)
        drawn.savefig(FOLDER / f"vlm_scaling_{model}.png", dpi=110, bbox_inches="tight")
    drawn = pictures.verdicts(reports, config.modes)
    drawn.savefig(FOLDER / "vlm_scaling_verdicts.png", dpi=110, bbox_inches="tight")


def _config(seed: int) -> Any:
    from jaxlab import core
    from jaxlab.vlm_scaling.protocol import ProtocolConfig

    return core.load_config(ProtocolConfig, core.find_config(str(CONFIG)), (f"seed={seed}", f"small.seed={seed}"))


@functools.cache
def _found(seed: int, model: str) -> Any:
    from jaxlab.vlm_scaling.protocol import investigate, subject

    config, folder = _config(seed), WORK / str(seed)
    return investigate(config, model, subject(config, model, folder), folder)


def _strategy(model: str, strategy: str) -> dict[str, Any]:
    from jaxlab.vlm_scaling import recipe

    rows = {row[0]: row for row in recipe.strategies(_found(0, model))}
    return dict(zip(recipe.STRATEGIES, rows[strategy]))


def _verdict(model: str, mode: str) -> dict[str, Any]:
    from jaxlab.vlm_scaling import recipe

    rows = recipe.verdicts(_config(0), {model: _found(0, model)})
    return dict(zip(recipe.VERDICTS, next(row for row in rows if row[1] == mode)))


def _budget(model: str, budget: float) -> dict[str, Any]:
    from jaxlab.vlm_scaling import recipe

    return dict(zip(recipe.BUDGETS, (model, *recipe.budget(_config(0), _found(0, model), budget))))


def _doubts(model: str) -> dict[str, Any]:
    from jaxlab.vlm_scaling import recipe

    return dict(zip(recipe.DOUBTS, (model, *recipe.doubts(_found(0, model)))))


def _headline(seed: int, model: str) -> dict[str, Any]:
    found, n = _found(seed, model).report, _config(seed).n
    told = {name if name == "greedy" else f"{name}@{n}": 0.0 for name in _HEADS}
    return {"seed": seed, "stage": model, **{name: found.accuracy[name] for name in told}}
