"""Self-attention of the decoder families: projections, q/k norms, rotary positions; what attends is passed in."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers.linear import Linear
from jaxlab.layers.norm import RMSNorm
from jaxlab.layers.rope import apply_rope


class SelfAttention(nn.Module):
    """Grouped-query self-attention (Ainslie et al., 2023, arXiv:2305.13245) around an attention function.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key and value heads Hkv; query head h reads head h // (H / Hkv).
        head_dim: head size Dh.
        qkv_bias: biases on q, k and v (Qwen2).
        qk_norm: RMSNorm of q and k before rotation: None, "head" (each head by itself, Qwen3), "full" (over all
            heads together, OLMoE).
        norm_epsilon: of those norms.
        dtype: compute dtype; None keeps that of x.
        param_dtype: stored dtype.
        out_init_scale: `Linear.init_scale` of the output projection.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: str | None = None
    norm_epsilon: float = 1e-5
    dtype: str | None = None
    param_dtype: str = "float32"
    out_init_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cos: Float[Array, "_ t half"],
        sin: Float[Array, "_ t half"],
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Projects, rotates, attends, projects back.

        Args:
            x: normed block input.
            cos: of `rope_tables`.
            sin: of `rope_tables`.
            attend: (q[B,T,H,Dh], k[B,T,Hkv,Dh], v) -> (out[B,T,H,Dh], anything the caller wants back).

        Returns:
            The output and what `attend` gave beside it.
        """
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, heads: int, axis: str) -> Array:
            names = ("embed", axis, "head_dim")
            return Linear((heads, self.head_dim), names, use_bias=self.qkv_bias, name=name, **policy)(x)

        if self.has_variable("params", "qkv"):  # joined by `inference.decode_params`
            kv_end = self.num_heads + self.num_kv_heads
            q, k, v = jnp.split(project("qkv", kv_end + self.num_kv_heads, "heads"), (self.num_heads, kv_end), axis=2)
        else:
            q, k = project("q", self.num_heads, "heads"), project("k", self.num_kv_heads, "kv_heads")
            v = project("v", self.num_kv_heads, "kv_heads")
        q, k = self._norm("q_norm", q, "heads"), self._norm("k_norm", k, "kv_heads")
        out, extra = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        names = ("heads", "head_dim", "embed")
        o = Linear((x.shape[-1],), names, in_axes=2, init_scale=self.out_init_scale, name="o", **policy)
        return o(out), extra

    def _norm(self, name: str, x: Float[Array, "b t h dim"], axis: str) -> Float[Array, "b t h dim"]:
        if self.qk_norm is None:
            return x
        if self.qk_norm == "head":
            return RMSNorm(self.norm_epsilon, "head_dim", self.param_dtype, name=name)(x)
        flat = x.reshape(*x.shape[:2], -1)
        return RMSNorm(self.norm_epsilon, axis, self.param_dtype, name=name)(flat).reshape(x.shape)
