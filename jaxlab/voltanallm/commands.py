"""`jaxlab voltanallm serve|profile|simulate|bench|report`; nothing heavy is imported before they run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import check_choice, print_table, usage

app = typer.Typer(rich_markup_mode="rich")

_BACKENDS = ("none", "simulated", "nvml", "zeus")

_Source = Annotated[
    str, typer.Argument(help="A model: a folder, a file, or package:NAME; a packed PuzzleMoE folder, too.")
]
_Pages = Annotated[int, typer.Option(help="Pages of keys and values of each worker.")]
_PageSize = Annotated[int, typer.Option(help="Tokens in a page.")]
_Running = Annotated[int, typer.Option(help="Requests decoded together, at most.")]
_Chunk = Annotated[int, typer.Option(help="Prompt tokens read in one step, at most.")]
_Dtype = Annotated[str, typer.Option(help="Of weights, keys and values: float32 or bfloat16.")]
_Freqs = Annotated[str, typer.Option(help="Clocks in MHz, such as 1005,1410; default those the GPU supports.")]
_Gpu = Annotated[str, typer.Option(help="none, simulated, nvml or zeus.")]


@app.callback()
def _group() -> None: ...


@app.command()
def serve(
    source: _Source,
    host: Annotated[str, typer.Option(help="Only this machine can reach the default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the server.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="JAXLAB_API_KEY", help="What clients must send.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; default its folder's name.")] = None,
    prefill: Annotated[int, typer.Option(help="Prefill workers; 0: one engine does both.")] = 0,
    decode: Annotated[int, typer.Option(help="Decode workers.")] = 1,
    policy: Annotated[str, typer.Option(help="Of the router, for decode workers.")] = "ln",
    num_pages: _Pages = 1025,
    page_size: _PageSize = 16,
    max_running: _Running = 64,
    prefill_chunk: _Chunk = 512,
    dtype: _Dtype = "float32",
    gpu: _Gpu = "none",
    freqs: _Freqs = "",
    controller: Annotated[
        str, typer.Option(help="ecofreq, least_energy, aimd, ...; none: operators set the clocks.")
    ] = "none",
    tables: Annotated[Path | None, typer.Option(help="Folder with decode.csv and prefill.csv, of `profile`.")] = None,
    prefill_slo_ms: Annotated[float, typer.Option(help="Objective of the time to first token.")] = 800.0,
    decode_slo_ms: Annotated[float, typer.Option(help="Objective of the time between tokens.")] = 50.0,
    margin: Annotated[float, typer.Option(help="By which objectives are stretched.")] = 0.35,
    warm: Annotated[bool, typer.Option(help="Compile everything before the port opens.")] = True,
) -> None:
    """Serve a model by OpenAI's API, with a dashboard at /; Ctrl-C lets answers finish.

    With prefill workers each worker is a process of its own.
    """
    from jaxlab.voltanallm import Clocks, ServeConfig, launch
    from jaxlab.voltanallm import serve as run

    check_choice("--gpu", gpu, _BACKENDS)
    with usage():
        settings = ServeConfig(
            source,
            engine=_engine_config(num_pages, page_size, max_running, prefill_chunk, dtype),
            dtype=dtype,
            num_prefill=prefill,
            num_decode=decode,
            policy=policy,
            warm=warm,
            clocks=Clocks(gpu, _clocks(freqs), controller, tables, prefill_slo_ms, decode_slo_ms, margin),
        )
    with launch(settings) as launched:
        run(launched.app(name or Path(source).name, api_key=api_key, warm=warm and prefill == 0), host, port)


@app.command()
def profile(
    source: _Source,
    folder: Annotated[Path, typer.Argument(help="Gets samples, decode.csv, prefill.csv and a picture.")],
    num_pages: _Pages = 1025,
    page_size: _PageSize = 16,
    max_running: _Running = 64,
    prefill_chunk: _Chunk = 512,
    dtype: _Dtype = "float32",
    gpu: _Gpu = "none",
    freqs: _Freqs = "",
    steps: Annotated[int, typer.Option(help="Decode iterations at each point.")] = 16,
) -> None:
    """Measure an engine's iterations by clock, batch and tokens, and fit the tables that controllers predict by."""
    from jaxlab.inference import Engine
    from jaxlab.voltanallm import pictures, profiling
    from jaxlab.voltanallm.launching import open_gpu

    check_choice("--gpu", gpu, _BACKENDS)
    with usage():
        settings = _engine_config(num_pages, page_size, max_running, prefill_chunk, dtype)
        clocks = _clocks(freqs)
        backend = open_gpu(gpu, clocks)
    engine = Engine.from_pretrained(source, settings, dtype=dtype)
    engine.warmup()
    measured = profiling.profile(engine, folder, backend, freqs=clocks, steps=steps)
    rows = [(phase, len(each.samples), len(each.table.planes), each.error) for phase, each in measured.items()]
    decode = measured["decode"]
    pictures.staircase(decode.samples, decode.table).savefig(folder / "decode.png", dpi=120, bbox_inches="tight")
    print_table("Tables", ("phase", "iterations", "planes", "error on iterations held out"), rows)
    if backend is not None and hasattr(backend, "set_load"):
        typer.echo("Clocks are simulated: the highest was measured, the others follow from a model.")


@app.command()
def simulate(
    config: Annotated[
        str | None, typer.Argument(help="A config (YAML) of a simulation; default: the paper's cluster and demo.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=value", help="Over the YAML's.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A file to draw savings to (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What ways of choosing clocks and workers cost on a cluster of A100s (simulated)."""
    from jaxlab.core import find_config, load_config
    from jaxlab.voltanallm import pictures, study

    given = [config, *(overrides or ())] if config is not None else []
    path = given.pop(0) if given and "=" not in given[0] else None
    with usage("CONFIG"):
        settings = load_config(study.SimulationConfig, None if path is None else find_config(path), tuple(given))
    outcomes, made_up = study.study(settings)
    rows = list(study.rows(outcomes))
    if as_json:
        typer.echo(json.dumps([dict(zip(study.COLUMNS, row)) for row in rows], indent=1))
    else:
        print_table("Simulated, nothing measured" + (", synthetic input" if made_up else ""), study.COLUMNS, rows)
    if picture is not None:
        pictures.savings(outcomes).savefig(picture, dpi=120, bbox_inches="tight")


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="An endpoint, up to and with the version: http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name to ask for.")],
    folder: Annotated[Path, typer.Option(help="Gets answers.jsonl, for `report`.")],
    vocab_size: Annotated[int, typer.Option(help="Of the model: prompts are ids below it.")] = 256,
    trace: Annotated[str, typer.Option(help="sharegpt, azure-conversation, azure-code, or a CSV.")] = "sharegpt",
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 2.0,
    seconds: Annotated[float, typer.Option(help="Of arrivals.")] = 30.0,
    max_tokens: Annotated[int, typer.Option(help="Of a prompt, and of an answer: longer ones are cut.")] = 256,
    api_key: Annotated[str | None, typer.Option(envvar="JAXLAB_API_KEY", help="Sent as a bearer token.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and ids.")] = 0,
    prefill_slo_ms: Annotated[float, typer.Option(help="Objective of the time to first token.")] = 800.0,
    decode_slo_ms: Annotated[float, typer.Option(help="Objective of the time between tokens.")] = 50.0,
) -> None:
    """Replay a trace against an endpoint and hold its answers to the objectives."""
    import numpy as np

    from jaxlab.voltanallm import study
    from jaxlab.voltanallm.load import replay
    from jaxlab.voltanallm.sim import Trace

    with usage():
        settings = study.SimulationConfig(trace=trace, seconds=seconds)
        whole, made_up = study.arrivals(settings, rate, seed)
        shorter = Trace(
            whole.arrival_s, np.minimum(whole.prompt_tokens, max_tokens), np.minimum(whole.output_tokens, max_tokens)
        )
        folder.mkdir(parents=True, exist_ok=True)
        result = replay(url, shorter, model=model, vocab_size=vocab_size, api_key=api_key, seed=seed)
    result.save(folder / "answers.jsonl")
    if made_up:
        typer.echo("synthetic input")
    _print_load(result, prefill_slo_ms, decode_slo_ms)
    if result.failed == len(result.answers):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of `bench`.")],
    prefill_slo_ms: Annotated[float, typer.Option(help="Objective of the time to first token.")] = 800.0,
    decode_slo_ms: Annotated[float, typer.Option(help="Objective of the time between tokens.")] = 50.0,
    picture: Annotated[Path | None, typer.Option(help="A file to draw latencies to (.png, .svg, .pdf).")] = None,
) -> None:
    """Tell a load test's latencies again, against other objectives if need be."""
    from jaxlab.voltanallm import pictures
    from jaxlab.voltanallm.load import LoadResult

    with usage("FOLDER"):
        result = LoadResult.load(folder / "answers.jsonl")
    _print_load(result, prefill_slo_ms, decode_slo_ms)
    if picture is not None:
        drawn = pictures.latencies(result, prefill_slo_ms, decode_slo_ms)
        drawn.savefig(picture, dpi=120, bbox_inches="tight")


def _print_load(result: Any, prefill_slo_ms: float, decode_slo_ms: float) -> None:
    import numpy as np

    ttft, itl = result.attainment(prefill_slo_ms, decode_slo_ms)
    rows = [
        ("requests", len(result.answers)),
        ("failed", result.failed),
        ("pieces a second", result.tokens_per_s),
        (f"first pieces within {prefill_slo_ms:g} ms", ttft),
        (f"answers whose pieces come within {decode_slo_ms:g} ms on average", itl),
    ]
    whole = result.ttft_ms()
    for name, values in (("time to first piece", whole[np.isfinite(whole)]), ("time between pieces", result.gaps_ms())):
        for share in (50, 95, 99):
            rows.append((f"{name}, p{share}, ms", float(np.percentile(values, share)) if values.size else None))
    print_table("Load test (measured)", (), rows)
    for answer in [each for each in result.answers if each.error][:3]:
        typer.echo(f"request {answer.index}: {answer.error}")


def _engine_config(num_pages: int, page_size: int, max_running: int, prefill_chunk: int, dtype: str) -> Any:
    from jaxlab.inference import EngineConfig

    return EngineConfig(
        num_pages, page_size=page_size, max_running=max_running, prefill_chunk=prefill_chunk, kv_dtype=dtype
    )


def _clocks(text: str) -> tuple[int, ...]:
    """Clocks of a list with commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--freqs: expected whole numbers of MHz with commas between them, got {text!r}") from None
