"""How far one image is from another, in FlexGaussian's conventions; `jaxlab.core.image_metrics` has the formulas."""

import numpy as np
from jaxtyping import Array, Num

from jaxlab.core import image_metrics


def psnr(
    image: Num[Array | np.ndarray, "h w 3"], reference: Num[Array | np.ndarray, "h w 3"], *, per_channel: bool = False
) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1].

    Args:
      image: [H, W, 3].
      reference: the same.
      per_channel: False: clamped to [0, 1], one mean square, identical images give 100. True: not clamped, the mean of
        three channels' ratios, as the official search has it; identical images give infinity.
    """
    return float(image_metrics.psnr(image, reference, per_channel=per_channel))


def ssim(image: Num[Array | np.ndarray, "h w 3"], reference: Num[Array | np.ndarray, "h w 3"]) -> float:
    """Structural similarity with zeros beyond the border, as 3D Gaussian Splatting's own code has it."""
    return float(image_metrics.ssim(image, reference, border="zero"))
