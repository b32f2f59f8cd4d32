"""When slow-fast updates end: at a jump of the policy's entropy (SFPO's official code)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class EntropyStopState:
    """The last entropies as a ring, how many have come, and whether the rule has fired: it stays so."""

    entropies: Float[Array, " window"]
    count: Int[Array, ""]
    stopped: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class EntropyZScoreStop:
    """Ends the fast passes for good once the last of `window` entropies lies `threshold` deviations over their mean.

    z = (last - mean) / (std + 1e-9), mean and population deviation over the window, the last entropy included; stops at
    z >= threshold. Step s asks `active` first, then appends its entropy, the masked token mean of its last pass.
    Methods are pure and can be jitted.

    Constant or steadily falling entropies never stop it, nor do fewer than `window`; stationary noise does a few steps
    after the window has filled. So window and threshold set how long the slow-fast phase lasts. An entropy that is NaN
    stops nothing while it is in the window.

    Attributes:
      window: entropies looked at; official 30.
      threshold: official 1.0.
      two_sided: stop at a fall as well; the official rule sees a rise only.
    """

    window: int = 30
    threshold: int | float = 1.0
    two_sided: bool = False

    def __post_init__(self):
        if self.window < 2:
            raise ValueError(f"window: expected at least 2 entropies, got {self.window}")

    def init(self) -> EntropyStopState:
        """The state before the first step; f64 where JAX is in 64-bit mode."""
        return EntropyStopState(jnp.zeros(self.window, float), jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def active(self, state: EntropyStopState) -> Bool[Array, ""]:
        """Whether the coming step makes fast passes."""
        return ~state.stopped

    def update(self, state: EntropyStopState, entropy: float | Float[Array | np.ndarray, ""]) -> EntropyStopState:
        """Appends the entropy of a step."""
        entropy = jnp.asarray(entropy, state.entropies.dtype)
        entropies = state.entropies.at[state.count % self.window].set(entropy)
        count = state.count + 1
        below = entropy - entropies  # the mean of equal entropies would be rounded, that of zeros is not
        z = jnp.mean(below) / (jnp.std(below) + 1e-9)
        fired = (jnp.abs(z) if self.two_sided else z) >= self.threshold
        return EntropyStopState(entropies, count, state.stopped | (fired & (count >= self.window)))
