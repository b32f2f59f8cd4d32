"""A dropless mixture-of-experts MLP: tokens sorted by expert, one grouped matrix product for each weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlab.layers.linear import Linear
from jaxlab.layers.mlp import GatedMLP
from jaxlab.layers.sharding import named
from pallas_kernels.grouped_matmul import grouped_matmul


def route(
    logits: Float[Array, "s e"], top_k: int, *, scoring: str = "softmax", renormalise: bool = False, scale: float = 1.0
) -> tuple[Int[Array, "s k"], Float[Array, "s k"]]:
    """The k experts of each token and their weights, in float32; equal scores go to the lower index.

    Args:
        logits: router outputs, float32.
        top_k: experts a token visits.
        scoring: "softmax" over the experts, or "sigmoid" of each.
        renormalise: divide the k weights by their sum.
        scale: multiplies the weights last.
    """
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    weights, experts = jax.lax.top_k(scores, top_k)
    if renormalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.finfo(weights.dtype).tiny)
    return experts, weights * scale


class SparseMLP(nn.Module):
    """scale * sum over the token's k experts of weight * down(silu(gate x) * up x), plus the shared expert.

    Nothing is dropped and nothing is padded: rows are sorted by expert and meet their weights in `grouped_matmul`.

    Attributes:
        num_experts: E.
        top_k: experts a token visits.
        ffn_size: inner width F of an expert.
        shared_ffn_size: inner width of the expert that every token visits; 0 for none.
        shared_gate: scales the shared expert by sigmoid(x @ shared_gate) (Qwen2-MoE).
        renormalise: divides the k weights by their sum.
        scoring: "softmax" or "sigmoid".
        scale: multiplies the routed sum.
        dtype: compute dtype; None keeps that of x. Router and weights are float32.
        param_dtype: stored dtype.
        out_init_scale: `Linear.init_scale` of the down projections.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    shared_ffn_size: int = 0
    shared_gate: bool = False
    renormalise: bool = False
    scoring: str = "softmax"
    scale: float = 1.0
    dtype: str | None = None
    param_dtype: str = "float32"
    out_init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"], *, train: bool = False) -> Float[Array, "*batch d"]:
        """Maps `[..., D]` to `[..., D]`; `train` is accepted for the MLP protocol and changes nothing."""
        dtype = jnp.dtype(self.dtype or x.dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        features, width = rows.shape[-1], self.ffn_size
        router = Linear((self.num_experts,), ("embed", "expert"), dtype="float32", param_dtype=self.param_dtype)
        logits = router.copy(name="router")(rows)
        experts, weights = route(
            logits, self.top_k, scoring=self.scoring, renormalise=self.renormalise, scale=self.scale
        )

        gate = self._experts("gate", ("expert", "embed", "mlp"), (features, width), 1.0)
        up = self._experts("up", ("expert", "embed", "mlp"), (features, width), 1.0)
        down = self._experts("down", ("expert", "mlp", "embed"), (width, features), self.out_init_scale)
        # Slot s*k+j is the j-th expert of token s; `order` lists the slots expert after expert.
        order = jnp.argsort(experts.reshape(-1), stable=True)
        place = jnp.argsort(order)
        group_sizes = jnp.bincount(experts.reshape(-1), length=self.num_experts).astype(jnp.int32)
        sorted_rows = _spread(rows, order, place, self.top_k)
        inner = jax.nn.silu(grouped_matmul(sorted_rows, gate.astype(dtype), group_sizes))
        inner = inner * grouped_matmul(sorted_rows, up.astype(dtype), group_sizes)
        outputs = _permute(grouped_matmul(inner, down.astype(dtype), group_sizes), place, order)
        outputs = outputs.reshape(-1, self.top_k, features).astype(jnp.float32)
        y = jnp.sum(outputs * weights[..., None], axis=1).astype(dtype)

        if self.shared_ffn_size:
            policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            shared = GatedMLP(self.shared_ffn_size, out_init_scale=self.out_init_scale, name="shared", **policy)(rows)
            if self.shared_gate:
                gate_logit = Linear((1,), ("embed", None), name="shared_gate", **policy)(rows)
                shared = shared * jax.nn.sigmoid(gate_logit)
            y = y + shared
        return y.reshape(x.shape)

    def _experts(
        self, name: str, names: tuple[str, ...], shape: tuple[int, int], init_scale: float
    ) -> Float[Array, "e k n"]:
        init = nn.initializers.truncated_normal(init_scale / np.sqrt(shape[0]))
        return self.param(name, named(init, names), (self.num_experts, *shape), jnp.dtype(self.param_dtype))


@jax.custom_vjp
def _permute(x: Float[Array, "m d"], order: Int[Array, " m"], inverse: Int[Array, " m"]) -> Float[Array, "m d"]:
    """x[order]; its transpose is a gather by the inverse permutation, where JAX would scatter row by row."""
    return x[order]


def _permute_fwd(x, order, inverse):
    return x[order], inverse


def _permute_bwd(inverse, dy):
    return dy[inverse], None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(
    x: Float[Array, "s d"], order: Int[Array, " m"], inverse: Int[Array, " m"], top_k: int
) -> Float[Array, "m d"]:
    """Row order[i] // k of x at i; the transpose gathers each token's k gradients and adds them."""
    return x[order // top_k]


def _spread_fwd(x, order, inverse, top_k):
    return x[order // top_k], inverse


def _spread_bwd(top_k, inverse, dy):
    return jnp.sum(dy[inverse].reshape(-1, top_k, dy.shape[-1]), axis=1), None, None


_spread.defvjp(_spread_fwd, _spread_bwd)
