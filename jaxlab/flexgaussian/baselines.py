"""Other ways to make a scene smaller, each with a file on the disk that is read back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxlab.core.folders import kept_or_temporary
from jaxlab.core.untrusted import read_npz
from jaxlab.flexgaussian.compressed import dequantize, quantize
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.container import load_compressed, save_compressed
from jaxlab.flexgaussian.formats import load_scene, save_scene, spz
from jaxlab.flexgaussian.formats.values import byte, logit, sigmoid
from jaxlab.flexgaussian.morton import morton_order
from jaxlab.flexgaussian.palettes import palette
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.scene import GaussianScene, checked, take

_HALF = QuantConfig(sh0=16, shN=16, opacity=16, scale=16, rotation=16)
_TENSORS = ("log_scales", "quats", "opacity_logit", "sh0", "shN")
_PALETTE_SHARE, _PALETTE_MOST = 8, 1 << 12


def baseline(
    name: str,
    scene: GaussianScene,
    *,
    scores: Float[Array | np.ndarray, " n"] | None = None,
    prune_rate: float = 0.0,
    sh_rate: float = 0.0,
    folder: str | os.PathLike | None = None,
) -> tuple[GaussianScene, int]:
    """A scene written by another method, and read back.

    Args:
      name: "float16": all numbers cast. "uniform8": 8 bits between the least and the largest of a whole tensor,
        positions in float16. "opacity": the most transparent Gaussians pruned, then the paper's quantisation.
        "lightgaussian": those of the lowest scores pruned, then the same. "spz" and "splat": the formats; .spz
        without what lies 2048 and more from an axis' origin, which it cannot hold. "palette": the recipe of .sog and
        gsplat's PNG: 16-bit logarithmic positions, 8 bits for the rest, k-means of harmonics.
      scene: N Gaussians.
      scores: for "lightgaussian": of `importance_scores`.
      prune_rate: for "opacity" and "lightgaussian": the share that goes.
      sh_rate: for "opacity": the share that then loses its harmonics.
      folder: keeps the file; None: it is gone afterwards.

    Returns:
      The scene that comes back, and bytes of the file. All but the formats' are deflated.

    Raises:
      ValueError: another name; an invalid scene; no scores where they are needed.
    """
    if name not in BASELINES:
        raise ValueError(f"name: expected one of {tuple(BASELINES)}, got {name!r}")
    scene = checked(scene)
    with kept_or_temporary(None if folder is None else Path(folder)) as place:
        return BASELINES[name](scene, place / name, scores=scores, prune_rate=prune_rate, sh_rate=sh_rate)


def _float16(scene: GaussianScene, path: Path, **_: Any) -> tuple[GaussianScene, int]:
    return _by_codes(scene, path, _HALF)


def _opacity(
    scene: GaussianScene, path: Path, *, prune_rate: float, sh_rate: float, **_: Any
) -> tuple[GaussianScene, int]:
    return _by_codes(prune(scene, sigmoid(scene.opacity_logit), prune_rate, sh_rate)[0], path, QuantConfig())


def _lightgaussian(
    scene: GaussianScene, path: Path, *, scores: Any, prune_rate: float, **_: Any
) -> tuple[GaussianScene, int]:
    if scores is None:
        raise ValueError("scores: expected those of `importance_scores`, got none")
    return _by_codes(prune(scene, scores, prune_rate, 0.0)[0], path, QuantConfig())


def _by_codes(scene: GaussianScene, path: Path, quant: QuantConfig) -> tuple[GaussianScene, int]:
    save_compressed(path, quantize(scene, quant))
    return dequantize(load_compressed(path)), path.stat().st_size


def _format(scene: GaussianScene, path: Path, **_: Any) -> tuple[GaussianScene, int]:
    path = path.with_suffix(f".{path.name}")
    save_scene(path, scene)
    return load_scene(path), path.stat().st_size


def _spz(scene: GaussianScene, path: Path, **_: Any) -> tuple[GaussianScene, int]:
    held = np.abs(scene.means).max(axis=1) < spz.FURTHEST
    return _format(take(scene, held), path)


def _uniform8(scene: GaussianScene, path: Path, **_: Any) -> tuple[GaussianScene, int]:
    stored: dict[str, Any] = {"means": scene.means.astype(np.float16)}
    for name in _TENSORS:
        stored |= _spread(name, getattr(scene, name))
    path = path.with_suffix(".npz")
    np.savez_compressed(path, **stored)
    file = read_npz(path)
    values = {name: _joined(file, name) for name in _TENSORS}
    return checked(GaussianScene(means=file["means"].astype(np.float32), **values)), path.stat().st_size


def _palette(scene: GaussianScene, path: Path, **_: Any) -> tuple[GaussianScene, int]:
    scene = take(scene, morton_order(scene.means))
    means = np.sign(scene.means) * np.log1p(np.abs(scene.means, dtype=np.float64))
    low, high = means.min(axis=0), means.max(axis=0)
    step = np.maximum(high - low, 1e-30) / 65535
    quats = scene.quats / np.linalg.norm(scene.quats, axis=1, keepdims=True)
    stored: dict[str, Any] = {
        "means": _bytes(np.rint((means - low) / step).astype("<u2")),
        "range": np.stack([low, step]),
        "opacity": byte(255 * sigmoid(scene.opacity_logit)),
    }
    for name, value in (("log_scales", scene.log_scales), ("quats", quats), ("sh0", scene.sh0)):
        stored |= _spread(name, value)
    terms = scene.shN.shape[1]
    if terms:
        count = min(_PALETTE_MOST, max(scene.num_gaussians // _PALETTE_SHARE, 1))
        vectors, labels = palette(scene.shN.reshape(-1, 3 * terms), count)
        stored |= _spread("vectors", vectors) | {"labels": _bytes(labels[:, None].astype("<u2"))}
    path = path.with_suffix(".npz")
    np.savez_compressed(path, **stored)
    file = read_npz(path)
    grid = np.ascontiguousarray(file["means"].T).view("<u2").astype(np.float64)
    means = file["range"][0] + file["range"][1] * grid
    harmonics = np.zeros((len(means), 0), np.float32)
    if terms:
        labels = np.ascontiguousarray(file["labels"].T).view("<u2")[:, 0]
        harmonics = _joined(file, "vectors")[labels]
    back = GaussianScene(
        means=(np.sign(means) * np.expm1(np.abs(means))).astype(np.float32),
        log_scales=_joined(file, "log_scales"),
        quats=_joined(file, "quats"),
        opacity_logit=logit(file["opacity"] / 255),
        sh0=_joined(file, "sh0"),
        shN=harmonics.reshape(len(means), terms, 3),
    )
    return checked(back), path.stat().st_size


def _bytes(values: np.ndarray) -> np.ndarray:
    """Numbers [N, C] of two bytes as planes of bytes, [2 C, N]."""
    return np.ascontiguousarray(np.ascontiguousarray(values).view(np.uint8).T)


def _spread(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of 8 bits between a tensor's least and largest number, and these two."""
    low, high = (float(edge(values)) if values.size else 0.0 for edge in (np.min, np.max))
    codes = byte((values.astype(np.float64) - low) / ((high - low) or 1.0) * 255)
    return {name: np.ascontiguousarray(np.moveaxis(codes, 0, -1)), f"{name}.range": np.array([low, high])}


def _joined(file: dict[str, np.ndarray], name: str) -> np.ndarray:
    low, high = file[f"{name}.range"]
    return np.moveaxis((low + (high - low) / 255 * file[name]).astype(np.float32), -1, 0)


BASELINES: dict[str, Callable[..., tuple[GaussianScene, int]]] = {
    "float16": _float16,
    "uniform8": _uniform8,
    "opacity": _opacity,
    "lightgaussian": _lightgaussian,
    "spz": _spz,
    "splat": _format,
    "palette": _palette,
}
