"""Idle Gaussians moved onto others (Kheradmand et al. 2024, section 4.2): what is drawn stays nearly the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_MOST_COPIES = 51
_LEAST_OPACITY = 0.005


def relocated(
    params: dict[str, Float[Array, "n ..."]], key: Array, faint: float
) -> tuple[dict[str, Float[Array, "n ..."]], Bool[Array, " n"]]:
    """Moves Gaussians whose opacity is at most `faint` onto others, drawn in proportion to opacity.

    A Gaussian that others land on shares its opacity with them, and all of its copies shrink, so that together they
    look like the one did.

    Returns:
      The parameters, and which Gaussians changed.
    """
    opacity = jax.nn.sigmoid(params["opacity_logit"])
    count = opacity.shape[0]
    idle = opacity <= faint
    weights = jnp.where(idle, 0.0, opacity)
    idle &= weights.sum() > 0  # with nowhere to go all stay
    targets = jax.random.choice(key, count, (count,), p=weights / jnp.maximum(weights.sum(), 1e-12))
    targets = jnp.where(idle, targets, jnp.arange(count))
    copies = jnp.zeros(count, jnp.int32).at[targets].add(1)
    shared_opacity, shrink = shared(opacity, jnp.clip(copies, 1, _MOST_COPIES))
    copied = copies > 1
    logit = jnp.where(copied, jnp.log(shared_opacity) - jnp.log1p(-shared_opacity), params["opacity_logit"])
    log_scales = params["log_scales"] + jnp.where(copied, jnp.log(shrink), 0.0)[:, None]
    changed = {**params, "opacity_logit": logit, "log_scales": log_scales}
    return {name: leaf[targets] for name, leaf in changed.items()}, idle | copied


def shared(opacity: Float[Array, " n"], copies: Int[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The opacity and the factor of the scale of each of some copies that together look like one Gaussian.

    Args:
      opacity: of the one, in (0, 1).
      copies: how many it becomes, at most 51.

    Returns:
      1 - (1 - opacity)^(1 / copies), limited from below by 0.005, and the factor, equation 9 of the paper.
    """
    new = 1 - (1 - opacity) ** (1.0 / copies)
    terms = jnp.arange(_MOST_COPIES)
    powers = new[:, None] ** (terms + 1) * jnp.asarray(_table())[copies]
    factor = opacity / jnp.sum(powers, axis=1)
    return jnp.clip(new, _LEAST_OPACITY, 1 - 1e-6), factor


def _table() -> np.ndarray:
    """By number of copies n and k: the sum over i from 1 to n of C(i - 1, k) (-1)^k / sqrt(k + 1), k < i.

    Hockey-stick: the sum of C(i - 1, k) over i up to n is C(n, k + 1).
    """
    rows = range(_MOST_COPIES + 1)
    terms = [[math.comb(n, k + 1) * (-1) ** k / math.sqrt(k + 1) for k in range(_MOST_COPIES)] for n in rows]
    return np.array(terms)
