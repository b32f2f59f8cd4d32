"""The networks of an edit behind one seam: a prompt's noise prediction, with edges and attention maps, and latents.

Pipeline, baselines and study call these methods only. An `EditorNetwork` is a pytree: its weights are traced and its
modules are static, so a jitted function takes it as an argument.

    network = EditorNetwork(params={"unet": params}, unet=unet, schedule=PeRFlowSchedule())
    prompts = network.text(states)  # keys and values, once a prompt
    eps = network.eps(z, 750.0, prompts)

Any linen module with the calls of `jaxlab.models.sd` will do. Without a VAE latents are the pixels in [-1, 1].
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

Scalar = float | int | Num[Array | np.ndarray, ""] | np.number
Time = Scalar | Num[Array | np.ndarray, " b"]


class Text(struct.PyTreeNode):
    """Prompts as the networks read them, every leaf `[P, ...]`.

    Attributes:
      unet: keys and values of the UNet's cross-attention layers.
      controlnet: those of the ControlNet; None without one.
    """

    unet: Any
    controlnet: Any = None

    def __getitem__(self, rows: Any) -> "Text":
        return jax.tree.map(lambda leaf: leaf[rows], self)


class Control(struct.PyTreeNode):
    """Edges that a prediction follows.

    Attributes:
      features: `[b, h, w, C0]` of `EditorNetwork.hint`; b divides the batch, whose k-th sample takes row k mod b.
      scale: of the ControlNet's residuals.
      time: the ControlNet's time where it is not the UNet's.
    """

    features: Any
    scale: Any
    time: Any = None


class EditorNetwork(struct.PyTreeNode):
    """Noise prediction, and the ways from images to latents and from prompts to states.

    Attributes:
      params: "unet" and, where there is such a module, "controlnet", "vae", "text_encoder" -> its parameters.
      unet: `jaxlab.models.sd.UNet2DCondition`, or what is called like it.
      schedule: a `PeRFlowSchedule`.
      controlnet: `ControlNet` or None.
      vae: `AutoencoderKL`; None where latents are pixels.
      text_encoder: from ids `[B, S]` to states `[B, S, D]`; None where states are made elsewhere.
      latent_scale: latents over the VAE's own.
    """

    params: Mapping[str, Any]
    unet: Any = struct.field(pytree_node=False)
    schedule: Any = struct.field(pytree_node=False)
    controlnet: Any = struct.field(pytree_node=False, default=None)
    vae: Any = struct.field(pytree_node=False, default=None)
    text_encoder: Any = struct.field(pytree_node=False, default=None)
    latent_scale: float = struct.field(pytree_node=False, default=0.18215)

    def eps(
        self,
        z: Float[Array | np.ndarray, "b h w c"],
        t: Time,
        text: Text | Float[Array | np.ndarray, "b s d"],
        *,
        control: Control | None = None,
    ) -> Float[Array, "b h w c"]:
        """The network's output, float32.

        Args:
          z: latents.
          t: time, 0..1000, one for all or one each.
          text: a prompt for each sample, from `text`, or its states.
          control: edges; None: the UNet alone.

        Raises:
          ValueError: control without a ControlNet, or of a batch that does not divide z's.
        """
        return self._call("unet", *self._arguments(z, t, text, control)).astype(jnp.float32)

    def eps_and_maps(
        self,
        z: Float[Array | np.ndarray, "b h w c"],
        t: Time,
        text: Text | Float[Array | np.ndarray, "b s d"],
        *,
        control: Control | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "l b t s"]]:
        """`eps`, and the attention from image to words: probabilities, means over heads.

        Those of the layers whose queries are `[h/4, w/4]`, down and up, in the order they run: 16 x 16 for 512 pixels.

        Raises:
          ValueError: as `eps`; h or w is no multiple of 4; no layer has that many queries.
        """
        height, width = z.shape[1:3]
        if height % 4 or width % 4:
            raise ValueError(f"z: expected height and width to be multiples of 4, got {height} x {width}")
        tokens = (height // 4) * (width // 4)
        eps, maps = self._call("unet", *self._arguments(z, t, text, control), capture=tokens)
        return eps.astype(jnp.float32), maps

    def text(self, states: Float[Array | np.ndarray, "p s d"]) -> Text:
        """Keys and values of prompts' states; what a prompt needs of the networks once."""
        keys = "text_keys_values"
        controlnet = None if self.controlnet is None else self._call("controlnet", states, method=keys)
        return Text(self._call("unet", states, method=keys), controlnet)

    def hint(self, edges: Bool[Array | np.ndarray, "b height width"]) -> Float[Array, "b h w c0"]:
        """The ControlNet's features of edges; what an image needs of it once.

        Raises:
          ValueError: there is no ControlNet.
        """
        self._require("controlnet")
        hint = jnp.broadcast_to(jnp.asarray(edges, jnp.float32)[..., None], (*edges.shape, 3))
        return self._call("controlnet", hint, method="hint_features").astype(jnp.float32)

    def encode(
        self, image: Float[Array | np.ndarray, "b height width c"], rng: Array | None = None
    ) -> Float[Array, "b h w cz"]:
        """Scaled latents of images in [-1, 1]: the posterior's mode, or a draw of it."""
        if self.vae is None:
            return jnp.asarray(image, jnp.float32)
        mean, logvar = (part.astype(jnp.float32) for part in self._call("vae", image, method="encode"))
        if rng is not None:
            mean += jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
        return mean * self.latent_scale

    def decode(self, z: Float[Array | np.ndarray, "b h w cz"]) -> Float[Array, "b height width c"]:
        """Images of scaled latents, about in [-1, 1]."""
        if self.vae is None:
            return jnp.asarray(z, jnp.float32)
        return self._call("vae", z / self.latent_scale, method="decode").astype(jnp.float32)

    def states(self, ids: Int[Array | np.ndarray, "p s"]) -> Float[Array, "p s d"]:
        """The text encoder's states of tokens, float32.

        Raises:
          ValueError: there is no text encoder.
        """
        self._require("text_encoder")
        return self._call("text_encoder", jnp.asarray(ids, jnp.int32)).astype(jnp.float32)

    def _arguments(self, z: Any, t: Time, text: Any, control: Control | None) -> tuple[Any, ...]:
        """What the UNet is called with."""
        batch = z.shape[0]
        time = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (batch,))
        text = text if isinstance(text, Text) else self.text(text)
        if control is None:
            return z, time, text.unet
        self._require("controlnet")
        if batch % control.features.shape[0]:
            raise ValueError(f"control: expected a batch that divides {batch}, got {control.features.shape[0]}")
        features = jnp.tile(control.features, (batch // control.features.shape[0], 1, 1, 1))
        other = time if control.time is None else jnp.broadcast_to(jnp.asarray(control.time, jnp.float32), (batch,))
        down, middle = self._call("controlnet", z, other, text.controlnet, None, control.scale, hint_features=features)
        return z, time, text.unet, down, middle

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name).apply({"params": self.params[name]}, *args, **kwargs)

    def _require(self, name: str) -> None:
        if getattr(self, name) is None:
            raise ValueError(f"{name}: expected one in this network, there is none")
