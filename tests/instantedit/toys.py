"""Networks of a few matrices, called like the real ones, whose formula the oracle has in NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn

from jaxlab.instantedit import InstantEditPipeline, PeRFlowSchedule
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.tokens import PromptTokenizer
from jaxlab.models.tokenizer import FastTokenizer

CHANNELS, WIDTH, WORDS, LAYERS = 4, 6, 77, 2


def weights(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of both networks, float64."""
    rng = np.random.default_rng(seed)

    def normal(*shape, size=1.0):
        return rng.normal(size=shape) * size / np.sqrt(shape[-2] if len(shape) > 1 else 1)

    unet = {
        "mix": normal(CHANNELS, CHANNELS, size=0.5),
        "time": normal(CHANNELS, size=0.3),
        "query": normal(LAYERS, CHANNELS, WIDTH),
        "key": normal(LAYERS, WIDTH, WIDTH),
        "value": normal(LAYERS, WIDTH, CHANNELS, size=0.7),
    }
    controlnet = {
        "hint": normal(3, CHANNELS),
        "mix": normal(CHANNELS, CHANNELS, size=0.5),
        "time": normal(CHANNELS, size=0.5),
        "text": normal(WIDTH, CHANNELS),
    }
    return {"unet": unet, "controlnet": controlnet}


class _Toy(nn.Module):
    """Parameters by name; the shapes are those of `weights`."""

    def weight(self, name: str, kind: str):
        return self.param(name, lambda _: jnp.asarray(weights()[kind][name], jnp.float32))


class ToyUNet(_Toy):
    """eps of a sample: linear in z, time and residuals, and what its 4 x 4 patches attend to."""

    @nn.compact
    def text_keys_values(self, text):
        key, value = self.weight("key", "unet"), self.weight("value", "unet")
        return tuple((text @ key[layer], text @ value[layer]) for layer in range(LAYERS))

    @nn.compact
    def __call__(self, z, time, text, down_residuals=None, mid_residual=None, *, capture=None):
        batch, height, width, channels = z.shape
        patches = z.reshape(batch, height // 4, 4, width // 4, 4, channels).mean((2, 4)).reshape(batch, -1, channels)
        query = self.weight("query", "unet")
        eps = z @ self.weight("mix", "unet") + (time / 1000)[:, None, None, None] * self.weight("time", "unet")
        maps = []
        for layer, (key, value) in enumerate(text):
            maps.append(jax.nn.softmax((patches @ query[layer]) @ jnp.swapaxes(key, 1, 2), axis=-1))
            out = (maps[-1] @ value).reshape(batch, height // 4, width // 4, channels)
            eps += jnp.repeat(jnp.repeat(out, 4, axis=1), 4, axis=2)
        for residual in down_residuals or ():
            eps += residual
        if mid_residual is not None:
            eps += mid_residual
        if capture is None:
            return eps
        if capture != patches.shape[1]:
            raise ValueError(f"capture: no layer has {capture} places")
        return eps, jnp.stack(maps)


class ToyControlNet(_Toy):
    """Two residuals, linear in z, time, text and pixels."""

    def text_keys_values(self, text):
        return text

    @nn.compact
    def hint_features(self, hint):
        batch, height, width, _ = hint.shape
        pooled = hint.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4))
        return pooled @ self.weight("hint", "controlnet")

    @nn.compact
    def __call__(self, z, time, text, hint, scale, *, hint_features=None):
        residual = hint_features + z @ self.weight("mix", "controlnet")
        residual += (time / 1000)[:, None, None, None] * self.weight("time", "controlnet")
        residual += (text.mean(1) @ self.weight("text", "controlnet"))[:, None, None]
        return (scale * residual,), scale * residual.mean((1, 2), keepdims=True)


class _Sides(NamedTuple):
    factor: int = 8


class ToyVAE(nn.Module):
    """Latents are the colours of 8 x 8 pixels and their mean."""

    config: _Sides = _Sides()

    def encode(self, image):
        batch, height, width, _ = image.shape
        mean = image.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4))
        mean = jnp.concatenate([mean, mean.mean(-1, keepdims=True)], axis=-1) * 5
        return mean, jnp.full(mean.shape, -4.0)

    def decode(self, z):
        return jnp.repeat(jnp.repeat(z[..., :3] / 5, 8, axis=1), 8, axis=2)


class ToyText(nn.Module):
    """A vector for each token and place."""

    def __call__(self, ids):
        place = jnp.arange(ids.shape[1])
        return jnp.sin(ids[..., None] * jnp.arange(1.0, WIDTH + 1)) + 0.1 * jnp.cos(place[:, None] * 0.7)


def tokenizer() -> PromptTokenizer:
    """A token a word."""
    words = ["<|startoftext|>", "<|endoftext|>", *["a", "photo", "of", "cat", "dog", "red", "hat", "on", "the", "big"]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PromptTokenizer(FastTokenizer(backend, {"bos_token": words[0], "eos_token": words[1]}))


def pipeline(seed: int = 0) -> InstantEditPipeline:
    """Images of multiples of 32 pixels, with every network."""
    whole = network(PeRFlowSchedule(), seed)
    params = {**whole.params, "vae": {}, "text_encoder": {}}
    return InstantEditPipeline(whole.replace(params=params, vae=ToyVAE(), text_encoder=ToyText()), tokenizer())


def network(schedule, seed: int = 0, *, control: bool = True) -> EditorNetwork:
    """UNet and ControlNet with the weights of a seed; latents `[h, w, 4]`, edges `[8 h, 8 w]`, states `[77, 6]`."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights(seed))
    return EditorNetwork(
        params=params, unet=ToyUNet(), schedule=schedule, controlnet=ToyControlNet() if control else None
    )
