"""`jaxlab puzzlemoe compress|info|eval|chat|fits`; nothing heavy is imported before they run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import usage

app = typer.Typer(rich_markup_mode="rich")

_Folder = Annotated[Path, typer.Argument(help="A folder that `compress` wrote.")]


@app.callback()
def _group() -> None: ...


@app.command()
def compress(
    model_dir: Annotated[
        Path, typer.Argument(help="Mixtral, Qwen2/3-MoE, OLMoE or DeepSeek-MoE as Hugging Face has it.")
    ],
    out_dir: Annotated[Path, typer.Argument(help="A new folder; opens by path wherever models do.")],
    ratio: Annotated[float, typer.Option(help="Fraction of the experts that goes, at most 0.5.")] = 0.5,
    calib: Annotated[
        Path | None, typer.Option(help="Text, or .npy of int32 [B,T] tokens; without, weights decide alone.")
    ] = None,
    norm: Annotated[str, typer.Option(help="sum, tokens, calls or magnitude.")] = "sum",
    seed: Annotated[int, typer.Option(help="Of the pairs.")] = 0,
    sequences: Annotated[int, typer.Option(help="Calibration sequences taken of a text, at most.")] = 128,
    length: Annotated[int, typer.Option(help="Their length.")] = 2048,
    bits: Annotated[int, typer.Option(help="Of a position of a pair: 16 is the paper's word, 8 and 6 quantise.")] = 16,
) -> None:
    """Store every pair of experts in the space of one."""
    from jaxlab.puzzlemoe import PuzzleConfig, compress_checkpoint

    cfg = PuzzleConfig(ratio=ratio, norm=norm, seed=seed)
    tokens = None if calib is None else _tokens(calib, model_dir, sequences, length)
    typer.echo(_summary(compress_checkpoint(model_dir, out_dir, cfg, calib=tokens, bits=bits).to_dict()))


@app.command()
def info(folder: _Folder, as_json: Annotated[bool, typer.Option("--json", help="The whole report.")] = False) -> None:
    """Say what a compression did."""
    import json

    from jaxlab.puzzlemoe.storage import REPORT, replaceable

    if not folder.is_dir():
        raise FileNotFoundError(f"packed model: {folder} is no folder")
    if not (folder / "config.json").is_file() or not replaceable(folder):
        raise ValueError(f"{folder} holds no packed model")
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"{folder} was saved without a report ({REPORT})")
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    typer.echo(json.dumps(report, indent=1) if as_json else _summary(report))


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A packed folder, or any model.")],
    text: Annotated[Path, typer.Option(help="Text, or .npy of int32 [B,T] tokens.")],
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    sequences: Annotated[int, typer.Option(help="Sequences taken of a text, at most.")] = 64,
) -> None:
    """Perplexity on a text."""
    import numpy as np

    from jaxlab.models import load_pretrained
    from jaxlab.training import TokenBatch, perplexity

    ids = _tokens(text, folder, sequences, length)
    model, params = load_pretrained(folder)

    def batches():
        for row in ids:
            tokens, targets = row[None, :-1], row[None, 1:]
            positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
            ones = np.ones_like(tokens)
            yield TokenBatch(tokens, targets, positions, ones, ones.astype(np.float32))

    typer.echo(f"perplexity {perplexity(model, params, batches()):.4f} over {ids.shape[0]} x {ids.shape[1]} tokens")


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A packed folder, or any model, with its tokenizer.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end; without, ask until an empty line.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Talk to a model."""
    import jax

    from jaxlab.inference import SamplingParams, stream
    from jaxlab.models import load_pretrained, load_tokenizer

    tokenizer = load_tokenizer(folder)
    model, params = load_pretrained(folder)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    while text := prompt or typer.prompt(">", default="", show_default=False, prompt_suffix=" "):
        for piece in stream(model, params, text, sampling, rng=jax.random.key(seed), tokenizer=tokenizer):
            typer.echo(piece, nl=False)
        typer.echo()
        if prompt:
            break


@app.command()
def fits(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="mixtral-8x7b, qwen3-30b-a3b, deepseek-moe-16b, qwen1.5-moe-a2.7b (default all), or paths."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="A preset of jaxlab plan: h100 has 80 GB, a100_40 has 40.")] = "h100",
    ratio: Annotated[
        list[float] | None, typer.Option(help="Fraction of the experts that goes; may be given again. Default 0, 0.5.")
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="decode or prefill; default both.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    context: Annotated[int, typer.Option(help="Positions of a row; a prefill writes all of them.")] = 1536,
    most: Annotated[bool, typer.Option("--most", help="Also the most rows of it, and the longest of one row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compile whole models for a GPU that need not be there; say which fit one, as they are and packed."""
    import itertools
    import json

    from jaxlab.core import plan
    from jaxlab.models.decoder import DecoderConfig
    from jaxlab.puzzlemoe import serving
    from jaxlab.puzzlemoe.config import check_name, num_pairs

    names, phases = models or list(serving.MODELS), phase or list(serving.PHASES)
    ratios = [0.0, 0.5] if ratio is None else ratio
    with usage():
        check_name("gpu", gpu, tuple(plan.GPUS))
        for each in phases:
            check_name("phase", each, serving.PHASES)
        if min(batch, context) < 1:
            raise ValueError(f"batch and context must be at least 1, got {batch} and {context}")
        for name, share in itertools.product(names, ratios):
            moe = DecoderConfig.from_hf(serving.hf_config(name)).moe
            if moe is not None and share:
                num_pairs(moe.num_experts, share)
    found = []
    for name, share, each in itertools.product(names, ratios, phases):
        sizes = {"batch": batch, "context": context, "search_context": context if most else None}
        found.append(serving.fit(name, gpu, ratio=share, phase=each, **sizes))
    if as_json:
        typer.echo(json.dumps({"gpu": gpu, "fits": [each.to_dict() for each in found]}, indent=1))
    else:
        typer.echo(serving.table(found))


def _tokens(file: Path, model_dir: Path, sequences: int, length: int) -> Any:
    """Int32 `[B,T]` of a `.npy` file, or of a text in the model's tokens; a short text is one short sequence."""
    import numpy as np

    from jaxlab.core.untrusted import array_of

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if file.suffix == ".npy":
        return array_of(file.read_bytes(), str(file))
    from jaxlab.models import load_tokenizer

    ids = np.array(load_tokenizer(model_dir).encode(file.read_text(encoding="utf-8")), np.int32)
    length = min(length, ids.size)
    if length < 2:
        raise ValueError(f"{file} must hold at least 2 tokens, got {ids.size}")
    rows = min(sequences, ids.size // length)
    return ids[: rows * length].reshape(rows, length)


def _summary(report: dict[str, Any]) -> str:
    def mean(name: str) -> str:
        columns = zip(*report[name])
        return "  ".join(f"{sum(column) / len(column):9.4%}" for column in columns)

    lines = [
        f"experts {report['expert_bytes_before']:,} -> {report['expert_bytes_after']:,} bytes "
        f"({report['expert_bytes_after'] / report['expert_bytes_before']:.1%}), "
        f"all weights {report['bytes_before']:,} -> {report['bytes_after']:,}",
        f"{len(report['pairs'])} layers, {len(report['pairs'][0])} pairs each; means over layers:",
        f"{'':20}{'gate':>9}  {'up':>9}  {'down':>9}",
        *(f"{name:20}{mean(name)}" for name in ("mask_density", "sim_fraction", "rel_mse", "exponent_coverage")),
        *report["warnings"],
    ]
    return "\n".join(lines)
