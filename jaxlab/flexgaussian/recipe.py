"""A scene compressed to a target: scores, the search, what every byte is spent on, and pictures of both."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.flexgaussian.compiled import PlanConfig
from jaxlab.flexgaussian.config import QuantConfig

__all__ = ["PlanConfig", "StudyConfig", "plan", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compressed, and seen from where.

    Attributes:
      scene: a file, or a name of the library's data.
      views: cameras on an orbit; every second one is held out from the scores.
      width: of their images in pixels.
      height: the same.
      elevation: of the orbit in degrees.
      min_psnr: the target in dB, against the scene's own renders.
      method: of the search, see `search`.
      curve: rates of pruning and of dropping harmonics that are drawn as a curve beside what the search tried.
      quant: bits.
      codec: of the file.
      folder: keeps the compressed file and the decompressed .ply; None: they are gone afterwards.
      seed: of the scene that is made up where the data is not there.
    """

    scene: str = "splats/playbot_lod4.sog"
    views: int = 8
    width: int = 256
    height: int = 192
    elevation: float = 20.0
    min_psnr: float = 30.0
    method: str = "bisect"
    curve: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.2, 0.5), (0.4, 0.5), (0.6, 0.3), (0.8, 0.2))
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    codec: str = "zlib"
    folder: Path | None = None
    seed: int = 0

    def __post_init__(self):
        if self.views < 2:
            raise ValueError(f"views: expected at least 2, one to score and one to look, got {self.views}")


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles the rasteriser for a target, which need not be there; see `jaxlab.flexgaussian.compiled`."""
    from jaxlab.flexgaussian.compiled import compile_rasteriser

    return compile_rasteriser(config, target)


def run(config: StudyConfig) -> core.Report:
    """Compresses a scene to a target and tells what was tried, with pictures. Needs nothing but a CPU."""
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> core.Report:
    from jaxlab.flexgaussian import charts, pictures
    from jaxlab.flexgaussian.cameras import orbit_cameras
    from jaxlab.flexgaussian.compressed import dequantize
    from jaxlab.flexgaussian.container import save_compressed
    from jaxlab.flexgaussian.formats import save_scene
    from jaxlab.flexgaussian.importance import importance_scores
    from jaxlab.flexgaussian.searching import search
    from jaxlab.flexgaussian.trial import Bench, Choice

    scene, synthetic = _scene(config)
    cameras = orbit_cameras(scene, config.views, config.width, config.height, elevation=config.elevation)
    scored, shown = cameras[::2], cameras[1::2]
    clock = _Clock()
    scores = importance_scores(scene, scored)
    clock.lap("scores")
    options = {"scores": scores, "quant": config.quant, "codec": config.codec}
    found = search(scene, shown, min_psnr=config.min_psnr, method=config.method, **options)
    compressed: Any = found.compressed
    clock.lap("search")
    save_compressed(folder / "scene.jxg", found.compressed, codec=config.codec)
    clock.lap("writing")
    back = dequantize(found.compressed)
    save_scene(folder / "scene.ply", back)
    clock.lap("decompression")
    bench = Bench(scene, shown, None, scores=scores, test_every=1, codec=config.codec)
    curve = [bench.attempt(Choice(p, s, config.quant)) for p, s in config.curve]
    clock.lap("the curve")
    sizes = compressed.size_report()
    kept = found.compressed.num_gaussians
    note = (
        f"PSNR is over {len(shown)} views that the scores did not use, against renders of the scene as it was, which "
        "its author had quantised already. The ratio is to a plain .ply, which has normals, too. Seconds are "
        "those of this CPU and include compiling."
    )
    return core.Report(
        system="flexgaussian",
        title=f"{scene.num_gaussians} Gaussians in {found.bytes / 1024:.0f} KiB, {found.ratio:.1f} times less",
        metrics={
            "gaussians": scene.num_gaussians,
            "kept": kept,
            "with_harmonics": found.compressed.num_sh,
            "psnr": found.psnr,
            "target_psnr": config.min_psnr,
            "status": found.status,
            "bytes": found.bytes,
            "ratio": found.ratio,
            **{f"seconds, {name}": seconds for name, seconds in clock.laps.items()},
        },
        tables=(
            (
                "What the search tried, in this order (measured)",
                ("pruned", "without harmonics", "PSNR, dB", "bytes", "ratio", "meets the target"),
                [
                    (t.prune_rate, t.sh_rate, t.psnr, t.bytes, bench.plain_bytes / t.bytes, t.passed)
                    for t in found.trace
                ],
            ),
            (
                "Where the bytes of the chosen one are, before the codec",
                ("what", "bytes", "share"),
                [
                    *(
                        (name, part.packed.nbytes, part.packed.nbytes / sizes["total"])
                        for name, part in compressed.codes.items()
                    ),
                    (
                        "positions",
                        compressed.positions.nbytes,
                        compressed.positions.nbytes / sizes["total"],
                    ),
                    ("tables", sizes["tables"], sizes["tables"] / sizes["total"]),
                    (
                        "header",
                        sizes["total"] - sizes["codes"] - sizes["tables"],
                        1 - (sizes["codes"] + sizes["tables"]) / sizes["total"],
                    ),
                ],
            ),
        ),
        plots=(
            ("Scene, compressed, four times the difference", pictures.side_by_side(scene, back, shown[0])),
            ("Quality by size", charts.rate_distortion({"candidates": curve, "search": found.trace}, config.min_psnr)),
            ("Importance", charts.importance(scores, kept, found.compressed.num_sh)),
        ),
        notes=(*(("A made-up scene: the library's data is not here.",) if synthetic else ()), note),
        synthetic=synthetic,
    )


class _Clock:
    def __init__(self):
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._since = now - self._since, now


def _scene(config: StudyConfig) -> tuple[Any, bool]:
    """The scene, and whether it is made up."""
    from jaxlab.flexgaussian.formats import load_scene
    from jaxlab.flexgaussian.made_up import striped_ball

    if os.path.exists(config.scene):
        return load_scene(config.scene), False
    try:
        return load_scene(core.data_path(config.scene)), False
    except core.DataUnavailable:
        return striped_ball(4000, seed=config.seed), True
