"""The whole edit beside the official loop in torch: a tiny random diffusers checkpoint, from picture to latents.

Called by `benchmarks.parity`. Both read one folder, as users have it: UNet, ControlNet, autoencoder and text encoder by
diffusers and transformers, a tokenizer of words, a scheduler's configuration.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("instantedit",)
BOUND = 1e-3  # of latents, float32; masks may differ where attention is within 1e-4 of the threshold
SIDE, CLEAR = 64, 1e-4
SOURCE, TARGET, WORD = "a photo of a cat", "a photo of a red dog", "dog"
KNOBS = {"cfg": 1.1, "dpg": 1.0, "threshold": 0.4}
SCALE = 0.4
WORDS = ("<|startoftext|>", "<|endoftext|>", "a", "photo", "of", "cat", "red", "dog")
UNET = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
HINT = (4, 8, 8)
VAE = {
    "block_out_channels": (4, 4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": SIDE,
}
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": UNET["cross_attention_dim"],
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def picture() -> np.ndarray:
    """Bright shapes with edges, uint8."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    inside = ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.08)[..., None]
    return np.where(inside, [220, 90, 30], np.stack([60 * x, 120 * y, 200 - 90 * x], axis=-1)).astype(np.uint8)


def networks(unet: dict[str, Any] = UNET, hint: Any = HINT, vae: dict[str, Any] = VAE, text: dict[str, Any] = TEXT):
    """UNet, ControlNet, autoencoder and text encoder of torch: random, nothing zero, exact in float16."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    made = {"unet": UNet2DConditionModel(**unet)}
    made["controlnet"] = ControlNetModel.from_unet(made["unet"], conditioning_embedding_out_channels=hint)
    made["vae"] = AutoencoderKL(**vae)
    made["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in made.values():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1:
                    value = 0.1 * noise + float("norm" in name and name.endswith("weight"))
                else:
                    value = noise * (1.0 if "embedding.weight" in name else parameter[0].numel() ** -0.5)
                parameter.copy_(value.half().float())
            model.eval()
    return made


def folder_of(folder: Path, configs: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """A diffusers folder, its weights in float16, which hold them exactly."""
    from safetensors.numpy import save_file

    for name, config in configs.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config))
        own = {key.removeprefix(f"{name}/"): value for key, value in weights.items() if key.startswith(f"{name}/")}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file({key: np.ascontiguousarray(value) for key, value in own.items()}, place / f"{stem}.safetensors")
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"bos_token": WORDS[0], "eos_token": WORDS[1]}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def tokenizer() -> Any:
    """A token a word."""
    import tokenizers

    words = {word: index for index, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def ids_of(prompt: str) -> list[int]:
    """Tokens of a prompt, padded to 77 with the end token."""
    words = [0, *(WORDS.index(word) for word in prompt.split()), 1]
    return words + [1] * (77 - len(words))


def stored(networks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configurations, and weights as float16 under the names of their network and tensor."""
    configs = {name: model.config if name == "text_encoder" else model for name, model in networks.items()}
    weights = {
        f"{name}/{key}": value.numpy().astype(np.float16)
        for name, model in networks.items()
        for key, value in model.state_dict().items()
        if not key.endswith("position_ids")
    }
    return {name: json.loads(config.to_json_string()) for name, config in configs.items()}, weights


def official(networks: dict[str, Any]) -> Callable[[np.ndarray], dict[str, Any]]:
    """From a picture to everything that the official loop makes of it, the prompts encoded beforehand."""
    import cv2
    import torch

    from benchmarks.instantedit_official import OfficialEditor

    editor, vae = OfficialEditor(networks["unet"], networks["controlnet"]), networks["vae"]
    scaling = vae.config.scaling_factor
    ids = torch.tensor([ids_of(prompt) for prompt in ("", SOURCE, TARGET)])
    with torch.no_grad():
        states = networks["text_encoder"](ids).last_hidden_state.numpy()
    words = TARGET.split()
    weights = np.zeros(77, np.float32)
    weights[1 + words.index(WORD)] = 1

    def edit(pixels: np.ndarray) -> dict[str, Any]:
        edges = cv2.Canny(pixels, 100, 200) > 0
        hint = np.repeat(edges[..., None], 3, axis=-1)
        with torch.no_grad():
            image = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
            z0 = (vae.encode(image).latent_dist.mode() * scaling)[0].permute(1, 2, 0).numpy()
        trajectory = editor.invert(z0, hint, states[0], steps=4, scale=SCALE)
        result = editor.edit(trajectory, hint, states, weights, len(words) + 2, scale=SCALE, **KNOBS)
        with torch.no_grad():
            z = torch.from_numpy(result["latents"]).permute(2, 0, 1)[None] / scaling
            decoded = (vae.decode(z).sample[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
        image = np.rint(decoded * 255).astype(np.uint8)
        return {"edges": edges, "trajectory": trajectory, "image": image, **result}

    return edit


def torch_pass() -> dict[str, Any]:
    """Configurations, weights, and what the official loop makes of `picture`."""
    made = networks()
    configs, weights = stored(made)
    return {"configs": configs, "weights": weights, **official(made)(picture())}


def differences(made: dict[str, Any], folder: Path) -> dict[str, float]:
    """Ours beside torch's, from one folder."""
    from jaxlab.instantedit import InstantEditPipeline

    pipeline = InstantEditPipeline.from_pretrained(folder_of(folder, made["configs"], made["weights"]))
    inversion = pipeline.invert(picture(), control_scale=SCALE, mode="official")
    knobs = {"cfg": KNOBS["cfg"], "dpg": KNOBS["dpg"], "mask_threshold": KNOBS["threshold"], "control_scale": SCALE}
    result = pipeline.edit(inversion, SOURCE, TARGET, blend_word=WORD, compat="official", **knobs)
    clear = made["margins"] > CLEAR
    return {
        "edges, pixels that differ": float(np.mean(inversion.edges != made["edges"])),
        "trajectory": float(np.abs(inversion.trajectory - made["trajectory"]).max()),
        "masks, clear pixels that differ": float(np.mean((result.masks != made["masks"]) & clear)),
        "latents": float(np.abs(result.latents - made["latents"]).max()),
        "image, part that differs by over 1 of 255": float(
            np.mean(np.abs(result.image - made["image"].astype(int)) > 1)
        ),
    }


def rows(name: str) -> Iterator[tuple[str, float]]:
    """(what, difference) of each comparison."""
    with tempfile.TemporaryDirectory() as folder:
        yield from differences(torch_pass(), Path(folder)).items()


def content(name: str) -> dict[str, np.ndarray]:
    """What a golden file holds: all of `torch_pass`."""
    made = torch_pass()
    kept = ("edges", "trajectory", "latents", "masks", "margins", "image")
    told = {"configs": made["configs"], "shapes": {key: value.shape for key, value in made["weights"].items()}}
    flat = np.concatenate([value.ravel() for value in made["weights"].values()])
    return {"told": np.array(json.dumps(told)), "weights": flat, **{key: made[key] for key in kept}}


def read(path: Path) -> dict[str, Any]:
    """What `torch_pass` gave, from a golden file."""
    with np.load(path) as file:
        made = dict(file)
    told = json.loads(str(made.pop("told")))
    ends = np.cumsum([int(np.prod(shape)) for shape in told["shapes"].values()])
    parts = np.split(made["weights"], ends[:-1])
    weights = {name: part.reshape(shape) for (name, shape), part in zip(told["shapes"].items(), parts)}
    return {**made, "configs": told["configs"], "weights": weights}
