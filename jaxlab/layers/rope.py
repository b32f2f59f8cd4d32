"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), half-split as in the public checkpoints.

Frequencies are made once, in numpy, from the static configuration; tables of cosines and sines once a forward pass.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_frequencies(
    dim: int,
    theta: float = 10000.0,
    kind: str = "default",
    *,
    factor: float = 1.0,
    original_max_position_embeddings: int | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of rotated dimensions, and the factor on cosine and sine.

    Args:
        dim: rotated dimensions of a head, even.
        theta: base of the geometric series.
        kind: "default", "linear" (positions divided by `factor`), "llama3" (low frequencies divided by `factor`,
            Llama 3.1) or "yarn" (ramp between both, and a factor on the tables; arXiv:2309.00071).
        factor: how many times longer than the original context.
        original_max_position_embeddings: context length before scaling ("llama3", "yarn").
        low_freq_factor: "llama3": wavelengths above original / this are divided fully.
        high_freq_factor: "llama3": wavelengths below original / this are kept.
        beta_fast: "yarn": rotations within the original context above which a frequency is kept.
        beta_slow: "yarn": rotations below which it is divided fully.
        attention_factor: "yarn": factor on the tables; None derives it from `factor`.
        mscale: "yarn" as DeepSeek writes it: numerator's slope of that factor.
        mscale_all_dim: its denominator's slope.
        truncate: "yarn": round the ramp's ends to whole dimensions.

    Returns:
        Frequencies `[dim // 2]` float32, and the factor.
    """
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if kind == "default":
        return frequencies.astype(np.float32), 1.0
    if kind == "linear":
        return (frequencies / factor).astype(np.float32), 1.0
    if kind not in ("llama3", "yarn"):
        raise NotImplementedError(f"rope kind {kind!r}: expected one of 'default', 'linear', 'llama3', 'yarn'")
    if original_max_position_embeddings is None:
        raise ValueError(f"rope kind {kind!r} needs original_max_position_embeddings, got None")
    original = original_max_position_embeddings
    if kind == "llama3":
        turns = original * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
        return (frequencies * (smooth + (1 - smooth) / factor)).astype(np.float32), 1.0

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_magnitude(factor, 1.0)
    return frequencies.astype(np.float32), float(attention_factor)


def _yarn_magnitude(factor: float, slope: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


def rope_tables(
    positions: Int[Array, "*axes b t"],
    frequencies: np.ndarray,
    magnitude: float = 1.0,
    sections: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosines and sines of every position and frequency, float32.

    Args:
        positions: `[B,T]`, or `[3,B,T]` (time, height, width) for M-RoPE.
        frequencies: of `rope_frequencies`.
        magnitude: its second result.
        sections: how many frequencies follow each axis of `[3,B,T]` positions (Qwen2-VL, arXiv:2409.12191).
    """
    if positions.ndim == 2:
        angles = positions.astype(jnp.float32)[..., None] * frequencies
    else:
        if sections is None or len(sections) != positions.shape[0] or sum(sections) != frequencies.shape[0]:
            raise ValueError(
                f"rope sections: expected {positions.shape[0]} numbers with sum {frequencies.shape[0]}, got {sections}"
            )
        axis = np.repeat(np.arange(len(sections)), sections)
        angles = jnp.moveaxis(positions.astype(jnp.float32)[axis], 0, -1) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(
    x: Float[Array, "b t heads dim"], cos: Float[Array, "_ t half"], sin: Float[Array, "_ t half"]
) -> Float[Array, "b t heads dim"]:
    """Rotates pairs (i, i + half) of the first 2*half dimensions; the rest passes. Float32 inside, dtype of x out."""
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), rest], axis=-1)
