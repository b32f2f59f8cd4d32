"""PerRFI: an image's latents carried up the piecewise flow, one network sample a step (InstantEdit, official code)."""

import dataclasses
import functools
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlab.core import replace_file
from jaxlab.core.untrusted import read_npz, understood
from jaxlab.instantedit.config import check_choice
from jaxlab.instantedit.network import Control, EditorNetwork, Scalar
from jaxlab.instantedit.scheduler import InverseMode


@dataclasses.dataclass(frozen=True, eq=False)
class Inversion:
    """An image on its way to noise: what every edit of it starts from.

    Attributes:
      trajectory: `[N + 1, h, w, C]` scaled latents, the image's own first.
      edges: bool `[H, W]`.
      hint_features: `[h, w, C0]`, the ControlNet's of the edges; None without one.
      num_steps: N.
      mode: "exact" or "official".
      control_scale: that of the inversion.

    Raises:
      ValueError: a trajectory of another length than N + 1, or another mode.
    """

    trajectory: Any
    edges: Any
    hint_features: Any
    num_steps: int
    mode: InverseMode
    control_scale: float

    def __post_init__(self):
        check_choice("mode", self.mode, InverseMode)
        shape = np.shape(self.trajectory)
        if len(shape) != 4 or shape[0] != self.num_steps + 1:
            raise ValueError(
                f"trajectory: expected [{self.num_steps + 1}, h, w, C] for {self.num_steps} steps, got {shape}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as an `.npz` file."""
        import io

        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in content.items() if value is not None})
        replace_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Inversion":
        """What `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no inversion.
        """
        arrays = read_npz(path)
        missing = {field.name for field in dataclasses.fields(cls)} - {"hint_features"} - set(arrays)
        if missing:
            raise ValueError(f"{path}: expected an inversion, it has no {', '.join(sorted(missing))}")
        with understood(path):
            return cls(
                arrays["trajectory"],
                arrays["edges"],
                arrays.get("hint_features"),
                int(arrays["num_steps"]),
                cast(InverseMode, str(arrays["mode"])),
                float(arrays["control_scale"]),
            )


def inverted(
    network: EditorNetwork,
    z0: Float[Array, "b h w c"],
    null: Float[Array, "1 s d"],
    features: Float[Array, "b h w c0"] | None,
    control_scale: Scalar,
    *,
    num_steps: int,
    mode: InverseMode,
) -> Float[Array, "n b h w c"]:
    """Latents after 0, 1, ..., N steps up, with the empty prompt.

    The UNet sees latents at the low-noise end of each step. "exact" gives both networks that end's time; "official"
    gives the UNet t - 1000/N, which is that end where W divides N, and the ControlNet t itself.

    Args:
      network: the network.
      z0: scaled latents of images.
      null: states of the empty prompt.
      features: of the images' edges; None: no ControlNet.
      control_scale: of the ControlNet.
      num_steps: N, a number of steps that `schedule.timesteps` keeps.
      mode: "exact" or "official".
    """
    up = network.schedule.timesteps(num_steps)[::-1].astype(np.float32)
    low = np.concatenate([[0], up[:-1]]).astype(np.float32)
    exact = mode == "exact"
    times = (up, low, low if exact else up - np.float32(1000 / num_steps), low if exact else up)
    text = network.text(jnp.repeat(null, z0.shape[0], axis=0))

    def step(z, times):
        t, t_low, t_unet, t_control = times
        control = None if features is None else Control(features, control_scale, t_control)
        eps = network.eps(z, t_unet, text, control=control)
        z, _ = network.schedule.inverse_step(eps, t, t_low, z, mode=mode)
        return z, z

    _, trajectory = jax.lax.scan(step, z0, times)
    return jnp.concatenate([z0[None], trajectory])


@functools.partial(jax.jit, static_argnames=("num_steps", "mode"))
def invert_program(
    network: EditorNetwork,
    z0: Float[Array, "b h w c"],
    edges: Bool[Array, "b height width"] | None,
    null: Float[Array, "1 s d"],
    control_scale: Scalar,
    *,
    num_steps: int,
    mode: InverseMode,
) -> tuple[Float[Array, "n b h w c"], Float[Array, "b h w c0"] | None]:
    """`inverted`, and the features of the edges, as one program."""
    features = None if edges is None else network.hint(edges)
    return inverted(network, z0, null, features, control_scale, num_steps=num_steps, mode=mode), features
