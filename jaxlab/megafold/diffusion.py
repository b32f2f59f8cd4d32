"""Diffusion over atom positions: noise levels, preconditioning, random frames and the sampler.

Karras et al. (EDM, arXiv:2206.00364) with the constants of AlphaFold3 (supplement, section 3.7). Lengths are Å, noise
levels are standard deviations in Å, and everything is float32.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlab.megafold.geometry import ArrayLike

SIGMA_DATA = 16.0
_SIGMA_MAX, _SIGMA_MIN, _RHO = 160.0, 4e-4, 7  # in units of sigma_data
LOSS_WEIGHTINGS = ("edm", "af3_text")


def noise_schedule(num_steps: int, *, sigma_data: float = SIGMA_DATA) -> Float[Array, " levels"]:
    """Noise levels of inference, falling: num_steps + 1 of them, from 160 sigma_data; the last is 0.

    Raises:
        ValueError: num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected a value >= 1, got {num_steps}")
    first, last = _SIGMA_MAX ** (1 / _RHO), _SIGMA_MIN ** (1 / _RHO)
    levels = sigma_data * (first + np.arange(num_steps + 1) / num_steps * (last - first)) ** _RHO
    levels[-1] = 0.0
    return jnp.asarray(levels, jnp.float32)


def sample_training_sigma(key: Array, shape: Sequence[int], *, sigma_data: float = SIGMA_DATA) -> Float[Array, "..."]:
    """Noise levels to train on: sigma_data * exp(-1.2 + 1.5 n), n normal."""
    return sigma_data * jnp.exp(-1.2 + 1.5 * jax.random.normal(key, tuple(shape)))


def precondition(
    sigma: Float[ArrayLike | float, "*shape"], *, sigma_data: float = SIGMA_DATA
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """(c_skip, c_out, c_in, c_noise) of D(x) = c_skip x + c_out F(c_in x, c_noise), of the shape of sigma > 0."""
    sigma = jnp.asarray(sigma, jnp.float32)
    total = sigma**2 + sigma_data**2
    c_in = jax.lax.rsqrt(total)
    return sigma_data**2 / total, sigma * sigma_data * c_in, c_in, jnp.log(sigma / sigma_data) / 4


def edm_loss_weight(
    sigma: Float[ArrayLike | float, "*shape"],
    *,
    loss_weighting: str = "edm",
    sigma_data: float = SIGMA_DATA,
) -> Float[Array, "*shape"]:
    """Weight of a denoised sample's loss.

    Args:
        sigma: noise levels, > 0.
        loss_weighting: "edm": (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's and Protenix's; "af3_text": over
            (sigma + sigma_data)^2, as AlphaFold3's supplement prints.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: unknown `loss_weighting`.
    """
    if loss_weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"loss_weighting: expected one of {LOSS_WEIGHTINGS}, got {loss_weighting!r}")
    sigma = jnp.asarray(sigma, jnp.float32)
    below = sigma * sigma_data if loss_weighting == "edm" else sigma + sigma_data
    return (sigma**2 + sigma_data**2) / below**2


def random_rotation(key: Array, shape: Sequence[int] = ()) -> Float[Array, "*shape 3 3"]:
    """Rotation matrices, uniform over SO(3): from unit quaternions in every direction alike."""
    quaternion = jax.random.normal(key, (*shape, 4))
    w, x, y, z = jnp.moveaxis(quaternion / jnp.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def random_augmentation(
    key: Array, coords: Float[ArrayLike, "*batch a 3"], mask: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "*batch a 3"]:
    """Each structure centred, rotated at random and moved by N(0, 1 Å) along each axis.

    Args:
        key: of all frames.
        coords: positions.
        mask: `[A]`, or any shape that broadcasts to `[*batch, A]`: atoms that are there; the others become 0.
    """
    coords = jnp.asarray(coords, jnp.float32)
    rotation_key, translation_key = jax.random.split(key)
    batch = coords.shape[:-2]
    there = jnp.ones((1, 1), bool) if mask is None else jnp.asarray(mask)[..., None]
    there = jnp.broadcast_to(there, (*batch, *coords.shape[-2:-1], 1))
    count = jnp.maximum(jnp.sum(there, axis=-2, keepdims=True), 1)
    centre = jnp.sum(jnp.where(there, coords, 0.0), axis=-2, keepdims=True) / count
    turned = jnp.einsum(
        "...ij,...aj->...ai",
        random_rotation(rotation_key, batch),
        coords - centre,
        precision=jax.lax.Precision.HIGHEST,
    )
    moved = turned + jax.random.normal(translation_key, (*batch, 1, 3))
    return jnp.where(there, moved, 0.0)


def sample(
    denoise: Callable[[Array, Array], Array],
    key: Array,
    shape: Sequence[int],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    num_steps: int = 200,
    gamma_0: float = 0.8,
    gamma_min: float = 1.0,
    noise_scale: float = 1.003,
    step_scale: float = 1.5,
    sigma_data: float = SIGMA_DATA,
) -> Float[Array, "*batch a 3"]:
    """Structures from noise (AlphaFold3, algorithm 18).

    Args:
        denoise: (x of `shape`, sigma, a scalar) -> the clean positions in Å, in the frame of x.
        key: of the first noise and of each step's frame and noise.
        shape: `[T,A,3]`: samples and atoms; more axes may stand before them.
        mask: `[A]`, or any shape that broadcasts to `[T,A]`: atoms that exist; the others stay at 0.
        num_steps: calls of `denoise`.
        gamma_0: noise added before a step, relative to its level; no noise at target levels up to `gamma_min`.
        gamma_min: see `gamma_0`, Å.
        noise_scale: factor of the added noise.
        step_scale: factor of the step.
        sigma_data: standard deviation of the data.

    Returns:
        Positions of `shape`, f32, in random frames.

    Raises:
        ValueError: num_steps < 1, a shape that does not end in [A, 3], or a mask that does not fit it.
    """
    shape = tuple(shape)
    if len(shape) < 2 or shape[-1] != 3:
        raise ValueError(f"shape: expected [T, A, 3], got {shape}")
    mask = jnp.ones(shape[-2], bool) if mask is None else jnp.asarray(mask)
    if mask.ndim >= len(shape) or any(own not in (1, size) for own, size in zip(mask.shape[::-1], shape[-2::-1])):
        raise ValueError(f"mask: expected a shape that broadcasts to {shape[:-1]}, got {mask.shape}")
    levels = noise_schedule(num_steps, sigma_data=sigma_data)
    keep = mask[..., None]

    def step(x, inputs):
        index, level, target = inputs
        frame_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        x = random_augmentation(frame_key, x, mask)
        gamma = jnp.where(target > gamma_min, gamma_0, 0.0)
        raised = level * (1 + gamma)
        added = noise_scale * level * jnp.sqrt(gamma * (gamma + 2))  # sqrt(raised^2 - level^2), never of less than 0
        noisy = x + jnp.where(keep, added * jax.random.normal(noise_key, shape), 0.0)
        slope = (noisy - denoise(noisy, raised)) / raised
        return jnp.where(keep, noisy + step_scale * (target - raised) * slope, 0.0), None

    start = jnp.where(keep, levels[0] * jax.random.normal(jax.random.fold_in(key, 0), shape), 0.0)
    return jax.lax.scan(step, start, (jnp.arange(1, num_steps + 1), levels[:-1], levels[1:]))[0]
