"""Triangle multiplication of AlphaFold in float64 numpy, forward and backward written out by hand."""

import numpy as np


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _normalise(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    std = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return (x - x.mean(axis=-1, keepdims=True)) / std, std


class Triangle:
    """One multiplication; `out`, and `gradients` in the order of the arguments after mask.

    z `[B,N,N,C]`; mask `[B,N,N]` or None; ln_* pairs of scale and offset, or None; w_proj and w_gate `[C,2F]`.
    """

    def __init__(self, z, mask, *, ln_in, w_proj, w_gate, ln_out, w_out, w_out_gate, direction, eps=1e-5):
        self.given = ln_in, w_proj, w_gate, ln_out, w_out, w_out_gate
        self.mask = np.ones(z.shape[:3]) if mask is None else mask.astype(np.float64)
        # Two letters an operand: which pair of (i, j, k) each array is indexed by.
        self.letters = ("ik", "jk") if direction == "outgoing" else ("ki", "kj")
        self.x_hat, self.std_in = (z, None) if ln_in is None else _normalise(z, eps)
        self.x = z if ln_in is None else self.x_hat * ln_in[0] + ln_in[1]
        self.gate, self.proj = _sigmoid(self.x @ w_gate), self.x @ w_proj
        self.a, self.b = np.split(self.mask[..., None] * self.gate * self.proj, 2, axis=-1)
        t = self._sum(*self.letters, "ij", self.a, self.b)
        self.t_hat, self.std_out = (t, None) if ln_out is None else _normalise(t, eps)
        self.u = t if ln_out is None else self.t_hat * ln_out[0] + ln_out[1]
        self.y, self.out_gate = self.u @ w_out, _sigmoid(self.x @ w_out_gate)
        self.out = self.out_gate * self.y

    @staticmethod
    def _sum(left: str, right: str, out: str, *arrays: np.ndarray) -> np.ndarray:
        """Channel by channel, a loop over channels of plain matrix products."""
        channels = [
            np.einsum(f"b{left},b{right}->b{out}", *(array[..., f] for array in arrays), optimize=True)
            for f in range(arrays[0].shape[-1])
        ]
        return np.stack(channels, axis=-1)

    def gradients(self, d_out: np.ndarray) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]:
        """Of `sum(d_out * out)` in z and in every weight, by name."""
        ln_in, w_proj, w_gate, ln_out, w_out, w_out_gate = self.given
        grads = {}
        d_y = d_out * self.out_gate
        d_pre = d_out * self.y * self.out_gate * (1 - self.out_gate)
        grads["w_out"], grads["w_out_gate"] = _outer(self.u, d_y), _outer(self.x, d_pre)
        d_t, grads["ln_out"] = _normalise_gradient(d_y @ w_out.T, ln_out, self.t_hat, self.std_out)
        left, right = self.letters
        d_a, d_b = self._sum("ij", right, left, d_t, self.b), self._sum("ij", left, right, d_t, self.a)
        d_pair = np.concatenate([d_a, d_b], axis=-1) * self.mask[..., None]
        d_proj, d_gate = d_pair * self.gate, d_pair * self.proj * self.gate * (1 - self.gate)
        grads["w_proj"], grads["w_gate"] = _outer(self.x, d_proj), _outer(self.x, d_gate)
        d_x = d_proj @ w_proj.T + d_gate @ w_gate.T + d_pre @ w_out_gate.T
        grads["z"], grads["ln_in"] = _normalise_gradient(d_x, ln_in, self.x_hat, self.std_in)
        return grads


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def _normalise_gradient(d_out, affine, x_hat, std):
    """Gradients of the input, and of scale and offset."""
    if affine is None:
        return d_out, None
    d_hat = d_out * affine[0]
    mean, along = d_hat.mean(axis=-1, keepdims=True), (d_hat * x_hat).mean(axis=-1, keepdims=True)
    axes = tuple(range(d_out.ndim - 1))
    return (d_hat - mean - x_hat * along) / std, ((d_out * x_hat).sum(axes), d_out.sum(axes))
