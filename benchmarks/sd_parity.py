"""Stable Diffusion's networks beside diffusers: outputs, cross-attention maps and gradients of tiny random models.

Called by `benchmarks.parity`. Weights are drawn by name from NumPy's frozen generator, so that a golden file need not
hold them: it has the configuration, the shapes, and what torch makes of `inputs`. All weights are random, ControlNet's
connections too, which are zero in a fresh model and would hide everything behind them.
"""

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

BOUND = 1e-4  # float32, outputs of order 1
_ENCODER = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd-unet": ("UNet2DConditionModel", _ENCODER | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}),
    # Everything otherwise: three blocks, pixels, an odd size, heads and depths by block, linear maps, a plain middle.
    "sd-unet-pixels": (
        "UNet2DConditionModel",
        {
            "in_channels": 3,
            "out_channels": 5,
            "block_out_channels": [8, 24, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "mid_block_type": "UNetMidBlock2D",
            "layers_per_block": 1,
            "attention_head_dim": [1, 3, 2],
            "transformer_layers_per_block": [1, 2, 1],
            "cross_attention_dim": 12,
            "norm_num_groups": 4,
            "norm_eps": 1e-3,
            "use_linear_projection": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
    ),
    "sd-controlnet": (
        "ControlNetModel",
        _ENCODER
        | {
            "conditioning_embedding_out_channels": [4, 8, 12],
            "controlnet_conditioning_channel_order": "bgr",
        },
    ),
    "sd-vae": (
        "AutoencoderKL",
        {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
        },
    ),
}
"""Golden name -> diffusers class and its configuration."""
CAPTURE = 8 * 12
SCALE = 0.7


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random tensors: of norms about one, of maps by their inputs, of biases small."""

    def draw(name: str) -> np.ndarray:
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shapes[name])
        if noise.ndim == 1:
            noise = 0.2 * noise + (".norm" in name or "_norm" in name) * name.endswith(".weight")
        else:
            noise = noise * math.prod(shapes[name][1:]) ** -0.5
        return noise.astype(np.float32)

    return {name: draw(name) for name in shapes}


def inputs(name: str) -> dict[str, np.ndarray]:
    """What a network is given, images as `[B,h,w,C]`."""
    rng = np.random.RandomState(len(name))
    _, settings = NETWORKS[name]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    if name == "sd-vae":
        return {"image": np.tanh(normal(2, 12, 16, 3)), "latents": normal(2, 6, 8, 4)}
    size = (2, 13, 10) if name == "sd-unet-pixels" else (2, 8, 12)
    given = {
        "latents": normal(*size, settings.get("in_channels", 4)),
        "time": np.array([1000.0, 3.5], np.float32),
        "text": normal(2, 7, settings["cross_attention_dim"]),
    }
    if name == "sd-controlnet":
        return given | {"hint": rng.uniform(size=(2, 32, 48, 3)).astype(np.float32)}
    if name == "sd-unet":
        for index, (side, channels) in enumerate([*[((8, 12), 16)] * 3, *[((4, 6), 16)], *[((4, 6), 32)] * 2]):
            given[f"down{index}"] = normal(2, *side, channels)
        given["mid"] = normal(2, 4, 6, 32)
    return given


def directions(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """One direction for each tensor: a gradient is compared by its product with it."""
    return {name: np.sign(value) for name, value in weights({f"d.{key}": s for key, s in shapes.items()}).items()}


def torch_pass(name: str, folder: Path) -> dict[str, Any]:
    """What torch makes of `inputs`; the model is left in `folder` as diffusers saves it.

    Returns:
        config: stored `config.json`; shapes: of the stored tensors; outputs by name, images as `[B,h,w,C]`.
    """
    import diffusers
    import torch

    kind, settings = NETWORKS[name]
    model = getattr(diffusers, kind)(**settings).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights(shapes).items()})
    model.save_pretrained(folder)
    given = {
        key: torch.from_numpy(np.moveaxis(value, -1, 1).copy() if value.ndim == 4 else value)
        for key, value in inputs(name).items()
    }
    outputs = _TORCH[name](model, given)
    made = {"config": json.loads((folder / "config.json").read_text()), "shapes": shapes}
    return made | {
        key: (np.moveaxis(value, 1, -1) if value.ndim == 4 and key != "maps" else value)
        for key, value in ((key, value.detach().numpy()) for key, value in outputs.items())
    }


def _torch_unet(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())
    maps = {}

    def keep(layer: str, module: Any) -> None:
        scores = module.get_attention_scores

        def kept(query: Any, key: Any, mask: Any) -> Any:
            probabilities = scores(query, key, mask)
            if query.shape[1] == CAPTURE:
                maps[layer] = probabilities.unflatten(0, (-1, module.heads)).mean(1)
            return probabilities

        module.get_attention_scores = kept

    for layer, module in model.named_modules():
        if layer.endswith("attn2") and not layer.startswith("mid"):
            keep(layer, module)
    residuals = tuple(given[f"down{index}"] for index in range(6))
    out = model(
        given["latents"],
        given["time"],
        given["text"],
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=given["mid"],
    ).sample
    import torch

    return {"eps": out, "maps": torch.stack(list(maps.values()))}


def _torch_pixels(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    import torch

    out = model(given["latents"], given["time"], given["text"]).sample
    out.square().mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    signs = directions({name: list(value.shape) for name, value in gradients.items()})
    return {
        "eps": out,
        "gradients": torch.stack(
            [(gradients[name] * torch.from_numpy(signs[f"d.{name}"])).sum() for name in sorted(gradients)]
        ),
    }


def _torch_controlnet(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    arguments = (given["latents"], given["time"], given["text"], given["hint"])
    down, mid = model(*arguments, conditioning_scale=SCALE, return_dict=False)
    return {f"down{index}": value for index, value in enumerate(down)} | {"mid": mid}


def _torch_vae(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    posterior = model.encode(given["image"]).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "image": model.decode(given["latents"]).sample}


_TORCH = {
    "sd-unet": _torch_unet,
    "sd-unet-pixels": _torch_pixels,
    "sd-controlnet": _torch_controlnet,
    "sd-vae": _torch_vae,
}


def folder_of(folder: Path, made: dict[str, Any]) -> Path:
    """The folder that `torch_pass` left, from what it returned."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["config"]))
    save_file(weights(made["shapes"]), str(folder / "diffusion_pytorch_model.safetensors"))
    return folder


def our_pass(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The same by jaxlab, from the folder."""
    import jax

    from jaxlab.models import load, sd
    from jaxlab.models.sd.load_diffusers import STEM, table

    loaders = {"sd-controlnet": sd.load_controlnet, "sd-vae": sd.load_vae}
    module, params = loaders.get(name, sd.load_unet)(folder)
    given = inputs(name)

    # Tiny programs, run once: compiling them quickly is all that matters.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params: Any, given: Any) -> dict[str, Any]:
        variables = {"params": params}
        if name == "sd-vae":
            mean, logvar = module.apply(variables, given["image"], method="encode")
            return {"mean": mean, "logvar": logvar, "image": module.apply(variables, given["latents"], method="decode")}
        arguments = (given["latents"], given["time"], given["text"])
        if name == "sd-controlnet":
            down, mid = module.apply(variables, *arguments, given["hint"], SCALE)
            return {f"down{index}": value for index, value in enumerate(down)} | {"mid": mid}
        if name == "sd-unet":
            residuals = tuple(given[f"down{index}"] for index in range(6))
            eps, maps = module.apply(variables, *arguments, residuals, given["mid"], capture=CAPTURE)
            return {"eps": eps, "maps": maps}

        def loss(params: Any) -> Any:
            eps = module.apply({"params": params}, *arguments)
            return (eps**2).mean(), eps

        (_, eps), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return {"eps": eps, "gradients": gradients}

    outputs = run(params, given)
    if "gradients" in outputs:
        with load.open_tensors(folder, STEM) as tensors:
            flat, leaves = load.flatten(outputs["gradients"]), table(module, tensors)
        named = {leaf.parts[0].name: leaf.theirs(np.asarray(flat[leaf.path])) for leaf in leaves}
        signs = directions({key: list(value.shape) for key, value in named.items()})
        outputs["gradients"] = np.array([np.sum(named[key] * signs[f"d.{key}"]) for key in sorted(named)])
    return {key: np.asarray(value) for key, value in outputs.items()}


def differences(name: str, made: dict[str, Any], folder: Path) -> dict[str, float]:
    """Largest difference of each output; of gradients as a fraction of the largest."""
    ours = our_pass(name, folder)
    found = {key: float(np.max(np.abs(value - made[key]))) for key, value in ours.items()}
    if "gradients" in found:
        found["gradients, relative"] = found.pop("gradients") / float(np.max(np.abs(made["gradients"])))
    return found


def content(made: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a golden file holds."""
    return {key: np.array(json.dumps(value)) if isinstance(value, dict) else value for key, value in made.items()}


def golden(path: Path) -> dict[str, Any]:
    """The inverse of `content`."""
    with np.load(path) as file:
        return {key: json.loads(str(file[key])) if file[key].ndim == 0 else file[key] for key in file.files}
