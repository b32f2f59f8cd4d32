"""The networks of an editor from a diffusers folder."""

import os
from pathlib import Path
from typing import Any

from jaxlab.core.untrusted import read_object
from jaxlab.instantedit.config import NUM_WINDOWS
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import PeRFlowSchedule
from jaxlab.instantedit.tokens import PromptTokenizer

DTYPES = ("float32", "bfloat16", "float16")
_PREDICTIONS = ("epsilon", "diff_eps", "ddim_eps", None)  # of noise, in one of its senses
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def load_network(
    directory: str | os.PathLike[str],
    *,
    controlnet: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
) -> EditorNetwork:
    """Reads `unet/`, `vae/`, `text_encoder/`, `scheduler/` and `controlnet/`, strictly.

    Whatever noise prediction the scheduler's configuration names, it is read as "diff_eps" in four windows, as
    InstantEdit's code does with PeRFlow's checkpoints.

    Args:
      directory: of the checkpoint.
      controlnet: folder of the ControlNet; None: `controlnet/` of the checkpoint.
      dtype: of weights and computation; the text encoder's weights are float32.

    Raises:
      FileNotFoundError: a folder that is not there.
      ValueError: another dtype; a scheduler of v-prediction or other betas; what `jaxlab.models.sd`'s loaders raise.
      KeyError: missing or unexpected weights.
    """
    from jaxlab.models import sd

    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    directory = Path(directory)
    edges = directory / "controlnet" if controlnet is None else Path(controlnet)
    folders = {name: directory / name for name in ("unet", "vae", "text_encoder", "scheduler")}
    for name, folder in (*folders.items(), ("controlnet", edges)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: expected a folder {folder}, there is none")
    _check_scheduler(folders["scheduler"])
    policy: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    loaded = {
        "unet": sd.load_unet(folders["unet"], **policy),
        "controlnet": sd.load_controlnet(edges, **policy),
        "vae": sd.load_vae(folders["vae"], **policy),
        "text_encoder": sd.load_text_encoder(folders["text_encoder"], dtype=dtype),
    }
    return EditorNetwork(
        params={name: params for name, (_, params) in loaded.items()},
        schedule=PeRFlowSchedule(NUM_WINDOWS, "diff_eps"),
        latent_scale=loaded["vae"][0].config.scaling_factor,
        **{name: module for name, (module, _) in loaded.items()},
    )


def load_prompt_tokenizer(directory: str | os.PathLike[str]) -> PromptTokenizer:
    """Reads `tokenizer/` of a checkpoint; errors are those of `PromptTokenizer.from_folder`."""
    return PromptTokenizer.from_folder(Path(directory) / "tokenizer")


def _check_scheduler(folder: Path) -> None:
    path = folder / "scheduler_config.json"
    config = read_object(path)
    prediction = config.get("prediction_type")
    if prediction not in _PREDICTIONS:
        known = ", ".join(filter(None, _PREDICTIONS))
        raise ValueError(f"{path}: prediction_type: expected one of {known}, got {prediction!r}")
    for name, expected in _SCHEDULE.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{path}: {name}: expected {expected}, got {config[name]}")
