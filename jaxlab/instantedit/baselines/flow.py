"""What the methods share: the problem, guided predictions, the grid of times, and Euler's way down it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxlab.instantedit.network import Control, EditorNetwork
from jaxlab.instantedit.scheduler import TRAIN_STEPS, PeRFlowSchedule

Latents = Float[Array | np.ndarray, "b h w c"]
Prompt = Literal["null", "source", "target"]
Predict = Callable[[Any, Any], Array]
"""(latents, time) -> prediction."""


class EditProblem(struct.PyTreeNode):
    """What a method is asked for; all of it may be traced.

    Attributes:
      z0: scaled latents of images, `[B, h, w, C]`.
      null: states of the empty prompt, `[1, S, D]`.
      source: states of what the images show, `[1 or B, S, D]`.
      target: states of what they shall show, `[1 or B, S, D]`.
      cfg: guidance towards the target; None: its prediction alone, one sample of the network where guidance takes two.
      control: edges that every prediction follows; None: the UNet alone.
      rng: key of the noise, for methods that draw it.
    """

    z0: Any
    null: Any
    source: Any
    target: Any
    cfg: Any = 1.1
    control: Control | None = None
    rng: Any = None

    def predictor(self, network: EditorNetwork, prompt: Prompt, *, guided: bool = False) -> Predict:
        """The network's predictions for a prompt: `E`, or `E0 + cfg (E - E0)`.

        Raises:
          ValueError: neither one prompt nor one for each of the latents.
        """
        together = self.predictors(network, **{prompt: guided})
        return lambda z, t: together([z], t)[0]

    def predictors(self, network: EditorNetwork, **prompts: bool) -> Callable[[Sequence[Any], Any], list[Array]]:
        """As `predictor`, of several prompts by one call of the network.

        Args:
          network: the network.
          **prompts: "source", "target" or "null" -> whether it is guided.

        Returns:
          (latents for each prompt, time) -> their predictions.

        Raises:
          ValueError: neither one prompt nor one for each of the latents.
        """
        asked = [(prompt, guided and self.cfg is not None) for prompt, guided in prompts.items()]
        rows = [self._rows(name) for prompt, guided in asked for name in (["null", prompt] if guided else [prompt])]
        text = network.text(jnp.concatenate(rows))

        def predict(latents, t):
            repeated = [z for z, (_, guided) in zip(latents, asked) for _ in range(1 + guided)]
            eps = network.eps(jnp.concatenate(repeated), t, text, control=self.control)
            parts = iter(jnp.split(eps, len(repeated)))
            return [_guided(next(parts), next(parts), self.cfg) if guided else next(parts) for _, guided in asked]

        return predict

    def draw(self, *lead: int) -> Array:
        """Unit noise for the latents, `[*lead, B, h, w, C]`.

        Raises:
          ValueError: there is no key.
        """
        if self.rng is None:
            raise ValueError("rng: this method draws noise; give the problem a key")
        return jax.random.normal(self.rng, (*lead, *self.z0.shape))

    def _rows(self, prompt: str) -> Float[Array, "b s d"]:
        states, batch = jnp.asarray(getattr(self, prompt)), self.z0.shape[0]
        if states.shape[0] not in (1, batch):
            raise ValueError(f"{prompt}: expected states of 1 or {batch} prompts, got {states.shape[0]}")
        return jnp.broadcast_to(states, (batch, *states.shape[1:]))


def _guided(empty: Array, full: Array, cfg: Any) -> Array:
    return empty + cfg * (full - empty)


def intervals(schedule: PeRFlowSchedule, num_steps: int, strength: float = 1.0) -> Float[np.ndarray, "n 2"]:
    """(t, next lower t) of each step, descending, of those that begin at a strength or below.

    Args:
      schedule: gives the times.
      num_steps: of the whole way from noise.
      strength: the noisiest time allowed, as a fraction.

    Raises:
      ValueError: a strength outside (0, 1], or below every step.
    """
    times = schedule.timesteps(num_steps).astype(np.float32)
    pairs = np.stack([times, np.append(times[1:], np.float32(0))], axis=1)
    pairs = pairs[times <= TRAIN_STEPS * strength]
    if not (0 < strength <= 1 and len(pairs)):
        raise ValueError(f"strength: expected {times[-1] / TRAIN_STEPS:.4g} to 1 for these steps, got {strength}")
    return pairs


def down(schedule: PeRFlowSchedule, predict: Predict, z: Latents, pairs: Float[np.ndarray, "n 2"]) -> Array:
    """Euler's steps down the intervals."""

    def step(z, pair):
        return schedule.step(predict(z, pair[0]), pair[0], pair[1], z), None

    return jax.lax.scan(step, jnp.asarray(z, jnp.float32), pairs)[0]


def up(
    schedule: PeRFlowSchedule,
    predict: Predict,
    z0: Latents,
    pairs: Float[np.ndarray, "n 2"],
    *,
    ask_above: bool = False,
) -> Float[Array, "n+1 b h w c"]:
    """Euler's steps up the intervals, the last of them first.

    Args:
      schedule: says how a prediction moves latents.
      predict: the network.
      z0: clean latents.
      pairs: of `intervals`.
      ask_above: tell the network the time that a step goes to, as DDIM inversion does, not that of its latents.

    Returns:
      Latents after 0, 1, ... steps.
    """

    def step(z, pair):
        t, low = pair
        z, _ = schedule.inverse_step(predict(z, t if ask_above else low), t, low, z)
        return z, z

    z0 = jnp.asarray(z0, jnp.float32)
    return jnp.concatenate([z0[None], jax.lax.scan(step, z0, pairs[::-1])[1]])


def noised(schedule: PeRFlowSchedule, z0: Latents, noise: Latents, t: Any) -> Array:
    """Clean latents with noise, at t."""
    marginal = schedule.marginal(t, z0)
    return marginal.signal * z0 + marginal.noise * noise
