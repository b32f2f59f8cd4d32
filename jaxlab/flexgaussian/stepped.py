"""Ours, beside the paper's quantisation: whole steps of one length an attribute, for an entropy coder to write.

What a step may be differs among Gaussians: one that few pixels show, or faintly, has steps up to eight times as long.
Colours are turned so that their parts are not correlated, and ellipsoids written in one way of 48 (`canonical`).
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Float

from jaxlab.flexgaussian.canonical import canonical, whole_quats
from jaxlab.flexgaussian.formats.values import logit, sigmoid
from jaxlab.flexgaussian.octree import MOST_BITS, cells_of, codes_of
from jaxlab.flexgaussian.scene import GaussianScene, checked, take

CLASSES = 4
_DEAD = 0.16
_SPREAD_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Lengths of steps.

    Attributes:
      position: of centres, in units of the radius of nine tenths of them; further out they grow with the distance.
      scale: of the logarithms.
      rotation: of the quaternions' x, y, z.
      opacity: of opacities, between 0 and 1.
      sh0: of the colours' constant terms.
      shN: of the higher terms.
      spread: how much longer steps are of what matters less: its share of the pixels to the power of so much of -1/2.
    """

    position: float = 3e-4
    scale: float = 0.08
    rotation: float = 0.016
    opacity: float = 0.02
    sh0: float = 0.04
    shN: float = 0.06
    spread: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and (value > 0 or (value == 0 and field.name == "spread"))):
                raise ValueError(f"{field.name}: expected more than 0, got {value!r}")

    def times(self, factor: float) -> "StepConfig":
        """All steps longer by a factor."""
        fields = {f.name: getattr(self, f.name) * factor for f in dataclasses.fields(self) if f.name != "spread"}
        return dataclasses.replace(self, **fields)


@dataclasses.dataclass(frozen=True)
class SteppedScene:
    """What `quantize_steps` makes; rows along a space-filling curve.

    Attributes:
      config: by which it was made.
      degree: of the harmonics.
      center: of the scene, [3] float64.
      radius: what steps of positions are relative to.
      low: of the contracted positions, [3] float64.
      bits: of a cell's coordinate.
      cells: of the grid of contracted positions, sorted Morton codes, [N] uint64.
      classes: which steps a Gaussian has, 0 the shortest, [N].
      scales: whole steps of falling logarithms, [N, 3].
      rotations: the same of x, y, z, [N, 3].
      opacities: [N].
      sh0: in the turned basis, [N, 3].
      shN: the same, [N, 3 K].
      sh0_basis: [3, 3] float32; its rows are directions.
      shN_basis: [3 K, 3 K] float16.
    """

    config: StepConfig
    degree: int
    center: np.ndarray
    radius: float
    low: np.ndarray
    bits: int
    cells: np.ndarray
    classes: np.ndarray
    scales: np.ndarray
    rotations: np.ndarray
    opacities: np.ndarray
    sh0: np.ndarray
    shN: np.ndarray
    sh0_basis: np.ndarray
    shN_basis: np.ndarray

    @property
    def num_gaussians(self) -> int:
        """N."""
        return len(self.cells)

    @property
    def num_sh(self) -> int:
        """How many have any higher harmonic that is not zero."""
        return int(np.any(self.shN, axis=1).sum())


def quantize_steps(
    scene: GaussianScene,
    config: StepConfig | None = None,
    importance: Float[Array | np.ndarray, " n"] | None = None,
) -> SteppedScene:
    """Every number to its nearest whole step.

    Args:
      scene: N Gaussians.
      config: lengths of steps; None: the default.
      importance: pixels that each Gaussian colours, as `importance_scores(weights="alpha_T", volume_power=0)` tells;
        None: all matter alike.

    Raises:
      ValueError: an invalid scene; importance of another length, negative or not finite; steps so short that codes or
        cells have too many bits.
    """
    scene, config = checked(scene), config or StepConfig()
    means = np.asarray(scene.means, np.float64)
    center = np.median(means, axis=0)
    radius = float(np.quantile(np.linalg.norm(means - center, axis=1), _SPREAD_SHARE)) or 1.0
    contracted = np.arcsinh((means - center) / radius)
    low = contracted.min(axis=0)
    grid = np.rint((contracted - low) / config.position).astype(np.int64)
    bits = max(int(grid.max()).bit_length(), 1)
    if bits > MOST_BITS:
        raise ValueError(f"position: a step of {config.position} needs {bits} bits, more than {MOST_BITS}")
    codes = codes_of(grid)
    order = np.argsort(codes, kind="stable")
    scene = take(scene, order)
    weights = None if importance is None else np.asarray(importance)
    classes = _classes(weights, config.spread, scene.num_gaussians)[order]
    longer, gently = _growth(classes)
    log_scales, vectors = canonical(scene.log_scales, scene.quats)
    log_scales = np.maximum(log_scales, _flattest(config, radius))
    harmonics = scene.shN.reshape(len(order), -1).astype(np.float64)
    sh0_basis, shN_basis = _basis(scene.sh0).astype(np.float32), _basis(harmonics).astype(np.float16)
    return SteppedScene(
        config=config,
        degree=scene.degree,
        center=center,
        radius=radius,
        low=low,
        bits=bits,
        cells=codes[order],
        classes=classes,
        scales=_whole(log_scales / (config.scale * gently)),
        rotations=_whole(vectors / (config.rotation * gently)),
        opacities=_whole(sigmoid(scene.opacity_logit)[:, None] / (config.opacity * gently))[:, 0],
        sh0=_whole(scene.sh0 @ sh0_basis.T.astype(np.float64) / (config.sh0 * longer)),
        shN=_whole(_shrunk(harmonics @ shN_basis.T.astype(np.float64) / (config.shN * longer))),
        sh0_basis=sh0_basis,
        shN_basis=shN_basis,
    )


def dequantize_steps(stepped: SteppedScene) -> GaussianScene:
    """The scene, Gaussians with higher harmonics first, else in stored order; rotations as unit quaternions."""
    config, (longer, gently) = stepped.config, _growth(stepped.classes)
    contracted = stepped.low + cells_of(stepped.cells) * config.position
    opacity = stepped.opacities * (config.opacity * gently[:, 0])
    harmonics = (stepped.shN * (config.shN * longer)) @ stepped.shN_basis.astype(np.float64)
    scene = GaussianScene(
        means=(stepped.center + stepped.radius * np.sinh(contracted)).astype(np.float32),
        log_scales=(stepped.scales * (config.scale * gently)).astype(np.float32),
        quats=whole_quats(stepped.rotations * (config.rotation * gently)),
        opacity_logit=logit(opacity),
        sh0=((stepped.sh0 * (config.sh0 * longer)) @ stepped.sh0_basis.astype(np.float64)).astype(np.float32),
        shN=harmonics.reshape(len(harmonics), -1, 3).astype(np.float32),
    )
    return take(scene, np.argsort(~np.any(stepped.shN, axis=1), kind="stable"))


def _flattest(config: StepConfig, radius: float) -> float:
    """The logarithm of a size that a step of positions hides."""
    return float(np.log(config.position * radius / 4))


def _classes(importance: np.ndarray | None, spread: float, count: int) -> np.ndarray:
    if importance is None or spread == 0:
        return np.zeros(count, np.int64)
    importance = np.asarray(importance, np.float64)
    if importance.shape != (count,) or not (np.isfinite(importance) & (importance >= 0)).all():
        raise ValueError(f"importance: expected finite numbers not below 0 of shape ({count},)")
    largest = np.quantile(importance, 0.9) or 1.0
    ratio = np.maximum(importance, 1e-9 * largest) / largest
    return np.clip(np.rint(-0.5 * spread * np.log2(ratio)), 0, CLASSES - 1).astype(np.int64)


def _growth(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the steps of colours, and of those of shapes, [N, 1] each."""
    return np.exp2(classes)[:, None], np.exp2(classes / 2)[:, None]


def _basis(values: np.ndarray) -> np.ndarray:
    """Directions in which values are not correlated, the one with the most energy first."""
    values = np.asarray(values, np.float64)
    return np.linalg.eigh(values.T @ values)[1].T[::-1]


def _whole(values: np.ndarray) -> np.ndarray:
    steps = np.rint(values)
    if np.abs(steps).max(initial=0) >= 1 << 31:
        raise ValueError("steps: too short for numbers of this size")
    return steps.astype(np.int64)


def _shrunk(values: np.ndarray) -> np.ndarray:
    """Towards 0: where most numbers are near it, fewer bits outweigh larger errors."""
    return np.sign(values) * np.maximum(np.abs(values) - _DEAD, 0)
