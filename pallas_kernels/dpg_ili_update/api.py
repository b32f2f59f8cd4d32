"""The door: signature, argument checks, implementation choice."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.dpg_ili_update import reference, triton, xla

_OP = "dpg_ili_update"
_TABLE = implementations(reference.update, xla.update, triton.update)


def dpg_ili_update(
    z: Float[Array, "b h w c"],
    z_src: Float[Array, "b h w c"],
    z_inv: Float[Array, "b h w c"],
    eps_null: Float[Array, "b h w c"],
    eps_src: Float[Array, "b h w c"],
    eps_tgt: Float[Array, "b h w c"],
    eps_cross: Float[Array, "b h w c"],
    gamma: Any,
    t_start: Any,
    t_end: Any,
    t: Any,
    t_next: Any,
    mask: Bool[Array, "b h w"],
    w_cfg: Any,
    w_dpg: Any,
    *,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """What follows the network in a step of InstantEdit (arXiv:2508.06033), on a piecewise rectified flow (PeRFlow).

    With E0, Es, Et, Ec the four predictions, sums over places for each sample and channel:

        d_src = Ec - E0          d_tgt = Et - E0          p = sum(d_src d_tgt) / sum(d_src^2)
        g = E0 + w_cfg d_tgt + w_dpg (d_tgt - p d_src)    g_src = E0 + w_cfg (Es - E0)
        z_new = z_inv + (Step(z, g) - Step(z_src, g_src))

    where Step(x, e) = x + (t_next - t) ((1 - gamma) x - sqrt(1 - gamma^2) e) / (t - t_start + gamma (t_end - t)), the
    "diff_eps" form of a window of PeRFlow (arXiv:2405.07510). Where sum(d_src^2) <= 1e-12, d_src and p count as 0. All
    in float32.

    The difference of the two Steps is taken term by term, of numbers that are equal where the branches are: with
    eps_src, eps_tgt and eps_cross equal, and z equal to z_src, z_new *is* z_inv, whatever the compiler contracts and in
    whatever order it sums. There is no gradient: it is for sampling.

    Args:
        z: latents of the edit `[B,h,w,C]`.
        z_src: latents of the source branch.
        z_inv: latents of the inversion at `t_next`.
        eps_null: E0, the prediction at z for the empty prompt.
        eps_src: Es, at z_src for the source prompt.
        eps_tgt: Et, at z for the target prompt.
        eps_cross: Ec, at z for the source prompt.
        gamma: square root of the ratio of the window's noise schedule at its start to that at its end; a number or a
            float scalar, as all that follow: changing them compiles nothing.
        t_start: where the window starts, as a fraction in [0, 1].
        t_end: where it ends, below t_start.
        t: the time of the step, t_end < t <= t_start.
        t_next: the time after it.
        mask: `[B,h,w]`, True where the edit is kept.
        w_cfg: guidance scale.
        w_dpg: scale of what the target prompt says and the source prompt does not.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        z_new, and where(mask, z_new, z_inv), both `[B,h,w,C]` in z's dtype.

    Raises:
        ValueError: shapes that do not fit, or a scalar that is none.
        TypeError: latents or predictions not floating or of different dtypes, or a mask that is not boolean.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names(_OP, _TABLE, implementation)
    latents = {"z": z, "z_src": z_src, "z_inv": z_inv}
    predictions = {"eps_null": eps_null, "eps_src": eps_src, "eps_tgt": eps_tgt, "eps_cross": eps_cross}
    _check(latents, predictions, mask)
    numbers = {"gamma": gamma, "t_start": t_start, "t_end": t_end, "t": t, "t_next": t_next}
    scalars = _scalars(numbers | {"w_cfg": w_cfg, "w_dpg": w_dpg})
    if z.size == 0:
        return jnp.zeros_like(z), jnp.zeros_like(z)
    given = vary_alike(*latents.values(), *predictions.values(), mask, scalars)
    return _update(implementation if isinstance(implementation, str | None) else tuple(implementation), *given)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _update(implementation, *args):
    return dispatch(_OP, _TABLE, implementation, *args)


@_update.defjvp
def _no_gradient(*_):
    raise NotImplementedError(f"{_OP} has no derivative: it is for sampling")


def _scalars(numbers):
    for name, value in numbers.items():
        if jnp.shape(value) != ():
            raise ValueError(f"{name}: expected a number or a scalar, got shape {jnp.shape(value)}")
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in numbers.values()])


def _check(latents, predictions, mask):
    z, eps = latents["z"], predictions["eps_null"]
    if z.ndim != 4:
        raise ValueError(f"z: expected 4 axes [batch, height, width, channels], got shape {z.shape}")
    for name, x in (latents | predictions).items():
        if x.shape != z.shape:
            raise ValueError(f"{name}: expected the shape of z, {z.shape}, got {x.shape}")
        like, beside = ("z", z) if name in latents else ("eps_null", eps)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != beside.dtype:
            raise TypeError(f"{name}: expected {like}'s dtype, floating, got {x.dtype} beside {like} of {beside.dtype}")
    if mask.shape != z.shape[:3]:
        raise ValueError(f"mask: expected shape {z.shape[:3]}, got {mask.shape}")
    if mask.dtype != bool:
        raise TypeError(f"mask: expected booleans, got {mask.dtype}")
