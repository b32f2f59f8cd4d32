"""Images of 3D Gaussians (FlexGaussian)."""

import functools

import numpy as np

from benchmarks import flexgaussian_kernel as kernel
from benchmarks.kernel_ops.op import Op
from tests.oracles import splat_rasterize as splat_oracle

_CPU = {"width": 128, "height": 96}
_GPU = {"width": kernel.WIDTH, "height": kernel.HEIGHT}


def _image(*args, implementation=None):
    # The larger image is the one compiled for GPUs.
    size = _CPU if args[0].shape[0] < kernel.COUNT else _GPU
    return kernel.rasterize(*args, **size, max_pairs=2**17, implementation=implementation)


def _exact(*args):
    *args, cotangent = args
    size = _CPU.values()
    image, transmittance, *_ = splat_oracle.blend(*args, *size)
    gradients = splat_oracle.gradients(*args, *size, cotangent[..., :3], cotangent[..., 3])
    return np.concatenate([image, transmittance[..., None]], axis=2), *gradients


OPS = (
    Op(
        name="splat_rasterize",
        what="3D Gaussians that a camera has projected, blended front to back (FlexGaussian), with counts of pixels.",
        function=_image,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=functools.partial(kernel.made_up, 2000, **_CPU, pixels=2.0),
        shape="2000 Gaussians of about two pixels, 128 x 96 pixels",
        oracle=_exact,
        differentiate=(0, 1, 2, 3),
        gpu_shapes=functools.partial(kernel.abstract, kernel.COUNT, **_GPU),
        gpu_shape="31,000 Gaussians, 131,072 pairs of a tile and a Gaussian, 256 x 192 pixels, float32",
        notes=(
            "Of the temporaries 36 bytes a pair are its gradient. Where a float32 alpha falls on the other side of "
            "1/255 than a float64 one, a Gaussian is seen or not: the error of such a pixel is up to 1/255."
        ),
    ),
)
