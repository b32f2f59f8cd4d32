"""InstantEdit's official loop on diffusers' networks in torch: 8 + 16 samples of UNet and ControlNet.

Written from the specification, for comparison only. Arrays go in and out as ours do, `[h, w, C]` in NumPy. Attention is
torch's fused one except in the layers whose maps are kept, which is faster than the official code's.
"""

from typing import Any

import numpy as np

WINDOWS = 4
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class _Kept:
    """Attention of the reshaped heads, its probabilities kept where the image has so many places."""

    def __init__(self, editor: "OfficialEditor", plain: Any):
        self._editor, self._plain = editor, plain

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any
    ) -> Any:
        if hidden_states.shape[1] != self._editor.places:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key)
        self._editor.kept.append(probabilities)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


class OfficialEditor:
    """Inversion and regeneration of one image."""

    def __init__(self, unet: Any, controlnet: Any):
        """Changes the UNet's cross-attention of down and up blocks so that maps can be read."""
        self.unet, self.controlnet = unet, controlnet
        self.places, self.kept, self.samples = 0, [], 0
        processors = dict(unet.attn_processors)
        for name, processor in processors.items():
            if ".attn2." in name and not name.startswith("mid_block"):
                processors[name] = _Kept(self, processor)
        unet.set_attn_processor(processors)

    def invert(self, z0: np.ndarray, hint: np.ndarray, null: np.ndarray, *, steps: int, scale: float) -> np.ndarray:
        """`[N + 1, h, w, C]`: an unconditional and a conditional sample a step, both of the empty prompt."""
        import torch

        z, hint, null = (_torch(x) for x in (z0, hint, null))
        trajectory, times = [z], timesteps(steps)
        for i in reversed(range(len(times))):
            t, below = times[i], times[i + 1] if i + 1 < len(times) else 0
            latents, prompts = torch.cat([z, z]), null.repeat(2, 1, 1)
            eps = self._eps(latents, t - 1000 / len(times), t, prompts, hint, scale)
            eps = eps[:1] + 1.01 * (eps[1:] - eps[:1])
            start, end, gamma = _window(t)
            scaled, noise = 1 / gamma, -np.sqrt(1 - gamma**2) / gamma
            velocity = ((1 - scaled) * z - noise * eps) / (scaled * (start - end))
            z = z + velocity * ((t - below) / 1000)
            trajectory.append(z)
        return _numpy(torch.cat(trajectory))

    def edit(
        self,
        trajectory: np.ndarray,
        hint: np.ndarray,
        states: np.ndarray,
        weights: np.ndarray,
        length: int,
        *,
        cfg: float,
        dpg: float,
        threshold: float,
        scale: float,
    ) -> dict[str, Any]:
        """Four samples a step.

        Args:
          trajectory: of `invert`.
          hint: `[H, W, 3]` in [0, 1].
          states: `[3, S, D]` of the empty, the source and the target prompt.
          weights: `[S]`, of the target's words.
          length: of the target prompt with begin and end.
          cfg: weight of guidance.
          dpg: weight of disentangled guidance.
          threshold: of the mask.
          scale: of the ControlNet.

        Returns:
          latents, masks `[N - 1, h, w]`, and how far each pixel is from the threshold.
        """
        import torch

        down, hint = _torch(trajectory).flip(0), _torch(hint)
        null, source, target = (_torch(x) for x in states)
        prompts, steps = torch.cat([null, source, target, source]), len(trajectory) - 1
        z, z_src, times = down[:1], down[:1], timesteps(steps)
        masks, margins, strength = [], [], None
        for i, t in enumerate(times):
            below = times[i + 1] if i + 1 < steps else 0
            eps = self._eps(torch.cat([z, z_src, z, z]), t, t, prompts, hint, scale, keep=i == 0)
            null_eps, src_eps, tgt_eps, cross = eps.chunk(4)
            d_src, d_tgt = cross - null_eps, tgt_eps - null_eps
            along = (d_src * d_tgt).sum((2, 3), keepdim=True) / (d_src * d_src).sum((2, 3), keepdim=True)
            guided = null_eps + cfg * d_tgt + dpg * (d_tgt - along * d_src)
            plain = null_eps + cfg * (src_eps - null_eps)
            z_inv = down[i + 1 : i + 2]
            z = z_inv + (_step(z, guided, t, below) - _step(z_src, plain, t, below))
            if i == 0:
                strength = self._strength(weights, length, z.shape[-2:])
            else:
                limit = max(threshold, 0.15 / np.sqrt(ALPHAS[t - 1]))
                masks.append(strength > limit)
                margins.append(abs(strength - limit))
                unmasked = z
                if masks[-1].any():
                    z = torch.where(masks[-1], z, z_inv)
            z_src = z_inv
        return {
            "latents": _numpy(unmasked)[0],
            "masks": torch.stack(masks).numpy(),
            "margins": torch.stack(margins).numpy(),
        }

    def _eps(self, z: Any, time: float, control_time: float, prompts: Any, hint: Any, scale: float, *, keep=False):
        """The hint is encoded, and prompts are projected, in every call."""
        import torch

        self.places = z.shape[2] * z.shape[3] // 16 if keep else 0
        self.kept = []
        self.samples += len(z)
        with torch.no_grad():
            down, middle = self.controlnet(
                z,
                torch.tensor(float(control_time)),
                encoder_hidden_states=prompts,
                controlnet_cond=hint.expand(len(z), -1, -1, -1),
                conditioning_scale=scale,
                return_dict=False,
            )
            return self.unet(
                z,
                torch.tensor(float(time)),
                encoder_hidden_states=prompts,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample

    def _strength(self, weights: np.ndarray, length: int, size: Any) -> Any:
        """Attention of the edited words over its maximum: of the second half of the heads, target and source at z."""
        import torch

        maps = torch.cat([each.chunk(2)[1] for each in self.kept]) * torch.from_numpy(weights)
        picture = maps[:, :, 1 : length - 1].mean(0).max(-1).values.reshape(1, 1, size[0] // 4, size[1] // 4)
        picture = torch.nn.functional.interpolate(picture, size=tuple(size))[0, 0]
        return picture / picture.max()


def timesteps(steps: int) -> list[int]:
    """Descending times."""
    counts = [steps // WINDOWS + (k < steps % WINDOWS) for k in range(WINDOWS)]
    parts = [np.linspace(1 - k / WINDOWS, 1 - (k + 1) / WINDOWS, n, endpoint=False) for k, n in enumerate(counts)]
    return (np.concatenate(parts) * 1000).astype(int).tolist()


def _window(t: float) -> tuple[float, float, float]:
    for k in range(WINDOWS):
        start, end = 1 - k / WINDOWS, 1 - (k + 1) / WINDOWS
        if t / 1000 - 1e-4 > end:
            return start, end, float(np.sqrt(ALPHAS[int(1000 * start) - 1] / ALPHAS[max(int(1000 * end) - 1, 0)]))
    raise ValueError(f"t: expected one above 0, got {t}")


def _step(z: Any, eps: Any, t: float, below: float) -> Any:
    start, end, gamma = _window(t)
    tau, scaled, noise = t / 1000, 1 / gamma, -np.sqrt(1 - gamma**2) / gamma
    clean = (scaled * (end - start) * z + noise * (end - tau) * eps) / (scaled * (tau - start) + (end - tau))
    return z + (clean - z) / (end - tau) * (below / 1000 - tau)


def _torch(x: np.ndarray) -> Any:
    """Images as torch has them, one more axis in front of what is single."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    if x.ndim == 2:
        return x[None]
    return x[None].permute(0, 3, 1, 2) if x.ndim == 3 else x.permute(0, 3, 1, 2)


def _numpy(x: Any) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()
