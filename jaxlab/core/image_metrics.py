"""How far one image is from another: MSE, PSNR, SSIM. Images are `[..., H, W, C]`; leading axes give one value each.

All of them are plain JAX: they run under `jit`, `vmap` and `grad`, in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, "Image quality assessment", section III.C


def mse(
    a: Num[Array | np.ndarray, "*b h w c"],
    b: Num[Array | np.ndarray, "*b h w c"],
    *,
    mask: Bool[Array | np.ndarray, "*b h w"] | None = None,
) -> Float[Array, "*b"]:
    """The mean squared difference over pixels and channels.

    Args:
      a: images.
      b: the images to compare with.
      mask: both images are multiplied by it; masked pixels are 0 in both and still count in the mean.
    """
    a, b = _prepared(a, b, mask)
    return jnp.mean(jnp.square(a - b), axis=(-3, -2, -1))


def psnr(
    a: Num[Array | np.ndarray, "*b h w c"],
    b: Num[Array | np.ndarray, "*b h w c"],
    *,
    data_range: float = 1.0,
    per_channel: bool = False,
    mask: Bool[Array | np.ndarray, "*b h w"] | None = None,
    cap: float | None = 100.0,
) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio in dB.

    Args:
      a: images.
      b: the images to compare with.
      data_range: the largest possible value; the smallest is 0.
      per_channel: False: values clamped to [0, data_range], one MSE an image. True: values as they are, one MSE a
        channel, and the mean of the channels' ratios, never capped (the convention of FlexGaussian's search).
      mask: as in `mse`.
      cap: largest ratio of the joint form, so that identical images have a finite one; None: infinite.
    """
    if not data_range > 0:
        raise ValueError(f"data_range: expected more than 0, got {data_range}")
    a, b = _prepared(a, b, mask)
    if per_channel:
        errors = jnp.mean(jnp.square(a - b), axis=(-3, -2))
        return jnp.mean(_decibels(errors, data_range), axis=-1)
    a, b = (jnp.clip(image, 0.0, data_range) for image in (a, b))
    ratio = _decibels(jnp.mean(jnp.square(a - b), axis=(-3, -2, -1)), data_range)
    return ratio if cap is None else jnp.minimum(ratio, cap)


def ssim(
    a: Num[Array | np.ndarray, "*b h w c"],
    b: Num[Array | np.ndarray, "*b h w c"],
    *,
    data_range: float = 1.0,
    border: str = "zero",
    mask: Bool[Array | np.ndarray, "*b h w"] | None = None,
) -> Float[Array, "*b"]:
    """Structural similarity, Wang et al. 2004: Gaussian window 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03.

    The variances are the biased ones. The mean goes over the channels and the whole map.

    Args:
      a: images.
      b: the images to compare with.
      data_range: the largest possible value; the smallest is 0.
      border: what lies outside an image: "zero" (3D Gaussian splatting), "reflect" (mirrored without repeating the
        edge, as torchmetrics), or "valid": windows that would reach outside are left out (as scikit-image).
      mask: as in `mse`.
    """
    if border not in ("zero", "reflect", "valid"):
        raise ValueError(f"border: expected 'zero', 'reflect' or 'valid', got {border!r}")
    if not data_range > 0:
        raise ValueError(f"data_range: expected more than 0, got {data_range}")
    a, b = _prepared(a, b, mask)
    needed = {"zero": 1, "reflect": _WINDOW // 2 + 1, "valid": _WINDOW}[border]
    if min(a.shape[-3:-1]) < needed:
        raise ValueError(f"a: border {border!r} needs height and width of at least {needed}, got {a.shape[-3:-1]}")
    return _ssim(a, b, data_range, border)


@functools.partial(jax.jit, static_argnames="border")
def _ssim(a: Array, b: Array, data_range: float | Array, border: str) -> Array:
    a, b = (_padded(image, border) for image in (a, b))
    # About each image's own mean: in float32 E[x^2] - E[x]^2 of a bright, flat image loses half its digits.
    centre_a, centre_b = (jax.lax.stop_gradient(image.mean(axis=(-3, -2), keepdims=True)) for image in (a, b))
    a, b = a - centre_a, b - centre_b
    mean_a, mean_b, square_a, square_b, product = _blurred(jnp.stack([a, b, a * a, b * b, a * b]))
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    mean_a, mean_b = mean_a + centre_a, mean_b + centre_b
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _prepared(a: Array | np.ndarray, b: Array | np.ndarray, mask: Array | np.ndarray | None) -> tuple[Array, Array]:
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {a.shape}, got {b.shape}")
    if a.ndim < 3 or 0 in a.shape[-3:]:
        raise ValueError(f"a: expected images [..., H, W, C] with pixels, got shape {a.shape}")
    if mask is not None and mask.shape != a.shape[:-1]:
        raise ValueError(f"mask: expected shape {a.shape[:-1]}, got {mask.shape}")
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if mask is None:
        return a, b
    keep = jnp.asarray(mask)[..., None]
    return jnp.where(keep, a, 0.0), jnp.where(keep, b, 0.0)


def _decibels(error: Array, data_range: float) -> Array:
    return 10.0 * jnp.log10(data_range**2 / error)


def _padded(image: Array, border: str) -> Array:
    reach = _WINDOW // 2
    if border == "valid":
        return image
    widths = [(0, 0)] * (image.ndim - 3) + [(reach, reach), (reach, reach), (0, 0)]
    return jnp.pad(image, widths, mode="constant" if border == "zero" else "reflect")


def _blurred(images: Array) -> Array:
    """The Gaussian window over every place where it fits, as one convolution along each axis."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = jnp.asarray(weights / weights.sum(), jnp.float32)
    planes = jnp.moveaxis(images, -1, -3)
    result = planes.reshape(-1, *planes.shape[-2:], 1)
    for kernel in (weights[:, None, None, None], weights[None, :, None, None]):
        result = jax.lax.conv_general_dilated(
            result,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
    return jnp.moveaxis(result.reshape(*planes.shape[:-2], *result.shape[1:3]), -3, -1)
