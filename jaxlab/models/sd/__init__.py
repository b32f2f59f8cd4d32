"""The networks of Stable Diffusion 1.x (Rombach et al., 2022, arXiv:2112.10752) and ControlNet (arXiv:2302.05543).

Flax linen modules, images and latents as `[B,h,w,C]`, read from the folders of a diffusers checkpoint; the same classes
at other widths are the small models that are trained here.

Example:
    from jaxlab.models.sd import load_unet

    unet, params = load_unet("checkpoint/unet")
    eps = unet.apply({"params": params}, latents, time, text)  # [B,h,w,4], [B], [B,77,768]
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.models.sd.autoencoder_kl import AutoencoderKL
    from jaxlab.models.sd.clip_text import CLIPTextConfig, CLIPTextEncoder, load_text_encoder
    from jaxlab.models.sd.config import ControlNetConfig, UNetConfig, VAEConfig
    from jaxlab.models.sd.controlnet import ControlNet
    from jaxlab.models.sd.load_diffusers import abstract_params, init_params, load_controlnet, load_unet, load_vae
    from jaxlab.models.sd.unet2d_condition import UNet2DCondition

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "ControlNet",
    "ControlNetConfig",
    "UNet2DCondition",
    "UNetConfig",
    "VAEConfig",
    "abstract_params",
    "init_params",
    "load_controlnet",
    "load_text_encoder",
    "load_unet",
    "load_vae",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "autoencoder_kl": ("AutoencoderKL",),
        "clip_text": ("CLIPTextConfig", "CLIPTextEncoder", "load_text_encoder"),
        "config": ("ControlNetConfig", "UNetConfig", "VAEConfig"),
        "controlnet": ("ControlNet",),
        "load_diffusers": ("abstract_params", "init_params", "load_controlnet", "load_unet", "load_vae"),
        "unet2d_condition": ("UNet2DCondition",),
    },
)
