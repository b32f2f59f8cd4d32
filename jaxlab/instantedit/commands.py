"""`jaxlab instantedit edit|invert|train|bench|eval`; nothing heavy is imported before they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import check_choice, print_table, usage

app = typer.Typer(rich_markup_mode="rich")

SMALL = "small"
EMOJI = "emoji"

_Model = Annotated[
    str, typer.Option(help="A diffusers folder, or small: the editor of 32 x 32 pictures that comes along.")
]
_ControlNet = Annotated[Path | None, typer.Option(help="Folder of the ControlNet, if it is elsewhere.")]
_Dtype = Annotated[str, typer.Option(help="Of weights and computation: float32, bfloat16 or float16.")]
_Size = Annotated[int | None, typer.Option(help="Side to resize to; default 32 for small, and else as it is.")]
_Steps = Annotated[int | None, typer.Option(help="N; default 4, or that of the inversion.")]
_Scale = Annotated[float, typer.Option(help="Of the ControlNet's residuals.")]
_Seed = Annotated[int | None, typer.Option(help="Of a draw from the autoencoder; default its mode.")]
_Folder = Annotated[Path, typer.Option(help="Gets what is made; the same command again goes on there.")]


@app.callback()
def _group() -> None: ...


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="A picture, or an inversion (.npz) of invert.")],
    source_prompt: Annotated[str, typer.Argument(help="What it shows.")],
    target_prompts: Annotated[list[str], typer.Argument(metavar="TARGET_PROMPT...", help="What it shall show.")],
    out: Annotated[Path, typer.Option(help="The edited picture; of several numbered.")] = Path("edited.png"),
    model: _Model = SMALL,
    blend_word: Annotated[
        list[str] | None, typer.Option(help="Word of the target that the edit is about; once for each target.")
    ] = None,
    steps: _Steps = None,
    cfg: Annotated[float, typer.Option(help="Weight of ordinary guidance.")] = 1.1,
    dpg: Annotated[float, typer.Option(help="Weight of disentangled guidance.")] = 3.0,
    mask_threshold: Annotated[float, typer.Option(help="Attention above this part of its maximum is edited.")] = 0.4,
    control_scale: _Scale = 0.4,
    seed: _Seed = None,
    compat: Annotated[str, typer.Option(help="clean, or official: as the paper's code.")] = "clean",
    size: _Size = None,
    controlnet: _ControlNet = None,
    dtype: _Dtype = "float32",
) -> None:
    """Edit a picture from what it shows to what it shall show, towards one prompt or several."""
    from jaxlab.instantedit import Inversion
    from jaxlab.instantedit.image_io import write_image

    with usage():
        if image.suffix == ".npz":
            given: Any = Inversion.load(image)
        else:
            given = _pixels(image, model, size)
        results = _pipeline(model, controlnet, dtype).edit_many(
            given,
            source_prompt,
            target_prompts,
            blend_words=blend_word or None,
            num_steps=steps,
            cfg=cfg,
            dpg=dpg,
            mask_threshold=mask_threshold,
            control_scale=control_scale,
            seed=seed,
            compat=compat,
        )
        for number, result in enumerate(results, 1):
            path = out if len(results) == 1 else out.with_stem(f"{out.stem}-{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, result.image)
            typer.echo(f"{path}: {target_prompts[number - 1]}")
    _print_timings("Seconds, with compilation (measured)", [("", results[0].timings)])


@app.command()
def invert(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    out: Annotated[Path, typer.Argument(help="The inversion, an .npz file for edit.")],
    model: _Model = SMALL,
    steps: Annotated[int, typer.Option(help="N.")] = 4,
    control_scale: _Scale = 0.4,
    mode: Annotated[str, typer.Option(help="exact, or official: as the paper's code.")] = "exact",
    seed: _Seed = None,
    size: _Size = None,
    controlnet: _ControlNet = None,
    dtype: _Dtype = "float32",
) -> None:
    """Carry a picture to noise once, for any number of edits."""
    if out.suffix != ".npz":
        raise typer.BadParameter(f"expected a path that ends in .npz, got {out}", param_hint="OUT")
    with usage():
        pixels = _pixels(image, model, size)
        inversion = _pipeline(model, controlnet, dtype).invert(
            pixels, num_steps=steps, control_scale=control_scale, mode=mode, seed=seed
        )
    inversion.save(out)
    typer.echo(f"{out}: {inversion.num_steps} steps, {inversion.edges.mean():.1%} of the pixels are edges")


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=value", help="Values over those of SmallEditorConfig.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file of SmallEditorConfig.")] = None,
    folder: _Folder = Path("out/instantedit/train"),
    font: Annotated[Path | None, typer.Option(help="NotoColorEmoji.ttf; default where it is installed.")] = None,
) -> None:
    """Train the small editor on emoji: teacher, distillation, ControlNet; the result is FOLDER/editor."""
    from jaxlab import core
    from jaxlab.instantedit.small_editor import STAGES, SmallEditor, SmallEditorConfig

    with usage():
        path = None if config is None else core.find_config(config)
        editor = SmallEditor(core.load_config(SmallEditorConfig, path, tuple(overrides or ())), folder, font=font)
        for name in STAGES:
            editor.stage(name)
            steps = editor.history(name)
            typer.echo(f"{name}: {len(steps)} steps, loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")
        editor.save(folder / "editor")
    typer.echo(f"editor: {folder / 'editor'}")


@app.command()
def bench(
    model: _Model = SMALL,
    size: _Size = None,
    steps: Annotated[int, typer.Option(min=1, help="N.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="After one that compiles.")] = 5,
    controlnet: _ControlNet = None,
    dtype: _Dtype = "float32",
) -> None:
    """Time an edit of noise on this machine: the first of a picture, and further ones of its inversion."""
    import statistics

    import numpy as np

    with usage():
        pipeline = _pipeline(model, controlnet, dtype)
        side = size or (32 if pipeline.network.vae is None else 512)
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        runs = []
        for _ in range(1 + repeats):
            first = pipeline.edit(pixels, "a cat", "a dog", num_steps=steps).timings
            inversion = pipeline.invert(pixels, num_steps=steps)
            pipeline.edit(inversion, "a cat", "a dog")
            runs.append((first, pipeline.edit(inversion, "a cat", "a dog").timings))
    rows = []
    for name, timings in zip(("first", "further"), zip(*runs[1:])):
        rows.append((name, {stage: statistics.median(each[stage] for each in timings) for stage in timings[0]}))
    _print_timings(f"Seconds of an edit of {side} x {side} (measured, median of {repeats})", rows)


@app.command("eval")
def evaluate(
    data: Annotated[str, typer.Argument(help="A folder of PIE-Bench, or emoji: held-out pairs with true outcomes.")],
    model: _Model = SMALL,
    cases: Annotated[int, typer.Option(min=1, help="How many at most.")] = 240,
    baselines: Annotated[bool, typer.Option(help="With emoji: every baseline and ablation, too.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Of methods that draw noise.")] = 1,
    compat: Annotated[str, typer.Option(help="Of edits on PIE-Bench: clean or official.")] = "clean",
    lpips: Annotated[str, typer.Option(help="Backbone: alex, vgg or squeeze.")] = "alex",
    dino: Annotated[Path | None, typer.Option(help="Folder of DINO ViT-B/8, for the structure distance.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of CLIP ViT-L/14, for the CLIP score.")] = None,
    folder: _Folder = Path("out/instantedit/eval"),
    controlnet: _ControlNet = None,
    dtype: _Dtype = "float32",
) -> None:
    """Measure edits of a benchmark, with intervals."""
    from jaxlab.instantedit.evaluation import evaluate as run
    from jaxlab.instantedit.metrics import MetricSet

    check_choice("--lpips", lpips, ("alex", "vgg", "squeeze"))
    check_choice("--compat", compat, ("clean", "official"))
    with usage():
        pipeline = _pipeline(model, controlnet, dtype)
        if data == EMOJI:
            chosen, editors = _emoji(pipeline, cases, baselines)
        else:
            chosen, editors = _pie_bench(pipeline, Path(data), cases, compat)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(
            chosen,
            editors,
            metrics=MetricSet(lpips=lpips, dino=dino, clip=clip),  # pyrefly: ignore[bad-argument-type]
            seeds=tuple(range(seeds)),
            results=folder / "edits.jsonl",
            pictures=folder / "pictures",
        )
    typer.echo(found.markdown())


def _emoji(pipeline: Any, count: int, baselines: bool) -> tuple[list[Any], dict[str, Any]]:
    from jaxlab.instantedit import emoji, study

    cases = study.emoji_cases(emoji.load(), count)
    chosen = None if baselines else {"InstantEdit": study.instant_edit(study.BASE)}
    return cases, study.editors(pipeline.network, pipeline.tokenizer, cases, chosen=chosen)


def _pie_bench(
    pipeline: Any, folder: Path, count: int, compat: str
) -> tuple[list[Any], dict[str, Callable[[Any, int], Any]]]:
    from jaxlab.instantedit.align import find_tokens
    from jaxlab.instantedit.evaluation import case_of
    from jaxlab.instantedit.pie_bench import read_pie_bench

    def edited(case: Any, seed: int) -> Any:
        tokenizer, blend = pipeline.tokenizer, case.blend_word
        if blend and not find_tokens(tokenizer.ids(case.target_prompt), tokenizer.words(blend))[0]:
            blend = None  # some edits name a word that their prompt lacks
        prompts = case.source_prompt, case.target_prompt
        return pipeline.edit(case.source_image(), *prompts, blend_word=blend, compat=compat, seed=seed).image

    return [case_of(each) for each in read_pie_bench(folder)[:count]], {"InstantEdit": edited}


def _pipeline(model: str, controlnet: Path | None, dtype: str) -> Any:
    from jaxlab.instantedit import InstantEditPipeline
    from jaxlab.instantedit.small_editor import load_editor

    if model == SMALL:
        return load_editor()
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"--model: expected a folder or {SMALL}, got {model}")
    if not (folder / "vae").is_dir():
        return load_editor(folder)
    return InstantEditPipeline.from_pretrained(folder, controlnet=controlnet, dtype=dtype)


def _pixels(path: Path, model: str, size: int | None) -> Any:
    from jaxlab.instantedit.image_io import prepare_image, read_image

    return prepare_image(read_image(path), size=32 if size is None and model == SMALL else size)


def _print_timings(title: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    stages = list(rows[0][1])
    print_table(title, ("", *stages, "total"), [(n, *map(t.get, stages), sum(t.values())) for n, t in rows])
