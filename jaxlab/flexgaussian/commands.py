"""`jaxlab flexgaussian compress|decompress|convert|render|eval|info|fit|view`; heavy imports wait until they run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import print_table, usage

app = typer.Typer(rich_markup_mode="rich")

_Scene = Annotated[Path, typer.Argument(help=".ply, compressed .ply, .splat, .spz, .sog or .jxg.")]
_Cameras = Annotated[
    Path | None, typer.Option(help="transforms.json, or a folder with a COLMAP model; without, an orbit.")
]
_Photos = Annotated[Path | None, typer.Option(help="Folder of the cameras' photographs, by name.")]
_Views = Annotated[int, typer.Option(help="Cameras of the orbit.")]
_Width = Annotated[int, typer.Option(help="Of images in pixels.")]
_Height = Annotated[int, typer.Option(help="Of images in pixels.")]


@app.callback()
def _group() -> None: ...


@app.command()
def compress(
    src: _Scene,
    dst: Annotated[Path, typer.Argument(help="The compressed file, .jxg.")],
    cameras: _Cameras = None,
    photos: _Photos = None,
    max_psnr_drop: Annotated[float, typer.Option(help="With photographs: dB that may be lost.")] = 1.0,
    min_psnr: Annotated[float, typer.Option(help="Without: dB against the scene's own renders.")] = 35.0,
    max_bytes: Annotated[int | None, typer.Option(help="Largest file.")] = None,
    min_ratio: Annotated[float | None, typer.Option(help="Smallest ratio to a plain .ply.")] = None,
    prune_rate: Annotated[float | None, typer.Option(help="With --sh-rate: no search.")] = None,
    sh_rate: Annotated[float | None, typer.Option(help="With --prune-rate: no search.")] = None,
    method: Annotated[str, typer.Option(help="bisect, or walk (the official code's).")] = "bisect",
    weights: Annotated[str, typer.Option(help="Of scores: alpha_T, opacity (the paper's) or count.")] = "alpha_T",
    codec: Annotated[str, typer.Option(help="none, zlib or zstd.")] = "zlib",
    strict: Annotated[bool, typer.Option("--strict", help="Fail where the target is not met.")] = False,
    views: _Views = 8,
    width: _Width = 256,
    height: _Height = 192,
) -> None:
    """Shrink a scene as far as a target of quality or size allows."""
    from jaxlab import flexgaussian
    from jaxlab.flexgaussian.searching import TargetNotMetError

    with usage():
        chosen = None if cameras is None else _cameras(cameras)
        if chosen is None:
            chosen = flexgaussian.orbit_cameras(_load(src), views, width, height)
        images = None if photos is None else _photographs(photos, chosen)
        options: dict[str, Any] = {"weights": weights}
        if prune_rate is None:
            options |= {"max_psnr_drop": max_psnr_drop, "min_psnr": min_psnr, "max_bytes": max_bytes}
            options |= {"min_ratio": min_ratio, "method": method, "strict": strict}
        rates = {"prune_rate": prune_rate, "sh_rate": sh_rate}
        try:
            report = flexgaussian.compress(src, dst, cameras=chosen, images=images, codec=codec, **rates, **options)
        except TargetNotMetError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
    rows = [(t.prune_rate, t.sh_rate, t.psnr, t.bytes, "yes" if t.passed else "no") for t in report.search.trace]
    print_table("Tried", ("pruned", "without harmonics", "PSNR, dB", "bytes", "meets the target"), rows)
    before, after = report.num_gaussians
    text = f"{dst}: {report.bytes} bytes, {report.ratio:.1f} times less, {report.psnr:.2f} dB"
    text += f", {before} -> {after} Gaussians"
    typer.echo(text + ("" if report.status == "ok" else "; the target was NOT met, this is the best attempt"))


@app.command()
def decompress(
    src: Annotated[Path, typer.Argument(help="A file that `compress` wrote.")],
    dst: Annotated[Path, typer.Argument(help=".ply, .splat or .spz.")],
) -> None:
    """Turn a compressed file back into a scene that any viewer opens."""
    from jaxlab import flexgaussian

    with usage():
        flexgaussian.decompress(src, dst)
    typer.echo(f"{dst}: {dst.stat().st_size} bytes")


@app.command()
def convert(
    src: _Scene,
    dst: Annotated[Path, typer.Argument(help=".ply, .splat or .spz.")],
    sanitize: Annotated[bool, typer.Option("--sanitize", help="Drop Gaussians that are not finite.")] = False,
) -> None:
    """Write a scene in another format."""
    from jaxlab import flexgaussian

    with usage():
        flexgaussian.save_scene(dst, _load(src, sanitize=sanitize))
    typer.echo(f"{dst}: {dst.stat().st_size} bytes")


@app.command()
def render(
    scene: _Scene,
    folder: Annotated[Path, typer.Argument(help="For one PNG a camera.")],
    cameras: _Cameras = None,
    background: Annotated[str, typer.Option(help="Red, green, blue in 0 to 1.")] = "1,1,1",
    views: _Views = 8,
    width: _Width = 640,
    height: _Height = 480,
) -> None:
    """Draw what cameras see."""
    import numpy as np

    from jaxlab import flexgaussian
    from jaxlab.core import progress
    from jaxlab.core.errors import require
    from jaxlab.flexgaussian.pictures import pixels

    with usage():
        loaded = _load(scene)
        chosen = flexgaussian.orbit_cameras(loaded, views, width, height) if cameras is None else _cameras(cameras)
        color = _color(background)
    pillow = require("PIL.Image", "splats")
    folder.mkdir(parents=True, exist_ok=True)
    for i, camera in enumerate(progress(chosen, "rendering")):
        image = pixels(np.asarray(flexgaussian.render(loaded, camera, color)))
        pillow.fromarray(image).save(folder / f"{Path(camera.name).stem or f'{i:03}'}.png")
    typer.echo(f"{folder}: {len(chosen)} images")


@app.command("eval")
def evaluate(
    scene: _Scene,
    reference: Annotated[Path | None, typer.Option(help="The scene as it was.")] = None,
    cameras: _Cameras = None,
    photos: _Photos = None,
    test_every: Annotated[int, typer.Option(help="With photographs: every how many cameras one is tested.")] = 8,
    views: _Views = 8,
    width: _Width = 256,
    height: _Height = 192,
) -> None:
    """Measure PSNR and SSIM against another scene's renders, or against photographs."""
    import numpy as np

    from jaxlab import flexgaussian
    from jaxlab.flexgaussian import metrics

    with usage():
        if (reference is None) == (photos is None):
            raise ValueError("--reference, --photos: expected exactly one")
        if photos is not None and cameras is None:
            raise ValueError("--photos: photographs need --cameras")
        loaded = _load(scene)
        other: Any = None if reference is None else _load(reference)
        if cameras is not None:
            chosen = _cameras(cameras)
        else:
            chosen = flexgaussian.orbit_cameras(loaded if other is None else other, views, width, height)
        if photos is not None:
            chosen = chosen[::test_every]
            wanted = _photographs(photos, chosen)
        else:
            wanted = [np.asarray(flexgaussian.render(other, camera)) for camera in chosen]
        got = [np.asarray(flexgaussian.render(loaded, camera)) for camera in chosen]
    rows = [
        (c.name or i, metrics.psnr(a, b), metrics.ssim(a, b)) for i, (c, a, b) in enumerate(zip(chosen, got, wanted))
    ]
    rows.append(("mean", float(np.mean([row[1] for row in rows])), float(np.mean([row[2] for row in rows]))))
    print_table("Quality", ("view", "PSNR, dB", "SSIM"), rows)


@app.command()
def info(scene: _Scene) -> None:
    """Say what a file holds."""
    import numpy as np

    from jaxlab.flexgaussian import CompressedScene, load_compressed
    from jaxlab.flexgaussian.compression import is_compressed

    with usage():
        if is_compressed(scene):
            packed = load_compressed(scene)
            rows = [("Gaussians", packed.num_gaussians), ("with harmonics", packed.num_sh), ("degree", packed.degree)]
            if isinstance(packed, CompressedScene):
                rows += [(f"bits of {name}", part.bits) for name, part in packed.codes.items()]
                rows += [(f"bytes, {name}", size) for name, size in packed.size_report().items()]
            else:
                rows += [(f"step of {name}", step) for name, step in dataclasses.asdict(packed.config).items()]
        else:
            loaded = _load(scene)
            low, high = loaded.means.min(axis=0), loaded.means.max(axis=0)
            opacity = 1 / (1 + np.exp(-loaded.opacity_logit))
            rows = [("Gaussians", loaded.num_gaussians), ("degree", loaded.degree)]
            rows += [("box", " to ".join("(" + ", ".join(f"{x:.3g}" for x in edge) + ")" for edge in (low, high)))]
            rows += [
                ("median size", float(np.exp(np.median(loaded.log_scales)))),
                ("mean opacity", float(opacity.mean())),
            ]
        rows.append(("bytes of the file", scene.stat().st_size))
    print_table(str(scene), (), rows)


@app.command()
def fit(
    transforms: Annotated[Path, typer.Argument(help="A NeRF transforms.json with its photographs beside it.")],
    dst: Annotated[Path, typer.Argument(help="The scene, .ply, .splat or .spz.")],
    steps: Annotated[int, typer.Option(help="One photograph each.")] = 3000,
    count: Annotated[int, typer.Option(help="Gaussians.")] = 10_000,
    degree: Annotated[int, typer.Option(help="Of the harmonics, 0 to 3.")] = 2,
    width: _Width = 135,
    height: _Height = 240,
    test_every: Annotated[int, typer.Option(help="Every how many photographs one is held out; 0: none.")] = 8,
    folder: Annotated[Path | None, typer.Option(help="For checkpoints; an interrupted run goes on there.")] = None,
    seed: Annotated[int, typer.Option(help="Of order and starting points.")] = 0,
) -> None:
    """Learn a scene from photographs."""
    import numpy as np

    from jaxlab import flexgaussian
    from jaxlab.flexgaussian import metrics

    with usage():
        images, cameras = flexgaussian.load_photographs(transforms, width, height)
        held = set(range(0, len(images), test_every)) if test_every else set()
        rest = [i for i in range(len(images)) if i not in held]
        config = flexgaussian.FitConfig(count=count, degree=degree)
        some = [images[i] for i in rest], [cameras[i] for i in rest]
        scene, history = flexgaussian.fit(*some, None, steps=steps, config=config, seed=seed, folder=folder)
        flexgaussian.save_scene(dst, scene)
    text = f"{dst}: {scene.num_gaussians} Gaussians, {history[-1]['psnr']:.2f} dB in training"
    if held:
        shown = [metrics.psnr(np.asarray(flexgaussian.render(scene, cameras[i])), images[i]) for i in sorted(held)]
        text += f", {np.mean(shown):.2f} dB on {len(held)} photographs held out"
    typer.echo(text)


@app.command()
def view(
    original: _Scene,
    compressed: Annotated[Path | None, typer.Argument(help="What to show beside it.")] = None,
    port: Annotated[int, typer.Option(help="Of the page on this machine; 0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    viewer_js: Annotated[
        Path | None, typer.Option(help="The PlayCanvas engine, playcanvas.min.mjs, where it cannot be downloaded.")
    ] = None,
) -> None:
    """Look at a scene in the browser, and at what became of it, side by side."""
    from jaxlab import flexgaussian

    with usage():
        flexgaussian.view(original, compressed, port=port, open_browser=browser, viewer_js=viewer_js)


def _load(path: Path, *, sanitize: bool = False) -> Any:
    from jaxlab.flexgaussian.compression import open_scene

    return open_scene(path, sanitize=sanitize)


def _cameras(path: Path) -> Any:
    from jaxlab.flexgaussian import cameras_from_colmap, cameras_from_transforms

    return cameras_from_colmap(path) if path.is_dir() else cameras_from_transforms(path)


def _photographs(folder: Path, cameras: Any) -> Any:
    from jaxlab.flexgaussian.photos import read_image

    return [read_image(folder / camera.name, camera.width, camera.height) for camera in cameras]


def _color(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--background: expected three numbers like 1,1,1, got {text!r}") from None
    return red, green, blue
