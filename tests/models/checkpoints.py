"""Small checkpoints on disk, from the goldens."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import vlm_parity

FOLDER = Path(__file__).parent / "goldens"


def golden(name):
    """config, tokens, weights, logits and gradients of one golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        content = {"config": json.loads(str(file["config"])), "tokens": file["tokens"], "logits": file["logits"]}
        for kind in ("weights", "gradients"):
            content[kind] = {
                key.removeprefix(f"{kind}/"): file[key] for key in file.files if key.startswith(f"{kind}/")
            }
    return content


def vlm_golden():
    """What `benchmarks.vlm_parity.torch_pass` gave."""
    with np.load(FOLDER / f"{vlm_parity.NAME}.npz") as file:
        made = {name: file[name] for name in ("positions", "logits", "continuation")}
        made["config"] = json.loads(str(file["config"]))
        weights = {name: file[name] for name in file.files if name.startswith("weights/")}
    return made | {"weights": {name.removeprefix("weights/"): value for name, value in weights.items()}}


def tower_golden(name):
    """What the torch pass of `benchmarks.perception_parity.TOWERS[name]` gave."""
    with np.load(FOLDER / f"{name}.npz") as file:
        made = {key: file[key] for key in file.files if "/" not in key and key != "config"}
        weights = {key.removeprefix("weights/"): file[key] for key in file.files if key.startswith("weights/")}
        return made | {"config": json.loads(str(file["config"])), "weights": weights}


def write(folder, name="llama", change=None, dtype=np.float32):
    """A Hugging Face folder; `change(weights)` may edit the weights first."""
    made = golden(name)
    weights = {key: np.ascontiguousarray(value, dtype) for key, value in made["weights"].items()}
    if change:
        change(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["config"]))
    save_file(weights, str(folder / "model.safetensors"))
    return folder
