"""A whole edit beside the official loop in torch at the same weights, and a further edit of an image beside the first.

The bars are those of the specification, section 7. Sizes are ours: the layout of Stable Diffusion 1.5 at reduced width,
a picture of 128 x 128.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import instantedit_parity as parity
from benchmarks.harness import Case, interleaved

SYSTEM = "instantedit"
SIDE = 128
UNET = {
    "sample_size": SIDE // 8,
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 1,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
VAE = parity.VAE | {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
    "sample_size": SIDE,
}
TEXT = parity.TEXT | {"hidden_size": UNET["cross_attention_dim"]}
HINT = (16, 32, 96, 256)


def cases(quick: bool) -> Iterator[Case]:
    """Bytes of attention maps always; beside torch where diffusers is installed, which makes the weights."""
    yield attention_maps()
    if importlib.util.find_spec("diffusers") is not None:
        with tempfile.TemporaryDirectory() as folder:
            if quick:
                yield from beside_torch(Path(folder), parity.SIDE, parity.UNET, parity.HINT, parity.VAE, parity.TEXT, 3)
            else:
                yield from beside_torch(Path(folder), SIDE, UNET, HINT, VAE, TEXT, 5)


def attention_maps() -> Case:
    """What is kept of attention at 512 x 512 by Stable Diffusion 1.5's shapes; the peer is all heads of all samples."""
    import jax

    from jaxlab.instantedit import compiled
    from jaxlab.instantedit.edit import edited, source_branch

    steps, heads, branches = 4, 8, 4
    network, shapes = compiled.abstract_network(), compiled.shapes(compiled.PlanConfig(num_steps=steps))
    source = jax.eval_shape(source_branch, network, *shapes["source"])
    result = jax.eval_shape(edited, network, *shapes["edit"])
    one = 4 * source.maps.size  # float32
    kept = one * (steps + 1) + one + 4 * result.attention.size  # of the source's batch; the target's; both together
    whole = heads * branches * steps * one
    return Case(SYSTEM, "attention maps, 512 x 512, N = 4", "bytes", kept, whole, "all heads, samples, steps", 10.0)


def beside_torch(folder: Path, side: int, unet: Any, hint: Any, vae: Any, text: Any, repeats: int) -> Iterator[Case]:
    """Picture to picture: 19 of the official loop's 24 samples, or 10 of 19 the second time."""
    from jaxlab.instantedit import InstantEditPipeline

    networks = parity.networks(unet, hint, vae, text)
    configs, weights = parity.stored(networks)
    pipeline = InstantEditPipeline.from_pretrained(parity.folder_of(folder, configs, weights))
    pixels = np.kron(parity.picture(), np.ones((side // parity.SIDE, side // parity.SIDE, 1), np.uint8))
    prompts = {"blend_word": parity.WORD, "dpg": parity.KNOBS["dpg"], "compat": "official"}

    def edit(given: Any) -> Any:
        return pipeline.edit(given, parity.SOURCE, parity.TARGET, **prompts).image

    label = f"{side} x {side}, UNet of {unet['block_out_channels'][0]} channels, N = 4"
    official = parity.official(networks)
    mine, other = interleaved(lambda: edit(pixels), lambda: official(pixels), repeats=repeats)
    yield Case(SYSTEM, f"whole edit, {label}", "s", mine, other, "official loop in torch", 1 / 0.85)
    inversion = pipeline.invert(pixels, mode="official")
    mine, other = interleaved(lambda: edit(inversion), lambda: edit(pixels), repeats=repeats)
    yield Case(SYSTEM, f"second edit, {label}", "s", mine, other, "the first", 1 / 0.7)
