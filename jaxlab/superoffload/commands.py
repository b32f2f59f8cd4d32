"""`jaxlab superoffload train|plan|simulate`; nothing heavy is imported before they run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import usage

app = typer.Typer(rich_markup_mode="rich")

_Model = Annotated[str, typer.Argument(help="1B, 3.5B, 5B, 10B, 13B, 15B, 20B, 25B or 50B; or LAYERSxHIDDEN.")]
_Machine = Annotated[str, typer.Option(help="gh200, gb200, h100_pcie, mi300a or cpu2.")]
_Batch = Annotated[int, typer.Option(help="Rows of a step, over all devices.")]
_Length = Annotated[int, typer.Option(help="Tokens of a row.")]
_Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.callback()
def _group() -> None: ...


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training config (YAML).")],
    folder: Annotated[Path, typer.Argument(help="Gets metrics.jsonl, checkpoints, and report.json.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=value", help="Over the YAML's; offload.a is the engine's.")
    ] = None,
) -> None:
    """Train a language model with Adam on the host: `jaxlab train --offload superoffload`."""
    from jaxlab import cli

    cli.train(config, folder, overrides, offload="superoffload")


@app.command()
def plan(
    model: _Model = "25B",
    machine: _Machine = "gh200",
    method: Annotated[str, typer.Option(help="superoffload, zero_offload or gpu_only.")] = "superoffload",
    undo: Annotated[str, typer.Option(help="auto, copy, residual or off.")] = "auto",
    batch: _Batch = 4,
    length: _Length = 1024,
    devices: Annotated[int, typer.Option(help="Equal machines that share the state.")] = 1,
    as_json: _Json = False,
) -> None:
    """Where weights, state, casts and undo logs of a model would go, and whether that fits (arithmetic)."""
    import dataclasses
    import json

    from jaxlab.superoffload import CapacityError, plan_offload

    where, shape = _known(machine, model, batch, length)
    with usage():
        try:
            made = plan_offload(shape, where, method=method, undo=undo, n_devices=devices)
        except CapacityError as error:
            typer.echo(str(error))
            raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(made), indent=1))
        return
    inputs = "host" if made.offload_inputs else "device"
    typer.echo(
        f"{shape.n_params / 1e9:.2f} B parameters fit on {devices} {where.name}\n"
        f"weights {made.weight_policy}, casts on the {made.cast}, undo {made.undo}, block inputs on the {inputs}\n"
        f"{made.gpu_buckets} of {made.n_buckets} buckets keep their state on the device\n{made.memory.table(where)}"
    )


@app.command()
def simulate(
    model: _Model = "5B",
    machine: _Machine = "gh200",
    method: Annotated[
        str, typer.Option(help="superoffload, zero_offload, zero_infinity, fsdp_offload or gpu_only.")
    ] = "superoffload",
    batch: _Batch = 4,
    length: _Length = 1024,
    without: Annotated[
        list[str] | None,
        typer.Option(help="fast_adam, superchip_cast, speculation or repartition; may be given again."),
    ] = None,
    width: Annotated[int, typer.Option(help="Columns of the chart.")] = 72,
    picture: Annotated[Path | None, typer.Option(help="A file to draw the chart to (.png, .svg, .pdf).")] = None,
    as_json: _Json = False,
) -> None:
    """A training step's schedule on accelerator, link and host (modelled)."""
    from jaxlab.superoffload import simulate as run
    from jaxlab.superoffload.recipe import TECHNIQUES

    where, shape = _known(machine, model, batch, length)
    known = [name for name, *_ in TECHNIQUES]
    for name in without or ():
        if name not in known:
            raise typer.BadParameter(f"--without: expected one of {', '.join(known)}, got {name!r}")
    with usage():
        off: dict[str, Any] = dict.fromkeys(without or (), False)
        schedule = run(shape, where, method=method, **off)
        chart = schedule.to_json() if as_json else schedule.to_ascii(width)
    if picture is not None:
        schedule.figure().savefig(picture, dpi=120, bbox_inches="tight")
    typer.echo(chart)


def _known(machine: str, model: str, batch: int, length: int) -> tuple[Any, Any]:
    from jaxlab.superoffload import ModelShape, get_machine
    from jaxlab.superoffload.recipe import SIZES

    layers, cross, hidden = model.partition("x")
    with usage():
        if cross and layers.isdigit() and hidden.isdigit():
            size = int(layers), int(hidden)
        elif model in SIZES:
            size = SIZES[model]
        else:
            raise ValueError(f"MODEL: expected one of {', '.join(SIZES)}, or LAYERSxHIDDEN, got {model!r}")
        return get_machine(machine), ModelShape(*size, batch, length)
