"""Qwen2.5-VL beside torch transformers: positions, logits and a greedy continuation of a tiny random model.

Called by `benchmarks.parity`. The batch has a left-padded row, two images in a row, one of them rectangular with ragged
windows, and windowed beside full-attention blocks.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

NAME = "qwen2.5-vl"
BOUND = 2e-4  # float32, logits of order 1
NEW = 12
IMAGE, START, END = 50, 48, 49
GRID = np.array([[1, 12, 8], [1, 4, 6], [1, 6, 10]])
SETTINGS = {
    "text_config": {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": IMAGE,
    "video_token_id": 51,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def inputs() -> dict[str, np.ndarray]:
    """Two rows: text, an image, text, a second image, text; and padding, text, an image."""
    rng = np.random.default_rng(2)

    def image(index: int) -> list[int]:
        return [START, *[IMAGE] * int(GRID[index].prod() // 4), END]

    def words(count: int) -> list[int]:
        return rng.integers(1, 48, count).tolist()

    rows = [words(3) + image(0) + words(2) + image(1) + words(4), words(2) + image(2) + words(3)]
    longest = max(map(len, rows))
    ids = np.zeros((2, longest), np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = tokens, 1
    pixels = rng.normal(size=(int(GRID.prod(axis=1).sum()), 1176)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": GRID}


def _given() -> dict[str, Any]:
    """`inputs` as transformers takes them."""
    import torch

    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    given = {name: value.long() if name != "pixel_values" else value for name, value in given.items()}
    return given | {"mm_token_type_ids": (given["input_ids"] == IMAGE).int()}


def torch_pass() -> dict[str, Any]:
    """Stored configuration and weights (exact in float16), and what torch makes of `inputs`."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    config = transformers.Qwen2_5_VLConfig(**SETTINGS)
    config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            value = 1 + 0.2 * noise if parameter.ndim == 1 else noise * fan_in**-0.5 * 1.2
            parameter.copy_(value.half().float())
    given = _given()
    placed = {name: value for name, value in given.items() if name != "pixel_values"}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        stored = json.loads((Path(folder) / "config.json").read_text())
        positions, _ = model.model.get_rope_index(**placed)
        logits = model(**given).logits
        made = model.generate(**given, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    return {
        "config": stored,
        "weights": weights,
        "positions": positions.numpy(),
        "logits": logits.numpy(),
        "continuation": made[:, -NEW:].numpy(),
    }


def folder_of(folder: Path, made: dict[str, Any]) -> Path:
    """A Hugging Face folder of what `torch_pass` stored."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["config"]))
    weights = {name: np.ascontiguousarray(value, np.float32) for name, value in made["weights"].items()}
    save_file(weights, str(folder / "model.safetensors"))
    return folder


def our_pass(folder: Path) -> dict[str, np.ndarray]:
    """The same by jaxlab, the continuation with a cache."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxlab.models.decoder import KVCache
    from jaxlab.models.qwen2_5_vl import load, mrope_index

    model, params = load(folder)
    given = inputs()
    pixels, grid = given.pop("pixel_values"), given.pop("image_grid_thw")
    positions, _ = mrope_index(given["input_ids"], grid, given["attention_mask"], config=model.config)

    # Tiny programs, run once: compiling them quickly is all that matters.
    fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

    @fast
    def prompt(params, input_ids, attention_mask, pixels, cache=None):
        return model.apply(
            {"params": params}, input_ids, attention_mask, pixel_values=pixels, image_grid_thw=grid, cache=cache
        )

    @fast
    def step(params, ids, cache):
        return model.apply({"params": params}, ids[:, None], cache=cache)

    logits, _ = prompt(params, *given.values(), pixels)
    last, cache = prompt(params, *given.values(), pixels, KVCache.create(model.config.text, len(positions[0]), 64))
    made = []
    for _ in range(NEW):
        ids = jnp.argmax(last[:, -1], axis=-1).astype(jnp.int32)
        made.append(np.asarray(ids))
        last, cache = step(params, ids, cache)
    return {"positions": positions, "logits": np.asarray(logits), "continuation": np.stack(made, axis=1)}


def differences(made: dict[str, Any], folder: Path) -> dict[str, float]:
    """Largest differences where a token is, ours beside torch's."""
    ours = our_pass(folder_of(folder, made))
    valid = inputs()["attention_mask"] != 0
    return {
        "positions": float(np.abs(ours["positions"] - made["positions"])[:, valid].max()),
        "logits": float(np.abs(ours["logits"] - made["logits"])[valid].max()),
        "continuation, tokens that differ": float(np.sum(ours["continuation"] != made["continuation"])),
    }


def saved_difference(made: dict[str, Any], folder: Path) -> float:
    """Largest difference of torch's logits when it reads what jaxlab saved."""
    import torch
    import transformers

    from jaxlab.models.qwen2_5_vl import load, save

    save(folder / "out", *load(folder_of(folder / "in", made)))
    peer = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "out").eval()
    with torch.no_grad():
        logits = peer(**_given()).logits.numpy()
    return float(np.abs(logits - made["logits"])[inputs()["attention_mask"] != 0].max())


def content(made: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a golden file holds: `torch_pass`, its weights in float16, which hold them exactly."""
    arrays = {name: made[name] for name in ("positions", "logits", "continuation")}
    arrays["config"] = np.array(json.dumps(made["config"]))
    return arrays | {f"weights/{name}": value.astype(np.float16) for name, value in made["weights"].items()}
