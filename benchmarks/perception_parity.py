"""Networks that judge images, beside torch: LPIPS with each backbone, a ViT's tokens and keys, CLIP's features.

Called by `benchmarks.parity`. LPIPS' peer is written here from the paper and torchvision's layer lists, with weights
that a counter gives (a file of them would be 70 MB); ViT and CLIP are tiny random models of transformers.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("lpips", "vit", "clip")
BOUND = 1e-4
"""float32; tokens and features of order 1, LPIPS relative to the distance."""

SIZES = {"alex": (2, 64, 71), "vgg": (2, 33, 48), "squeeze": (2, 62, 65)}
"""Batch, height and width of LPIPS' images; odd ones, so that windows reach over edges."""


def counted(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers in [-1, 1) that are the same everywhere: splitmix64 of a counter."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64) + np.uint64(seed << 40)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def lpips_images(net: str) -> tuple[np.ndarray, np.ndarray]:
    """Two images and two versions of them, in [-1, 1]: noise, and more or less other noise."""
    images, noise = (counted((*SIZES[net], 3), seed) for seed in (1, 2))
    return images, (images + np.array([0.2, 1.0], np.float32)[:, None, None, None] * noise) / 2


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """Two crops of scikit-image's photograph of an astronaut, and the same blurred and darkened, in [-1, 1]."""
    from skimage import data

    photo = data.astronaut().astype(np.float32) / 127.5 - 1
    first, second = photo[40:136, 170:266], photo[300:396, 60:156]
    blurred = sum(np.roll(first, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9
    return np.stack([first, second]), np.stack([blurred, 0.7 * second - 0.3])


_ALEX = [("conv", 0, 3, 64, 11, 4, 2), "tap", ("pool", 3), ("conv", 3, 64, 192, 5, 1, 2), "tap", ("pool", 3),
         ("conv", 6, 192, 384, 3, 1, 1), "tap", ("conv", 8, 384, 256, 3, 1, 1), "tap",
         ("conv", 10, 256, 256, 3, 1, 1), "tap"]  # fmt: skip
_SQUEEZE = [("conv", 0, 3, 64, 3, 2, 0), "tap", ("pool", 3), ("fire", 3, 64, 16, 64), ("fire", 4, 128, 16, 64), "tap",
            ("pool", 3), ("fire", 6, 128, 32, 128), ("fire", 7, 256, 32, 128), "tap", ("pool", 3),
            ("fire", 9, 256, 48, 192), "tap", ("fire", 10, 384, 48, 192), "tap", ("fire", 11, 384, 64, 256), "tap",
            ("fire", 12, 512, 64, 256), "tap"]  # fmt: skip


def _vgg() -> list[Any]:
    layers: list[Any] = []
    index, width = 0, 3
    for features, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if index:
            layers.append(("pool", 2))
            index += 1
        for _ in range(count):
            layers.append(("conv", index, width, features, 3, 1, 1))
            index, width = index + 2, features
        layers.append("tap")
    return layers


LAYERS = {"alex": _ALEX, "vgg": _vgg(), "squeeze": _SQUEEZE}
"""Torchvision's layers by their place in `features`; "tap": a compared feature map."""


def lpips_state(net: str) -> dict[str, np.ndarray]:
    """Weights with the names of the torch package's `state_dict`."""
    state, tap, width = {}, 0, 0

    def put(name: str, out: int, inputs: int, kernel: int) -> None:
        scale = (6 / (inputs * kernel * kernel)) ** 0.5
        state[f"{name}.weight"] = scale * counted((out, inputs, kernel, kernel), len(state))
        state[f"{name}.bias"] = 0.1 * counted((out,), len(state))

    for layer in LAYERS[net]:
        if layer == "tap":
            state[f"lin{tap}.model.1.weight"] = np.abs(counted((1, width, 1, 1), len(state)))
            state[f"lins.{tap}.model.1.weight"] = state[f"lin{tap}.model.1.weight"]
            tap += 1
        elif layer[0] == "conv":
            _, index, inputs, width, kernel, *_ = layer
            put(f"net.slice{tap + 1}.{index}", width, inputs, kernel)
        elif layer[0] == "fire":
            _, index, inputs, squeezed, expanded = layer
            prefix, width = f"net.slice{tap + 1}.{index}", 2 * expanded
            put(f"{prefix}.squeeze", squeezed, inputs, 1)
            put(f"{prefix}.expand1x1", expanded, squeezed, 1)
            put(f"{prefix}.expand3x3", expanded, squeezed, 3)
    state["scaling_layer.shift"] = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1)
    state["scaling_layer.scale"] = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1)
    return state


def torch_lpips(net: str, state: dict[str, np.ndarray], images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Distances `[B]` by torch, from the definition."""
    import torch
    from torch.nn import functional

    weights = {name: torch.tensor(value) for name, value in state.items()}

    def convolved(x, name, stride=1, padding=0):
        return functional.relu(
            functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)
        )

    def features(batch):
        x = torch.from_numpy(batch).permute(0, 3, 1, 2)
        x = (x - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        maps: list[Any] = []
        for layer in LAYERS[net]:
            if layer == "tap":
                maps.append(x)
                continue
            kind, index, *sizes = layer
            name = f"net.slice{len(maps) + 1}.{index}"
            if kind == "pool":
                x = functional.max_pool2d(x, index, 2, ceil_mode=net == "squeeze")
            elif kind == "conv":
                x = convolved(x, name, *sizes[3:])
            else:
                x = convolved(x, f"{name}.squeeze")
                x = torch.cat([convolved(x, f"{name}.expand1x1"), convolved(x, f"{name}.expand3x3", padding=1)], 1)
        return maps

    total = torch.zeros(len(images))
    with torch.no_grad():
        for place, (a, b) in enumerate(zip(features(images), features(references))):
            a, b = (part / (part.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for part in (a, b))
            total += functional.conv2d((a - b) ** 2, weights[f"lin{place}.model.1.weight"]).mean((1, 2, 3))
    return total.numpy()


def our_lpips(net: str, folder: Path, state: dict[str, np.ndarray] | None) -> np.ndarray:
    """The same by jaxlab: of a file, or without weights of the installed package on the photographs."""
    import jax
    from safetensors.numpy import save_file

    from jaxlab.models.lpips import load_lpips

    path = None
    if state is not None:
        path = folder / f"{net}.safetensors"
        save_file(state, path)
    model, params = load_lpips(net, path)
    pair = photographs() if state is None else lpips_images(net)
    # Run once: compiling quickly is all that matters.
    run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    return np.asarray(run({"params": params}, *pair))


def packaged_state(net: str) -> dict[str, np.ndarray]:
    """The installed package's weights under torch's names."""
    from jaxlab.models import load
    from jaxlab.models.lpips import load_lpips

    flat = {name: np.asarray(value) for name, value in load.flatten(load_lpips(net)[1]).items()}
    state = {name: value for name, value in lpips_state(net).items() if name.startswith("scaling_layer")}
    tap = 0
    for layer in LAYERS[net]:
        if layer == "tap":
            state[f"lin{tap}.model.1.weight"] = flat[f"lin_{tap}"].reshape(1, -1, 1, 1)
            tap += 1
        elif layer[0] == "conv":
            name = f"net.slice{tap + 1}.{layer[1]}"
            state[f"{name}.weight"] = flat[f"conv_{layer[1]}/kernel"].transpose(3, 2, 0, 1)
            state[f"{name}.bias"] = flat[f"conv_{layer[1]}/bias"]
    return state


def _randomised(model: Any) -> None:
    """Random weights, exact in float16."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1 and "embedding" not in name and "cls" not in name
            value = noise * parameter[0].numel() ** -0.5 if matrix else 0.5 * noise
            if parameter.ndim == 1 and name.endswith("weight"):
                value = 1 + 0.2 * noise
            parameter.copy_(value.half().float())


VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
       "patch_size": 8}  # fmt: skip


def vit_pixels() -> np.ndarray:
    """Two images, as a network takes them."""
    return 2 * counted((2, 32, 32, 3), 3)


def torch_vit() -> dict[str, Any]:
    """Stored configuration and weights, and what torch makes of `vit_pixels`: tokens, and keys of the last block."""
    import torch
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(**VIT)).eval()
    _randomised(model)
    found: list[Any] = []
    model.layers[-1].attention.k_proj.register_forward_hook(lambda module, given, out: found.append(out))
    with torch.no_grad():
        tokens = model(torch.from_numpy(vit_pixels()).permute(0, 3, 1, 2)).last_hidden_state
    return {**_stored(model), "tokens": tokens.numpy(), "keys": found[0].numpy()}


def our_vit(folder: Path) -> dict[str, np.ndarray]:
    """The same by jaxlab."""
    import jax

    from jaxlab.models.vit import load_vit

    model, params = load_vit(folder)
    run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    features = run({"params": params}, vit_pixels())
    return {"tokens": np.asarray(features.tokens), "keys": np.asarray(features.keys).reshape(2, 17, -1)}


WORDS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30,
         "max_position_embeddings": 9, "bos_token_id": 28, "eos_token_id": 29, "pad_token_id": 29}  # fmt: skip


def clip_ids() -> np.ndarray:
    """Two prompts, the second one long; end tokens pad."""
    return np.array([[28, 3, 17, 29, 29, 29, 29, 29, 29], [28, 5, 6, 7, 8, 9, 10, 11, 29]], np.int32)


def torch_clip() -> dict[str, Any]:
    """What a whole CLIP stores, torch's vectors of `vit_pixels` and `clip_ids`, and their cosines."""
    import torch
    import transformers

    config = transformers.CLIPConfig(text_config=WORDS, vision_config=VIT, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    _randomised(model)
    with torch.no_grad():
        pixels = torch.from_numpy(vit_pixels()).permute(0, 3, 1, 2)
        made = model(input_ids=torch.from_numpy(clip_ids()).long(), pixel_values=pixels)
    images, texts = made.image_embeds.numpy(), made.text_embeds.numpy()
    return {**_stored(model), "images": images, "texts": texts, "cosines": np.sum(images * texts, axis=-1)}


def our_clip(folder: Path) -> dict[str, np.ndarray]:
    """The same by jaxlab."""
    import functools

    import jax

    from jaxlab.models.clip import load_clip

    model, params = load_clip(folder)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, pixels, ids):
        variables = {"params": params}
        images = model.apply(variables, pixels, method="encode_images")
        texts = model.apply(variables, ids, method="encode_texts")
        return {"images": images, "texts": texts, "cosines": model.apply(variables, pixels, ids)}

    return {name: np.asarray(value) for name, value in run(params, vit_pixels(), clip_ids()).items()}


def _stored(model: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        return {"config": json.loads((Path(folder) / "config.json").read_text()), "weights": weights}


def folder_of(folder: Path, made: dict[str, Any]) -> Path:
    """A Hugging Face folder of what a torch pass stored."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["config"]))
    weights = {name: np.ascontiguousarray(value, np.float32) for name, value in made["weights"].items()}
    save_file(weights, str(folder / "model.safetensors"))
    return folder


def difference(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each array of ours."""
    return {name: float(np.abs(value - theirs[name]).max()) for name, value in ours.items()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference as a fraction of the value."""
    return float(np.max(np.abs(ours - theirs) / theirs))


TOWERS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Path], dict[str, np.ndarray]]]] = {
    "vit": (torch_vit, our_vit),
    "clip": (torch_clip, our_clip),
}
"""A torch pass, and ours on the folder of what it stored."""


def rows(name: str) -> Iterator[tuple[str, float]]:
    """What was compared, and the difference."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "lpips":
            for net in LAYERS:
                state = lpips_state(net)
                theirs = torch_lpips(net, state, *lpips_images(net))
                yield f"{net}, relative", relative(our_lpips(net, Path(folder), state), theirs)
            for net in ("alex", "vgg"):
                theirs = torch_lpips(net, packaged_state(net), *photographs())
                yield f"{net}, published weights, relative", relative(our_lpips(net, Path(folder), None), theirs)
            return
        theirs_pass, ours_pass = TOWERS[name]
        made = theirs_pass()
        yield from difference(ours_pass(folder_of(Path(folder), made)), made).items()


def content(name: str) -> dict[str, Any]:
    """What a golden file holds."""
    if name == "lpips":
        made = {net: torch_lpips(net, lpips_state(net), *lpips_images(net)) for net in LAYERS}
        for net in ("alex", "vgg"):
            made[f"{net}-published"] = torch_lpips(net, packaged_state(net), *photographs())
        return made
    made = TOWERS[name][0]()
    arrays = {key: value for key, value in made.items() if key not in ("config", "weights")}
    arrays["config"] = np.array(json.dumps(made["config"]))
    return arrays | {f"weights/{key}": value.astype(np.float16) for key, value in made["weights"].items()}
