"""PeRFlow's schedule: straight paths inside each of a few time windows (arXiv 2405.07510, official scheduler).

Times are integers or floats from 0 (clean) to 1000 (noise). Window k of W runs from `1 - k/W` down to `1 - (k+1)/W`.
"""

import dataclasses
import functools
import numbers
import warnings
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

PredictionType = Literal["diff_eps", "ddim_eps", "velocity"]
InverseMode = Literal["exact", "official"]

TRAIN_STEPS = 1000
_BETA_START, _BETA_END = 0.00085, 0.012  # Stable Diffusion's "scaled linear" betas
_SLACK = 0.1  # of a training step: a time on a boundary belongs to the window that it starts


class Window(NamedTuple):
    """One straight piece, `z(t_start) = gamma z(t_end) + sqrt(1 - gamma^2) e` under "diff_eps".

    Attributes:
      t_start: its noisy end, as a fraction of 1000.
      t_end: its clean end.
      gamma: `sqrt(alpha_start / alpha_end)`.
      alpha_start: the cumulated alpha at the noisy end.
      alpha_end: that at the clean end.
    """

    t_start: float
    t_end: float
    gamma: float
    alpha_start: float
    alpha_end: float


class Marginal(NamedTuple):
    """Latents at a time are `signal` clean latents and `noise` noise.

    Attributes:
      signal: coefficient of the clean latents.
      noise: coefficient of unit noise.
      signal_slope: its derivative by tau = t/1000.
      noise_slope: that of the noise.
    """

    signal: Array
    noise: Array
    signal_slope: Array
    noise_slope: Array


@dataclasses.dataclass(frozen=True)
class PeRFlowSchedule:
    """Tables, time steps and the two directions of PeRFlow's flow. Hashable, so it may be static in a jitted function.

    Tables are made in float64 on the host; `step`, `inverse_step` and `velocity` compute in float32, take traced times
    and look the window up by them, so that nothing is compiled again for another time.

    Attributes:
      num_windows: W, 1 to 1000.
      prediction_type: what the network predicts: "diff_eps" the noise between the ends of a window (InstantEdit),
        "ddim_eps" the noise in the ordinary sense, "velocity" the path's derivative.

    Raises:
      ValueError: either is none of those.
    """

    num_windows: int = 4
    prediction_type: PredictionType = "diff_eps"

    def __post_init__(self):
        if not isinstance(self.num_windows, numbers.Integral) or not 1 <= self.num_windows <= TRAIN_STEPS:
            raise ValueError(f"num_windows: expected a whole number from 1 to {TRAIN_STEPS}, got {self.num_windows!r}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type: expected one of {get_args(PredictionType)}, got {self.prediction_type!r}"
            )

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """`[1000]` float64; time t is at index t - 1."""
        betas = np.linspace(_BETA_START**0.5, _BETA_END**0.5, TRAIN_STEPS) ** 2
        return np.cumprod(1 - betas)

    def alpha_bar(self, t: float) -> float:
        """The cumulated alpha at a time of the host, index truncated to an integer and not below 0.

        Raises:
          ValueError: t is outside [0, 1000].
        """
        _check_times(t)
        return float(self.alphas_cumprod[max(int(t - 1), 0)])

    def timesteps(self, num_steps: int) -> Int[np.ndarray, " N"]:
        """Times of N steps, descending from 1000: spread evenly inside each window, without its end, truncated.

        The first N % W windows have one step more than the others. Truncation is that of the official code's float64:
        99, not 100, at N = 20.

        Args:
          num_steps: N; below W it is raised to W with a warning.

        Returns:
          `[max(num_steps, W)]` int32, on the host. The time after the last is 0.

        Raises:
          ValueError: num_steps is no whole number from 1 to 1000.
        """
        check_num_steps(num_steps)
        if num_steps < self.num_windows:
            warnings.warn(
                f"num_steps: {num_steps} is fewer than the {self.num_windows} windows; {self.num_windows} are taken",
                stacklevel=2,
            )
            num_steps = self.num_windows
        each, more = divmod(num_steps, self.num_windows)
        times = [
            np.linspace(window.t_start, window.t_end, each + (k < more), endpoint=False)
            for k, window in enumerate(self._windows)
        ]
        return (np.concatenate(times) * TRAIN_STEPS).astype(np.int32)

    def window(self, t: float) -> Window:
        """The window of a time of the host; a boundary belongs to the one that it starts.

        Raises:
          ValueError: t is outside (0, 1000].
        """
        _check_times(t, above_zero=True)
        return self._windows[int(self._index(t, np))]

    def velocity(
        self,
        model_output: Float[Array | np.ndarray, "..."],
        t: ArrayLike,
        z: Float[Array | np.ndarray, "..."],
        *,
        window_at: ArrayLike | None = None,
    ) -> Float[Array, "..."]:
        """dz/dtau of the straight path through z at t, tau = t/1000.

        Args:
          model_output: the network's prediction, of the shape of z.
          t: 0 to 1000; one, or one for each entry of z's first axis.
          z: latents at t.
          window_at: the time whose window is meant; None: t itself.

        Raises:
          ValueError: a time of the host outside [0, 1000], or a 0 whose window is meant; other shapes.
        """
        if jnp.shape(model_output) != jnp.shape(z):
            raise ValueError(f"model_output: expected the shape of z, {jnp.shape(z)}, got {jnp.shape(model_output)}")
        t = _times(t, z)
        if self.prediction_type == "velocity":
            return jnp.asarray(model_output, jnp.float32)
        index = self._index(t if window_at is None else _times(window_at, z, above_zero=True), jnp)
        start, end, lambda_minus_one, eta = (jnp.asarray(column, jnp.float32)[index] for column in self._table)
        denominator = ((1 + lambda_minus_one) * (t - start) + (end - t)) / TRAIN_STEPS
        return (
            lambda_minus_one * jnp.asarray(z, jnp.float32) + eta * jnp.asarray(model_output, jnp.float32)
        ) / denominator

    def step(
        self,
        model_output: Float[Array | np.ndarray, "..."],
        t: ArrayLike,
        t_next: ArrayLike,
        z: Float[Array | np.ndarray, "..."],
    ) -> Float[Array, "..."]:
        """One Euler step down.

        Args:
          model_output: the network's prediction at (z, t), of the shape of z.
          t: in (0, 1000]; one, or one for each entry of z's first axis.
          t_next: the next lower time; 0 after the last step.
          z: latents at t.

        Returns:
          Latents at t_next, float32.

        Raises:
          ValueError: a time of the host out of range, or other shapes.
        """
        t = _times(t, z, above_zero=True)
        return jnp.asarray(z) + self.velocity(model_output, t, z) * ((_times(t_next, z) - t) / TRAIN_STEPS)

    def inverse_step(
        self,
        model_output: Float[Array | np.ndarray, "..."],
        t: ArrayLike,
        t_low: ArrayLike,
        z: Float[Array | np.ndarray, "..."],
        *,
        mode: InverseMode = "exact",
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """One Euler step up, in the window of its noisy end (InstantEdit's PerRFI).

        Both modes agree where t_low is the clean end of t's window, that is at N = W steps.

        Args:
          model_output: the network's prediction for z at the clean end.
          t: the time to go to, in (0, 1000]; one, or one for each entry of z's first axis.
          t_low: the time of z.
          z: latents at t_low.
          mode: "exact" takes the path's velocity at t_low; "official" as if z were at the clean end of the window.

        Returns:
          Latents at t and the velocity, float32.

        Raises:
          ValueError: another mode, a time of the host out of range, or other shapes.
        """
        if mode not in get_args(InverseMode):
            raise ValueError(f"mode: expected one of {get_args(InverseMode)}, got {mode!r}")
        t, t_low = _times(t, z, above_zero=True), _times(t_low, z)
        at = t_low
        if mode == "official":
            at = jnp.asarray(self._table[1], jnp.float32)[self._index(t, jnp)]
        velocity = self.velocity(model_output, at, z, window_at=t)
        return jnp.asarray(z) + velocity * ((t - t_low) / TRAIN_STEPS), velocity

    def marginal(self, t: ArrayLike, z: Float[Array | np.ndarray, "..."]) -> Marginal:
        """How much of the clean latents and of the noise is in latents at t.

        At the ends of windows these are the roots of the cumulated alpha and of what it lacks to 1; between them both
        are straight, as the path is.

        Args:
          t: 0 to 1000; one, or one for each entry of z's first axis.
          z: latents, whose shape the coefficients broadcast against.

        Raises:
          ValueError: a time of the host outside [0, 1000].
        """
        t = _times(t, z)
        index = self._index(t, jnp)
        start, end, *alphas = (np.array([w[n] for w in self._windows]) for n in (0, 1, 3, 4))
        low = jnp.asarray(TRAIN_STEPS * end, jnp.float32)[index]
        values, slopes = [], []
        for at_start, at_end in (np.sqrt(alphas), np.sqrt(1 - np.array(alphas))):
            slope = jnp.asarray((at_start - at_end) / (start - end), jnp.float32)[index]
            values.append(jnp.asarray(at_end, jnp.float32)[index] + slope * ((t - low) / TRAIN_STEPS))
            slopes.append(slope)
        return Marginal(*values, *slopes)

    @functools.cached_property
    def _windows(self) -> tuple[Window, ...]:
        windows = []
        for k in range(self.num_windows):
            high, low = self.num_windows - k, self.num_windows - k - 1
            # Indices by integers: 1000 * (high / W) - 1 may fall short of a whole number.
            alpha_start = self.alphas_cumprod[max(TRAIN_STEPS * high // self.num_windows - 1, 0)]
            alpha_end = self.alphas_cumprod[max(TRAIN_STEPS * low // self.num_windows - 1, 0)]
            windows.append(
                Window(
                    t_start=high / self.num_windows,
                    t_end=low / self.num_windows,
                    gamma=float(np.sqrt(alpha_start / alpha_end)),
                    alpha_start=float(alpha_start),
                    alpha_end=float(alpha_end),
                )
            )
        return tuple(windows)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """`[4, W]`: both ends as times 0..1000, lambda_s - 1, eta_s; `z(t_end) = lambda_s z(t_start) + eta_s e`."""
        start, end, gamma, alpha_start, alpha_end = np.array(self._windows).T
        if self.prediction_type == "ddim_eps":
            eta = np.sqrt(1 - alpha_end) - np.sqrt(1 - alpha_start) / gamma
        else:
            eta = -np.sqrt(1 - gamma**2) / gamma
        return np.stack([TRAIN_STEPS * start, TRAIN_STEPS * end, 1 / gamma - 1, eta])

    def _index(self, t, xp):
        """Number of windows that end at or above t, in the ranks of t."""
        ends = self._table[1].astype(np.float32)
        above = (xp.asarray(t)[..., None] - _SLACK) <= ends
        return xp.minimum(above.sum(-1), self.num_windows - 1)


def check_num_steps(num_steps: int) -> None:
    """Raises ValueError unless it is a whole number of steps for which there are times."""
    if not isinstance(num_steps, numbers.Integral) or isinstance(num_steps, bool):
        raise ValueError(f"num_steps: expected a whole number, got {num_steps!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    if num_steps > TRAIN_STEPS:
        raise ValueError(f"num_steps: expected at most {TRAIN_STEPS}, got {num_steps}")


def _check_times(t: ArrayLike, *, above_zero: bool = False) -> None:
    if isinstance(t, jax.Array):
        return  # to look at it would wait for the device, or cannot be done
    values = np.asarray(t, np.float64)
    low = values <= 0 if above_zero else values < 0
    if np.any(low | ~(values <= TRAIN_STEPS)):
        raise ValueError(f"t: expected times in {'(' if above_zero else '['}0, {TRAIN_STEPS}], got {t}")


def _times(t: ArrayLike, z: Float[Array | np.ndarray, "..."], *, above_zero: bool = False) -> Float[Array, "..."]:
    """Checked where they are on the host, float32, broadcasting against z."""
    _check_times(t, above_zero=above_zero)
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (z.ndim - 1)) if t.ndim == 1 else t
