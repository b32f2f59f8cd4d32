"""How an edited image compares with its source (PIE-Bench's metrics, arXiv 2310.01506): pixels, LPIPS, structure, CLIP.

    from jaxlab.instantedit import metrics
    metrics.psnr(edited, source, mask=~edit_mask)       # of the background
    judges = metrics.MetricSet(dino="dino-vitb8", clip="clip-vit-large-patch14")
    judges.measure(edited, source, mask=edit_mask, prompt="a dog")
    judges.unavailable                                  # metric -> why it is not measured

A part of an image is the image times a mask: pixels outside of it are 0 in both images and count in every mean.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxlab.core import image_metrics
from jaxlab.core.errors import MissingExtra
from jaxlab.instantedit.config import Compat, check_choice
from jaxlab.instantedit.image_io import to_uint8
from jaxlab.instantedit.tokens import PromptTokenizer
from jaxlab.models.clip import load_clip, preprocess_image
from jaxlab.models.lpips import Net, load_lpips
from jaxlab.models.vit import VisionTransformer, load_vit

Image = Float[Array | np.ndarray, "h w 3"]
Mask = Bool[Array | np.ndarray, "h w"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEAST_SIDE = 6  # of which the window of SSIM has enough to mirror
_ROUNDING = 1e-3  # by which pixels may leave [0, 1]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a metric is shown.

    Attributes:
      label: for a reader.
      scale: what values are multiplied by in tables.
      higher_is_better: the direction.
    """

    label: str
    scale: float
    higher_is_better: bool


KINDS = {
    "psnr": Kind("PSNR (dB)", 1.0, True),
    "mse": Kind("MSE x1e4", 1e4, False),
    "ssim": Kind("SSIM x1e2", 1e2, True),
    "lpips": Kind("LPIPS x1e3", 1e3, False),
    "structure": Kind("structure distance x1e3", 1e3, False),
    "clip": Kind("CLIP score", 1.0, True),
}
"""By the first word of a metric's name; scaled as PIE-Bench's tables are."""


def psnr(image: Image, reference: Image, *, mask: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
      image: `[H,W,3]` in [0, 1].
      reference: what it is compared with.
      mask: both images are multiplied by it.

    Raises:
      ValueError: other shapes or ranges, or values that are not finite.
    """
    return float(image_metrics.psnr(*_checked(image, reference, mask), mask=mask, cap=None))


def mse(image: Image, reference: Image, *, mask: Mask | None = None) -> float:
    """The mean squared difference; arguments and errors as `psnr`."""
    return float(image_metrics.mse(*_checked(image, reference, mask), mask=mask))


def ssim(image: Image, reference: Image, *, mask: Mask | None = None) -> float:
    """Structural similarity over the whole map, borders mirrored (torchmetrics); arguments and errors as `psnr`.

    Raises:
      ValueError: also where a side has less than 6 pixels.
    """
    image, reference = _checked(image, reference, mask)
    if min(image.shape[:2]) < _LEAST_SIDE:
        raise ValueError(f"image: SSIM needs at least {_LEAST_SIDE} pixels each way, got {image.shape[:2]}")
    return float(image_metrics.ssim(image, reference, mask=mask, border="reflect"))


def _checked(image: Any, reference: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both images on the host."""
    pair = np.asarray(image), np.asarray(reference)
    for name, pixels in zip(("image", "reference"), pair):
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(f"{name}: expected [H, W, 3], got {pixels.shape}")
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(f"{name}: expected floats in [0, 1], got {pixels.dtype}")
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(f"{name}: expected finite values in [0, 1], got {low:.6g} to {high:.6g}")
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"reference: expected the shape of image, {pair[0].shape}, got {pair[1].shape}")
    shape, kind = np.shape(mask), str(getattr(mask, "dtype", type(mask).__name__))
    if mask is not None and (shape != pair[0].shape[:2] or kind != "bool"):
        raise ValueError(f"mask: expected bool {pair[0].shape[:2]}, got {kind} {shape}")
    return pair


def parts(mask: Mask | None, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Suffix of a metric's name -> mask of that part of an image; parts without a pixel are left out.

    Args:
      mask: True where the image is to be edited; None: there is the full image only.
      shape: (H, W).
    """
    found = {"": np.ones(shape, bool)}
    if mask is not None:
        edit = np.asarray(mask)
        found |= {name: part for name, part in (("_edit", edit), ("_background", ~edit)) if part.any()}
    return found


def structure_distance(
    image: Image, reference: Image, model: VisionTransformer, params: Any, *, compat: Compat = "clean"
) -> float:
    """How far the layout of two images differs (Tumanyan et al. 2022, arXiv:2201.00424).

    Each image, resized to the model's square (bilinear), gives the last layer's keys of all tokens, the class token
    among them; their cosines with each other, a matrix an image, are compared by their mean squared difference.

    Args:
      image: `[H,W,3]` in [0, 1].
      reference: what it is compared with.
      model: DINO ViT-B/8 in published tables.
      params: its parameters.
      compat: "clean": pixels in [0, 1], antialiased. "official": PIE-Bench's evaluator normalises pixels in 0..255 as
        if they were in [0, 1], and its torchvision resizes tensors without antialiasing; its numbers compare with
        published ones only.

    Raises:
      ValueError: as `psnr`, or another compat.
    """
    check_choice("compat", compat, Compat)
    pair = np.stack(_checked(image, reference, None))
    return float(_structure(model, params, pair, compat == "official"))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _structure(model: VisionTransformer, params: Any, pair: Array, official: bool) -> Array:
    side = model.config.image_size
    pixels = jax.image.resize(jnp.asarray(pair, jnp.float32), (2, side, side, 3), "linear", antialias=not official)
    pixels = ((255.0 if official else 1.0) * pixels - jnp.asarray(_IMAGENET_MEAN)) / jnp.asarray(_IMAGENET_STD)
    features: Any = model.apply({"params": params}, pixels)
    keys = features.keys
    flat = keys.reshape(2, keys.shape[1], -1)
    length = jnp.linalg.norm(flat, axis=-1)
    products = jnp.einsum("bid,bjd->bij", flat, flat, precision=jax.lax.Precision.HIGHEST)
    cosines = products / jnp.maximum(length[:, :, None] * length[:, None, :], 1e-8)
    return jnp.mean(jnp.square(cosines[0] - cosines[1]))


class MetricSet:
    """All metrics of which the weights are there.

    Names are "psnr", "mse", "ssim", "lpips", each also with "_edit" and "_background" where a mask is given; and
    "structure" and "clip" ("clip_edit").

    Attributes:
      unavailable: "lpips", "structure", "clip" -> why it is not measured; never replaced by another number.
    """

    def __init__(
        self,
        *,
        lpips: Net = "alex",
        lpips_weights: str | os.PathLike[str] | None = None,
        dino: str | os.PathLike[str] | None = None,
        clip: str | os.PathLike[str] | None = None,
        compat: Compat = "clean",
    ):
        """Loads weights. A path that is given must hold them; what is not given and not installed is unavailable.

        Args:
          lpips: backbone; PIE-Bench's is "squeeze".
          lpips_weights: a file, see `jaxlab.models.lpips.load_lpips`.
          dino: Hugging Face folder of DINO ViT-B/8, for the structure distance.
          clip: Hugging Face folder of CLIP ViT-L/14 with its tokenizer, for the CLIP score.
          compat: of `structure_distance`.

        Raises:
          FileNotFoundError: a path that does not exist.
          KeyError: missing or unexpected weights.
          ValueError: a damaged file, another kind of model, or another compat.
        """
        check_choice("compat", compat, Compat)
        self.unavailable: dict[str, str] = {}
        self._lpips: Callable[[np.ndarray, np.ndarray], Any] | None = None
        self._structure: Callable[[np.ndarray, np.ndarray], float] | None = None
        self._clip: Callable[[list[np.ndarray], str], list[float]] | None = None
        self.description = f"LPIPS {lpips}"
        try:
            model, params = load_lpips(lpips, lpips_weights)
            self._lpips = functools.partial(jax.jit(model.apply), {"params": params})
        except (MissingExtra, FileNotFoundError) as error:
            if lpips_weights is not None:
                raise
            self.unavailable["lpips"] = str(error)
        if dino is None:
            self.unavailable["structure"] = "no folder of DINO ViT-B/8 given"
        else:
            model, params = load_vit(dino)
            self._structure = functools.partial(structure_distance, model=model, params=params, compat=compat)
            self.description += f", structure {compat}"
        if clip is None:
            self.unavailable["clip"] = "no folder of CLIP ViT-L/14 given"
        else:
            self._clip = _clip_scorer(clip)
            self.description += ", CLIP"

    def measure(
        self,
        image: Shaped[Array | np.ndarray, "h w 3"],
        reference: Shaped[Array | np.ndarray, "h w 3"],
        *,
        mask: Mask | None = None,
        prompt: str | None = None,
    ) -> dict[str, float]:
        """Every available metric by name.

        Args:
          image: the edited one, uint8 or in [0, 1].
          reference: what it is compared with.
          mask: True where the image was to be edited; a part without a pixel has no metrics.
          prompt: what the edited image should show; None: no CLIP score.

        Raises:
          ValueError: as `psnr`; sides too small for SSIM or LPIPS.
        """
        image, reference = _checked(_unit(image), _unit(reference), mask)
        found = parts(mask, image.shape[:2])
        masks = np.stack(list(found.values()))
        pair = [np.broadcast_to(pixels, (len(masks), *pixels.shape)) for pixels in (image, reference)]
        values = {
            "psnr": image_metrics.psnr(*pair, mask=masks, cap=None),
            "mse": image_metrics.mse(*pair, mask=masks),
            "ssim": image_metrics.ssim(*pair, mask=masks, border="reflect"),
        }
        if self._lpips is not None:
            values["lpips"] = self._lpips(*(2 * pixels * masks[..., None] - 1 for pixels in pair))
        result = {
            name + suffix: float(value) for name, row in values.items() for suffix, value in zip(found, np.asarray(row))
        }
        if self._structure is not None:
            result["structure"] = self._structure(image, reference)
        if self._clip is not None and prompt is not None:
            shown = {suffix: part for suffix, part in found.items() if suffix != "_background"}
            scores = self._clip([to_uint8(image) * part[..., None] for part in shown.values()], prompt)
            result |= {f"clip{suffix}": score for suffix, score in zip(shown, scores)}
        return result


def _unit(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels


def _clip_scorer(directory: str | os.PathLike[str]) -> Callable[[list[np.ndarray], str], list[float]]:
    """From uint8 images and a prompt to 100 times the cosine of each (Hessel et al. 2021, arXiv:2104.08718)."""
    model, params = load_clip(directory)
    tokenizer = PromptTokenizer.from_folder(directory, length=model.text.max_position_embeddings)
    run = jax.jit(lambda params, pixels, ids: 100 * model.apply({"params": params}, pixels, ids))

    def score(images: list[np.ndarray], prompt: str) -> list[float]:
        pixels = [preprocess_image(image, size=model.vision.image_size) for image in images]
        ids = tokenizer.padded(tokenizer.ids(prompt))[None]
        # One image a call: the towers are compiled once, whatever the number of parts.
        return [float(run(params, each[None], ids)[0]) for each in pixels]

    return score


def kind_of(name: str) -> Kind:
    """How a metric of `MetricSet` is shown, whatever part or reference it is of."""
    return KINDS[name.split("_", 1)[0]]


def label_of(name: str) -> str:
    """A metric's name for a reader: "LPIPS x1e3, background"."""
    first, _, rest = name.partition("_")
    return KINDS[first].label + (f", {rest.replace('_', ' ')}" if rest else "")
