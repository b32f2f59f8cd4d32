"""Stable Diffusion's networks beside diffusers with torch, and MaxDiffusion's Flax UNet where it is installed.

Shapes are those of Stable Diffusion 1.5 at a third or less of its width, the same random weights on both sides,
float32, the same threads; the outputs are compared before anything is timed. The bars are those of the specification,
section 7.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.models.sd import UNet2DCondition, UNetConfig, init_params, load_unet, load_vae

SYSTEM = "instantedit"
WORDS, TEXT = 77, 768
UNETS = {"64x64 latents": ((96, 192, 384, 384), 64, 1), "32x32 latents, 4 branches": ((64, 128, 256, 256), 32, 4)}
"""Label -> widths, side, batch."""
VAE, PIXELS = (32, 64, 128, 128), 256


def cases(quick: bool) -> Iterator[Case]:
    """Beside each peer that is installed; in a hurry without gradients and images."""
    repeats = 5 if quick else 9
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("diffusers") is not None:
        yield from beside_diffusers(quick, repeats)
    if importlib.util.find_spec("maxdiffusion") is not None:
        yield from beside_maxdiffusion(repeats)


def beside_diffusers(quick: bool, repeats: int) -> Iterator[Case]:
    """Forward passes of the UNet, and for information its gradients and the autoencoder."""
    import diffusers
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def forward(call: Callable[..., Any], *arrays: Any) -> Callable[[], np.ndarray]:
        given = [_torch(array) for array in arrays]

        def run() -> np.ndarray:
            with torch.inference_mode():
                return call(*given).sample.numpy()

        return run

    for label, (widths, side, batch) in UNETS.items():
        peer = diffusers.UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=TEXT).eval()
        unet, params = _loaded(load_unet, peer)
        arrays = _inputs(side, batch)
        compiled = jax.jit(lambda params, *arrays, unet=unet: unet.apply({"params": params}, *arrays))
        ours = lambda compiled=compiled, params=params, arrays=arrays: compiled(params, *arrays)  # noqa: E731
        theirs = forward(peer, *arrays)
        _check(ours(), theirs())
        mine, other = interleaved(ours, theirs, repeats=repeats)
        yield Case(SYSTEM, f"UNet forward, {label}", "ms", mine * 1e3, other * 1e3, "diffusers, torch", 1.0)
    if quick:
        return

    def backward() -> Any:
        peer.zero_grad()
        return peer(*[_torch(array) for array in arrays]).sample.square().mean().backward()

    slopes = jax.jit(jax.grad(lambda params: jnp.mean(unet.apply({"params": params}, *arrays) ** 2)))
    mine, other = interleaved(lambda: slopes(params), backward, repeats=repeats)
    yield Case(SYSTEM, f"UNet gradients, {label}", "ms", mine * 1e3, other * 1e3, "diffusers, torch")

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    peer = diffusers.AutoencoderKL(block_out_channels=VAE, layers_per_block=2, **kinds).eval()
    vae, params = _loaded(load_vae, peer)
    latents = np.random.default_rng(0).normal(size=(1, PIXELS // 8, PIXELS // 8, 4)).astype(np.float32)
    decode = jax.jit(lambda params, latents: vae.apply({"params": params}, latents, method="decode"))
    theirs = forward(peer.decode, latents)
    _check(decode(params, latents), theirs())
    mine, other = interleaved(lambda: decode(params, latents), theirs, repeats=repeats)
    yield Case(SYSTEM, f"VAE decoding, {PIXELS}x{PIXELS}", "ms", mine * 1e3, other * 1e3, "diffusers, torch")


def beside_maxdiffusion(repeats: int) -> Iterator[Case]:
    """Forward passes of the UNet; their weights are random, too, but not the same."""
    from flax import linen as nn
    from maxdiffusion.models.unet_2d_condition_flax import FlaxUNet2DConditionModel

    axes = ("data", "fsdp", "context", "tensor")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)
    for label, (widths, side, batch) in UNETS.items():
        unet = UNet2DCondition(UNetConfig(block_out_channels=widths))
        arrays = latents, time, text = _inputs(side, batch)
        params = init_params(unet, jax.random.key(0))
        compiled = jax.jit(lambda params, *arrays, unet=unet: unet.apply({"params": params}, *arrays))
        peer = FlaxUNet2DConditionModel(
            sample_size=side,
            block_out_channels=widths,
            cross_attention_dim=TEXT,
            attention_head_dim=8,
            attention_kernel="dot_product",
            mesh=mesh,
        )
        given = jnp.asarray(np.moveaxis(latents, -1, 1)), jnp.asarray(time, jnp.int32), jnp.asarray(text)
        with mesh, nn.logical_axis_rules([]):
            theirs = nn.meta.unbox(jax.jit(peer.init)({"params": jax.random.key(0)}, *given)["params"])
            other = jax.jit(lambda params, *arrays, peer=peer: peer.apply({"params": params}, *arrays).sample)
            other = other.lower(theirs, *given).compile()
        seconds = interleaved(
            lambda compiled=compiled, params=params, arrays=arrays: compiled(params, *arrays),
            lambda other=other, theirs=theirs, given=given: other(theirs, *given),
            repeats=repeats,
        )
        mine, others = (1e3 * value for value in seconds)
        yield Case(SYSTEM, f"UNet forward, {label}", "ms", mine, others, "MaxDiffusion, Flax", 1 / 1.05)


def _inputs(side: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    latents, text = rng.normal(size=(batch, side, side, 4)), rng.normal(size=(batch, WORDS, TEXT))
    return latents.astype(np.float32), np.full(batch, 500, np.float32), text.astype(np.float32)


def _loaded(load: Callable[[str], Any], peer: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return load(folder)


def _torch(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.moveaxis(array, -1, 1).copy() if array.ndim == 4 else array)


def _check(ours: jax.Array, theirs: np.ndarray) -> None:
    """Both networks are the same, or their times mean nothing."""
    np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1), atol=1e-4)
