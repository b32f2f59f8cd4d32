"""`jaxlab vlm-scaling run|report`: the study, and its tables again from what it kept.

`run` is that of every system. Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import print_table, usage

app = typer.Typer(rich_markup_mode="rich")


@app.callback()
def _group() -> None: ...


@app.command()
def report(
    config: Annotated[str, typer.Argument(help="The config (YAML) of a run that had a `folder`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=value", help="Values over the YAML file's; `folder=...` first.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Tokens a question: also tell what they are best spent on.")
    ] = None,
) -> None:
    """Print a run's tables from the samples and verdicts it kept; nothing is drawn."""
    from jaxlab import recipes
    from jaxlab.vlm_scaling import choose, recipe
    from jaxlab.vlm_scaling.protocol import kept

    with usage("CONFIG"):
        settings: Any = recipes.load(recipe.run, config, overrides or ())
        if settings.folder is None:
            raise ValueError("folder: expected that of a run, got none")
    found = {name: kept(settings, name, Path(settings.folder)) for name in settings.models}
    for title, columns, rows in recipe.tables(settings, found):
        print_table(title, columns, rows)
    if budget is not None:
        with usage("--budget"):
            for name, each in found.items():
                told = choose(each.report, budget, share=settings.dev, seed=settings.seed)
                typer.echo(f"{name}: {told}")
