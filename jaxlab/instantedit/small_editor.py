"""A small editor of emoji, trained here stage by stage: what InstantEdit is run on without downloading anything.

The classes are those of Stable Diffusion at a reduced width, in pixels: a latent is a pixel in [-1, 1]. A text encoder
learns with the teacher. Three stages, each in a folder of its own: "teacher", "student" (distilled from it to four
windows) and "controlnet".

    SmallEditor(SmallEditorConfig(), "out/editor").save("out/editor/saved")  # hours on one core
    pipeline = load_editor("out/editor/saved")  # or load_editor(), which comes with the package
    pipeline.edit(picture, "man cook", "woman cook", blend_word="woman")
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt8

from jaxlab import core
from jaxlab.instantedit.config import CANNY_HIGH, CANNY_LOW, MAX_TOKENS
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.pipeline import InstantEditPipeline
from jaxlab.instantedit.scheduler import PeRFlowSchedule
from jaxlab.instantedit.tokens import PromptTokenizer
from jaxlab.instantedit.train_perflow import (
    DEFAULT_OPTIMIZER,
    Captioned,
    CaptionedBatches,
    NoiseLoss,
    PeRFlowLoss,
    StageConfig,
    train_stage,
)
from jaxlab.models.words import word_tokenizer

STAGES = ("teacher", "student", "controlnet")
PACKAGED = Path(__file__).with_name("packaged") / "editor"
"""The editor that comes with the package: a diffusers folder without a VAE, and the log of its training."""

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the networks.

    Attributes:
      channels: of the UNet at 32x32, 16x16 and 8x8 pixels; the last attends to the words, so that there are attention
        maps at a quarter of the picture.
      layers: residual blocks of each.
      heads: of all attention.
      groups: of the norms.
      text_width: of the states of the words.
      text_layers: of the text encoder.
      hint_channels: of the ControlNet's hint encoder.
    """

    channels: tuple[int, ...] = (16, 64, 96)
    layers: int = 1
    heads: int = 4
    groups: int = 8
    text_width: int = 96
    text_layers: int = 2
    hint_channels: int = 16

    def unet(self) -> Any:
        """The UNet."""
        from jaxlab.models.sd import UNet2DCondition, UNetConfig

        plain = len(self.channels) - 1
        up = ("CrossAttnUpBlock2D", *("UpBlock2D",) * plain)
        return UNet2DCondition(UNetConfig(**self._encoder(), out_channels=3, up_block_types=up, sample_size=32))

    def controlnet(self) -> Any:
        """The ControlNet."""
        from jaxlab.models.sd import ControlNet, ControlNetConfig

        return ControlNet(
            ControlNetConfig(**self._encoder(), conditioning_embedding_out_channels=(self.hint_channels,))
        )

    def text_encoder(self, vocab_size: int) -> Any:
        """The text encoder over so many words."""
        from jaxlab.models.sd.clip_text import CLIPTextConfig, CLIPTextEncoder

        return CLIPTextEncoder(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=self.text_width,
                intermediate_size=2 * self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=self.heads,
                max_position_embeddings=MAX_TOKENS,
            )
        )

    def _encoder(self) -> dict[str, Any]:
        plain = len(self.channels) - 1
        return {
            "in_channels": 3,
            "block_out_channels": self.channels,
            "down_block_types": (*("DownBlock2D",) * plain, "CrossAttnDownBlock2D"),
            "layers_per_block": self.layers,
            "attention_head_dim": self.heads,
            "cross_attention_dim": self.text_width,
            "norm_num_groups": self.groups,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallEditorConfig:
    """A small editor and its training; every default is ours.

    Attributes:
      sizes: of the networks.
      held_out: of `emoji.load`.
      shares: of the kinds of pictures in a batch, see `emoji.Emoji.weights`.
      teacher: its training.
      student: its training.
      controlnet: its training.
      dropout: share of prompts left out.
      solver_steps: of the teacher in a window.
      seed: of parameters and split.
    """

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    held_out: int | float = 0.28
    shares: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"people": 0.8, "colour": 0.06, "rest": 0.14}
    )
    teacher: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(steps=6000))
    student: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(
            steps=1500, optimizer=dataclasses.replace(DEFAULT_OPTIMIZER, learning_rate=4e-4)
        )
    )
    controlnet: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(steps=1200))
    dropout: int | float = 0.1
    solver_steps: int = 4
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a value in [0, 1), got {self.dropout}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps: expected at least 1, got {self.solver_steps}")


def caption_tokenizer(captions: Iterable[str]) -> PromptTokenizer:
    """Begin, words in lower case, end: every word of the captions is a token."""
    import tokenizers

    words = word_tokenizer([caption.lower() for caption in captions], special=(_BEGIN, _END))
    words.backend.normalizer = tokenizers.normalizers.Lowercase()
    words.special_tokens.update(bos_token=_BEGIN, eos_token=_END, pad_token=_END)
    return PromptTokenizer(words)


def to_latents(images: UInt8[np.ndarray, "*b h w 3"]) -> np.ndarray:
    """Pixels in [-1, 1], float32."""
    return images.astype(np.float32) / 127.5 - 1


def to_images(latents: Any) -> UInt8[np.ndarray, "*b h w 3"]:
    """The nearest pixels."""
    return np.clip(np.round((np.asarray(latents) + 1) * 127.5), 0, 255).astype(np.uint8)


def load_editor(folder: str | os.PathLike = PACKAGED, *, controlnet: bool = True) -> InstantEditPipeline:
    """The pipeline of an editor that `SmallEditor.save` wrote; by default the one that comes with the package.

    Args:
      folder: a diffusers folder without a VAE.
      controlnet: whether it follows edges.

    Raises:
      FileNotFoundError: a file that is not there.
    """
    from jaxlab.models import sd
    from jaxlab.models.sd.clip_text import load_text_encoder

    folder = Path(folder)
    loaded: dict[str, Any] = {"unet": sd.load_unet(folder / "unet")}
    loaded["text_encoder"] = load_text_encoder(folder / "text_encoder")
    if controlnet:
        loaded["controlnet"] = sd.load_controlnet(folder / "controlnet")
    network = EditorNetwork(
        params={name: params for name, (_, params) in loaded.items()},
        schedule=PeRFlowSchedule(),
        latent_scale=1.0,
        **{name: module for name, (module, _) in loaded.items()},
    )
    return InstantEditPipeline(network, PromptTokenizer.from_folder(folder / "tokenizer"))


class SmallEditor:
    """The stages of a small editor in a folder; each is trained when it is first asked for, and can be killed."""

    def __init__(self, config: SmallEditorConfig, folder: str | os.PathLike, *, font: str | os.PathLike | None = None):
        """Trains nothing yet; `font` is that of `emoji.find_font`."""
        self.config, self.folder, self._font = config, Path(folder), font
        self.unet, self.controlnet = config.sizes.unet(), config.sizes.controlnet()

    @functools.cached_property
    def emoji(self) -> Any:
        """The pictures."""
        from jaxlab.instantedit import emoji

        return emoji.load(self._font, fraction=float(self.config.held_out), seed=self.config.seed)

    @functools.cached_property
    def tokenizer(self) -> PromptTokenizer:
        """Of the captions, held-out ones too: an id for every word."""
        return caption_tokenizer(self.emoji.captions)

    @functools.cached_property
    def text_encoder(self) -> Any:
        """Of the captions."""
        return self.config.sizes.text_encoder(self.tokenizer.tokenizer.vocab_size)

    def ids(self, prompts: Iterable[str]) -> np.ndarray:
        """`[P,77]` int32."""
        return np.stack([self.tokenizer.padded(self.tokenizer.ids(prompt)) for prompt in prompts])

    def stage(self, name: str) -> PyTree:
        """Parameters of a stage of `STAGES`; trained, or trained on, where they are not there.

        The teacher's are "unet" and "text_encoder", the student's "unet", the ControlNet's "controlnet".

        Raises:
          ValueError: an unknown stage.
        """
        if name not in STAGES:
            raise ValueError(f"stage: expected one of {STAGES}, got {name!r}")
        config: StageConfig = getattr(self.config, name)
        start, loss = getattr(self, f"_{name}")()
        batches = CaptionedBatches(
            self._data(edges=name == "controlnet"),
            batch_size=config.batch_size,
            seed=config.seed,
            weights=self.emoji.weights(dict(self.config.shares)),
        )
        return train_stage(start, loss, batches, config, self.folder / name)

    def history(self, name: str) -> list[dict[str, Any]]:
        """The numbers of a stage's steps."""
        return core.jsonl.read(self.folder / name / "metrics.jsonl")

    def save(self, folder: str | os.PathLike, *, dtype: str = "float16") -> None:
        """Writes the student, the ControlNet and what reads prompts as a diffusers folder without a VAE.

        `training.json` there has the configuration, and each stage's mean loss over every 50 steps.
        """
        from jaxlab.models.sd.save_diffusers import save_network

        folder = Path(folder)
        save_network(folder / "unet", self.unet, self.stage("student")["unet"], dtype=dtype)
        save_network(folder / "controlnet", self.controlnet, self.stage("controlnet")["controlnet"], dtype=dtype)
        save_network(folder / "text_encoder", self.text_encoder, self.stage("teacher")["text_encoder"], dtype=dtype)
        (folder / "tokenizer").mkdir(exist_ok=True)
        self.tokenizer.tokenizer.save_pretrained(folder / "tokenizer")
        schedule = PeRFlowSchedule()
        told = {
            "_class_name": "PeRFlowScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": schedule.prediction_type,
            "num_time_windows": schedule.num_windows,
        }
        core.replace_file(folder / "scheduler" / "scheduler_config.json", json.dumps(told, indent=1) + "\n")
        log = {"config": core.to_dict(self.config), **{name: _thinned(self.history(name)) for name in STAGES}}
        core.replace_file(folder / "training.json", json.dumps(log) + "\n")

    def teacher_network(self, steps: int) -> EditorNetwork:
        """The teacher, and the ControlNet, for edits of so many steps, DDIM's: each has a window of its own."""
        return EditorNetwork(
            params={**self.stage("teacher"), **self.stage("controlnet")},
            unet=self.unet,
            schedule=PeRFlowSchedule(steps, "ddim_eps"),
            controlnet=self.controlnet,
            text_encoder=self.text_encoder,
            latent_scale=1.0,
        )

    def _data(self, *, edges: bool) -> Captioned:
        emoji, rows = self.emoji, list(self.emoji.train)
        latents, ids = to_latents(emoji.images[rows]), self.ids(emoji.captions[row] for row in rows)
        return Captioned(latents, ids, edges_of(emoji.images[rows]) if edges else None)

    @functools.cached_property
    def _null_ids(self) -> tuple[int, ...]:
        return tuple(int(token) for token in self.ids([""])[0])

    def _teacher(self) -> tuple[PyTree, Any]:
        key = jax.random.key(self.config.seed)
        params = {
            "unet": quiet(_init(self.unet, core.named_key(key, "unet"))),
            "text_encoder": _init_text(self.text_encoder, core.named_key(key, "text_encoder")),
        }
        return params, NoiseLoss(self.unet, self.text_encoder, self._null_ids, dropout=float(self.config.dropout))

    def _student(self) -> tuple[PyTree, Any]:
        teacher = self.stage("teacher")
        loss = PeRFlowLoss(
            self.unet,
            self.text_encoder,
            self._null_ids,
            teacher,
            solver_steps=self.config.solver_steps,
            dropout=float(self.config.dropout),
            clip=1.0,
        )
        return {"unet": teacher["unet"]}, loss

    def _controlnet(self) -> tuple[PyTree, Any]:
        teacher = self.stage("teacher")
        params = _init(self.controlnet, core.named_key(jax.random.key(self.config.seed), "controlnet"))
        params = {name: teacher["unet"].get(name, leaf) for name, leaf in params.items()}  # a copy of the encoder
        loss = NoiseLoss(
            self.unet,
            self.text_encoder,
            self._null_ids,
            dropout=float(self.config.dropout),
            controlnet=self.controlnet,
            frozen=teacher,
        )
        return {"controlnet": params}, loss


def _thinned(history: Sequence[Mapping[str, Any]], every: int = 50) -> list[dict[str, float]]:
    """Mean losses of so many steps each, under the last of them."""
    parts = [history[start : start + every] for start in range(0, len(history), every)]
    return [
        {"step": part[-1]["step"], "loss": round(float(np.mean([row["loss"] for row in part])), 5)} for part in parts
    ]


def edges_of(images: UInt8[np.ndarray, "n h w 3"]) -> np.ndarray:
    """`[N,H,W]` bool: Canny's edges at InstantEdit's thresholds."""
    from jaxlab.instantedit.edges import canny

    draw = jax.jit(lambda image: canny(image, CANNY_LOW, CANNY_HIGH))
    return np.stack([np.asarray(draw(image)) for image in images])


def quiet(params: PyTree) -> PyTree:
    """A UNet whose residual branches begin at zero, and its output too: it learns faster."""

    def silenced(path: Any, leaf: Array) -> Array:
        names = {key.key for key in path}
        return jnp.zeros_like(leaf) if names & {"conv2", "proj_out", "conv_out"} else leaf

    return jax.tree_util.tree_map_with_path(silenced, params)


def _init(module: Any, key: Array) -> PyTree:
    from jaxlab.models.sd import init_params

    return init_params(module, key)


def _init_text(module: Any, key: Array) -> PyTree:
    from flax import linen as nn

    return nn.meta.unbox(jax.jit(module.init)(key, jnp.zeros((1, 2), jnp.int32))["params"])
