"""FlexGaussian: training-free compression of 3D Gaussian splats, and a rasteriser (arXiv 2507.06671).

Example:
    from jaxlab.core import data_path
    from jaxlab.flexgaussian import compress, load_scene, orbit_cameras, render

    scene = load_scene(data_path("splats/playbot_lod6.sog"))
    image = render(scene, orbit_cameras(scene)[0])
    report = compress(data_path("splats/playbot_lod6.sog"), "robot.jxg", min_psnr=25.0)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.flexgaussian import metrics, quantization
    from jaxlab.flexgaussian.cameras import Camera, cameras_from_colmap, cameras_from_transforms, orbit_cameras
    from jaxlab.flexgaussian.compressed import CompressedScene, dequantize, quantize
    from jaxlab.flexgaussian.compression import CompressionReport, compress, decompress
    from jaxlab.flexgaussian.config import QuantConfig
    from jaxlab.flexgaussian.container import load_compressed, save_compressed
    from jaxlab.flexgaussian.fitting import FitConfig, GaussianModel, fit
    from jaxlab.flexgaussian.formats import load_scene, save_scene
    from jaxlab.flexgaussian.importance import importance_scores
    from jaxlab.flexgaussian.photos import load_photographs
    from jaxlab.flexgaussian.projection import Projection, project
    from jaxlab.flexgaussian.pruning import prune
    from jaxlab.flexgaussian.rasteriser import RenderAux, render
    from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError
    from jaxlab.flexgaussian.searching import CANDIDATES, Evaluation, SearchResult, TargetNotMetError, search
    from jaxlab.flexgaussian.viewer import view

__all__ = [
    "CANDIDATES",
    "Camera",
    "CompressedScene",
    "CompressionReport",
    "Evaluation",
    "FitConfig",
    "GaussianModel",
    "GaussianScene",
    "Projection",
    "QuantConfig",
    "RenderAux",
    "SceneFormatError",
    "SearchResult",
    "TargetNotMetError",
    "cameras_from_colmap",
    "cameras_from_transforms",
    "compress",
    "decompress",
    "dequantize",
    "fit",
    "importance_scores",
    "load_compressed",
    "load_photographs",
    "load_scene",
    "metrics",
    "orbit_cameras",
    "project",
    "prune",
    "quantization",
    "quantize",
    "render",
    "save_compressed",
    "save_scene",
    "search",
    "view",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "cameras": ("Camera", "cameras_from_colmap", "cameras_from_transforms", "orbit_cameras"),
        "compressed": ("CompressedScene", "dequantize", "quantize"),
        "compression": ("CompressionReport", "compress", "decompress"),
        "config": ("QuantConfig",),
        "container": ("load_compressed", "save_compressed"),
        "fitting": ("FitConfig", "GaussianModel", "fit"),
        "formats": ("load_scene", "save_scene"),
        "importance": ("importance_scores",),
        "photos": ("load_photographs",),
        "projection": ("Projection", "project"),
        "pruning": ("prune",),
        "rasteriser": ("RenderAux", "render"),
        "scene": ("GaussianScene", "SceneFormatError"),
        "searching": ("CANDIDATES", "Evaluation", "SearchResult", "TargetNotMetError", "search"),
        "viewer": ("view",),
    },
    modules=("metrics", "quantization"),
)
