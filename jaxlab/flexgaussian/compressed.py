"""A scene in the form that is stored: packed codes, their tables, and positions."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlab.flexgaussian import quantization
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.morton import morton_order
from jaxlab.flexgaussian.positions import decode_positions, encode_positions
from jaxlab.flexgaussian.scene import GaussianScene, checked, take
from jaxlab.flexgaussian.stepped import SteppedScene, dequantize_steps

CODED = ("sh0", "shN", "opacity", "scale", "rotation")
"""The attributes that `QuantConfig` gives bits, in the order in which files hold them."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """One attribute of R rows and C channels.

    Attributes:
      bits: of a code; 16: `packed` holds float16 values instead and there are no tables.
      packed: [ceil(R bits / 8), C] uint8, or [R, C] float16.
      bounds: where segments of rows begin, and R, [S + 1]; [0, R] at 16 bits.
      minimum: of each segment and channel, [S, C] float32, or [0, C].
      scale: the same.
    """

    bits: int
    packed: np.ndarray
    bounds: np.ndarray
    minimum: np.ndarray
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class CompressedScene:
    """What `quantize` makes and a compressed file holds; `dequantize` turns it back.

    Attributes:
      config: by which it was made.
      degree: of the scene's harmonics.
      num_sh: how many Gaussians have any higher harmonic that is not zero; they come first.
      positions: [N, 3] float16, or [N, 9] uint8: 24-bit little-endian whole numbers.
      origin: a position is origin + step times its stored value, [3] float64.
      step: the same.
      codes: by attribute, those of `CODED`; "shN" has `num_sh` rows, all others N.
    """

    config: QuantConfig
    degree: int
    num_sh: int
    positions: np.ndarray
    origin: np.ndarray
    step: np.ndarray
    codes: Mapping[str, Codes]

    @property
    def num_gaussians(self) -> int:
        """N."""
        return len(self.positions)

    def size_report(self) -> dict[str, int]:
        """Bytes: "codes" (packed codes and positions), "tables" (minima and scales), "total" (an uncompressed file)."""
        from jaxlab.flexgaussian.container import file_size

        codes = sum(part.packed.nbytes for part in self.codes.values()) + self.positions.nbytes
        tables = sum(part.minimum.nbytes + part.scale.nbytes for part in self.codes.values())
        return {"codes": codes, "tables": tables, "total": file_size(self)}


def quantize(scene: GaussianScene, config: QuantConfig | None = None) -> CompressedScene:
    """Mixed-precision quantisation (section 3.2 of the paper), Gaussians that have higher harmonics first.

    Quaternions are normalised and given a positive w, which stands for the same rotation.

    Args:
      scene: N Gaussians; those whose higher harmonics are all zero store none.
      config: bits and segments; None: the paper's bits.

    Raises:
      ValueError: an invalid scene; positions that a float16 cannot hold even centred and scaled.
    """
    scene, config = checked(scene), config or QuantConfig()
    shaded = np.any(scene.shN, axis=(1, 2))
    order = np.argsort(~shaded, kind="stable")
    num_sh = int(shaded.sum())
    if config.order == "morton":
        curve = morton_order(scene.means[order[:num_sh]]), morton_order(scene.means[order[num_sh:]])
        order = np.concatenate([order[:num_sh][curve[0]], order[num_sh:][curve[1]]])
    scene = take(scene, order)
    positions, origin, step = encode_positions(scene, config.position)
    quats = scene.quats / np.linalg.norm(scene.quats, axis=1, keepdims=True)
    values = {
        "sh0": scene.sh0,
        "shN": scene.shN[:num_sh].reshape(num_sh, 3 * scene.shN.shape[1]),
        "opacity": scene.opacity_logit[:, None],
        "scale": scene.log_scales,
        "rotation": np.where(quats[:, :1] < 0, -quats, quats),
    }
    codes = {name: _encoded(np.ascontiguousarray(values[name]), getattr(config, name), config) for name in CODED}
    return CompressedScene(config, scene.degree, num_sh, positions, origin, step, codes)


def dequantize(compressed: CompressedScene | SteppedScene) -> GaussianScene:
    """The scene in stored order: Gaussians with higher harmonics first, rotations as unit quaternions."""
    if isinstance(compressed, SteppedScene):
        return dequantize_steps(compressed)
    values = {name: _decoded(part) for name, part in compressed.codes.items()}
    count, terms = compressed.num_gaussians, (compressed.degree + 1) ** 2 - 1
    harmonics = np.zeros((count, terms, 3), np.float32)
    harmonics[: compressed.num_sh] = values["shN"].reshape(compressed.num_sh, terms, 3)
    length = np.linalg.norm(values["rotation"], axis=1, keepdims=True)
    identity = np.array([1, 0, 0, 0], np.float32)  # where coarse codes leave nothing of a quaternion
    return GaussianScene(
        means=decode_positions(compressed.positions, compressed.origin, compressed.step),
        log_scales=values["scale"],
        quats=np.where(length > 0, values["rotation"] / np.where(length > 0, length, 1), identity),
        opacity_logit=values["opacity"][:, 0],
        sh0=values["sh0"],
        shN=harmonics,
    )


def bounds_of(rows: int, bits: int, config: QuantConfig) -> np.ndarray:
    """The segments that `rows` rows of an attribute are divided into."""
    if bits == 16 or rows == 0:
        return np.array([0, rows])
    segments = quantization.auto_segments(rows) if config.segments == "auto" else config.segments
    return quantization.segment_bounds(rows, int(segments), bits, rule=config.segment_rule)


def _encoded(values: np.ndarray, bits: int, config: QuantConfig) -> Codes:
    rows, channels = values.shape
    bounds = bounds_of(rows, bits, config)
    none = np.zeros((0, channels), np.float32)
    if bits == 16:
        return Codes(bits, np.clip(values, -_F16, _F16).astype(np.float16), bounds, none, none)
    if rows == 0:
        return Codes(bits, np.zeros((0, channels), np.uint8), bounds, none, none)
    codes, minimum, scale = quantization.quantize_matrix(values, bounds, bits)
    return Codes(bits, quantization.pack_codes(codes, bits), bounds, minimum, scale)


def _decoded(part: Codes) -> np.ndarray:
    rows = int(part.bounds[-1])
    if part.bits == 16:
        return part.packed.astype(np.float32)
    if rows == 0:
        return np.zeros((0, part.packed.shape[1]), np.float32)
    codes = quantization.unpack_codes(part.packed, part.bits, rows)
    return quantization.dequantize_matrix(codes, part.minimum, part.scale, part.bounds)


_F16 = float(np.finfo(np.float16).max)
