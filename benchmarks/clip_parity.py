"""CLIP's text encoder beside torch transformers: the states of padded prompts, a tiny random model.

Called by `benchmarks.parity`.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("clip-text", "clip-text-gelu")
BOUND = 1e-4  # float32, states of order 1
SETTINGS = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}


def inputs() -> np.ndarray:
    """Two prompts of different length, padded with the end token."""
    rng = np.random.default_rng(3)
    ids = np.full((2, SETTINGS["max_position_embeddings"]), SETTINGS["eos_token_id"], np.int32)
    for row, words in zip(ids, (5, 40)):
        row[: words + 1] = [SETTINGS["bos_token_id"], *rng.integers(0, 48, words)]
    return ids


def torch_pass(name: str) -> dict[str, Any]:
    """Stored configuration and weights (exact in float16), and the states that torch gives `inputs`."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    activation = "gelu" if name.endswith("-gelu") else "quick_gelu"
    config = transformers.CLIPTextConfig(**SETTINGS, hidden_act=activation)
    config._attn_implementation = "eager"
    model = transformers.CLIPTextModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = 0.3 * noise + float("norm" in path and path.endswith("weight"))
            else:
                value = noise * (1.0 if "embedding" in path else 1.2 * parameter.shape[-1] ** -0.5)
            parameter.copy_(value.half().float())
        model.save_pretrained(folder)
        stored = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(Path(folder) / "model.safetensors")
        states = model(torch.from_numpy(inputs()).long()).last_hidden_state.numpy()
    return {"config": stored, "weights": weights, "states": states}


def folder_of(folder: Path, made: dict[str, Any]) -> Path:
    """A Hugging Face folder of what `torch_pass` stored, the weights in their own dtype."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["config"]))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in made["weights"].items()}, folder / "model.safetensors"
    )
    return folder


def difference(made: dict[str, Any], folder: Path) -> float:
    """Largest difference of the states, ours beside torch's."""
    import jax

    from jaxlab.models.sd import load_text_encoder

    module, params = load_text_encoder(folder_of(folder, made))
    apply = jax.jit(module.apply, compiler_options={"xla_backend_optimization_level": 0})
    return float(np.abs(np.asarray(apply({"params": params}, inputs())) - made["states"]).max())


def rows(name: str) -> Iterator[tuple[str, float]]:
    """(what, difference) of each comparison."""
    with tempfile.TemporaryDirectory() as folder:
        yield "states", difference(torch_pass(name), Path(folder))


def content(name: str) -> dict[str, np.ndarray]:
    """What a golden file holds: `torch_pass`, its weights in float16, which hold them exactly."""
    made = torch_pass(name)
    arrays = {"config": np.array(json.dumps(made["config"])), "states": made["states"]}
    return arrays | {f"weights/{key}": value.astype(np.float16) for key, value in made["weights"].items()}
