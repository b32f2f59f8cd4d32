"""One step of InstantEdit in float64 numpy, one sample and channel at a time, PeRFlow in its official parameters."""

import numpy as np


def update(z, z_src, z_inv, e_null, e_src, e_tgt, e_cross, gamma, t_start, t_end, t, t_next, mask, w_cfg, w_dpg):
    """z_new and where(mask, z_new, z_inv), [B,h,w,C]."""
    arrays = (z, z_src, z_inv, e_null, e_src, e_tgt, e_cross)
    z, z_src, z_inv, e_null, e_src, e_tgt, e_cross = (np.asarray(x, np.float64) for x in arrays)
    made = np.zeros_like(z)
    for b, c in np.ndindex(z.shape[0], z.shape[3]):
        own = (b, slice(None), slice(None), c)
        d_src, d_tgt = e_cross[own] - e_null[own], e_tgt[own] - e_null[own]
        square = (d_src**2).sum()
        p = (d_src * d_tgt).sum() / square if square > 1e-12 else 0.0
        guided = e_null[own] + w_cfg * d_tgt + w_dpg * (d_tgt - p * d_src)
        guided_src = e_null[own] + w_cfg * (e_src[own] - e_null[own])
        steps = [step(x[own], e, gamma, t_start, t_end, t, t_next) for x, e in ((z, guided), (z_src, guided_src))]
        made[own] = z_inv[own] + steps[0] - steps[1]
    return made, np.where(np.asarray(mask)[..., None], made, z_inv)


def step(z, e, gamma, t_start, t_end, t, t_next):
    """From t to t_next along the straight line of the window, `diff_eps`."""
    lambda_s, eta_s = 1 / gamma, -np.sqrt(1 - gamma**2) / gamma
    z_end = (lambda_s * (t_end - t_start) * z + eta_s * (t_end - t) * e) / (lambda_s * (t - t_start) + t_end - t)
    return z + (z_end - z) / (t_end - t) * (t_next - t)
