"""The one linear map of the library: several input and output axes, logical axis names, one flat matrix product."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, DTypeLike, Float

from jaxlab.layers.sharding import named

_FEW_ROWS = 16


def few_rows(x: Float[Array, "m k"], kernel_t: Float[Array, "n k"], out_dtype: DTypeLike) -> Float[Array, "m n"]:
    """`x @ kernel_t.T`, fast on a CPU for the few rows of a decode step, whose cost is reading the kernel.

    Few rows are multiplied and summed instead of contracted: measured a tenth faster than XLA's product of the same
    rows, and a row's result does not depend on its mates.
    """
    if x.shape[0] == 1:
        # Of one row XLA makes a scalar loop, eighty times slower; beside a copy it also gives what it gives in a batch.
        return few_rows(jnp.concatenate([x, x]), kernel_t, out_dtype)[:1]
    if x.shape[0] <= _FEW_ROWS:
        wide = jnp.promote_types(kernel_t.dtype, jnp.float32)
        return jnp.sum(kernel_t.astype(wide) * x.astype(wide)[:, None, :], axis=-1).astype(out_dtype)
    return jax.lax.dot_general(kernel_t, x, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype).T


class Linear(nn.Module):
    """Contracts the last `in_axes` axes of x with a kernel `[*inputs, *features]`.

    Attributes:
        features: output axes; `(heads, head_dim)` gives `[..., heads, head_dim]`.
        names: logical axis names of the kernel, one for each of its axes.
        in_axes: how many trailing axes of x are contracted.
        use_bias: adds a bias of shape `features`.
        dtype: dtype of the factors; None keeps that of x.
        out_dtype: dtype of the result (accumulation is never narrower than float32); None is that of the factors.
        param_dtype: dtype in which the parameters are stored.
        init_scale: standard deviation of the kernel times sqrt(fan in).
    """

    features: tuple[int, ...]
    names: tuple[str | None, ...]
    in_axes: int = 1
    use_bias: bool = False
    dtype: str | None = None
    out_dtype: str | None = None
    param_dtype: str = "float32"
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *inputs]` to `[..., *features]`."""
        inputs = x.shape[x.ndim - self.in_axes :]
        fan_in, fan_out = math.prod(inputs), math.prod(self.features)
        lead = x.shape[: x.ndim - self.in_axes]
        dtype = jnp.dtype(self.dtype or x.dtype)
        out_dtype = jnp.dtype(self.out_dtype or dtype)
        if self.has_variable("params", "kernel_t"):
            # The form of `inference.decode_params`, [outputs, inputs].
            kernel_t = self.get_variable("params", "kernel_t").astype(dtype)
            y = few_rows(x.astype(dtype).reshape(-1, fan_in), kernel_t, out_dtype)
            return self._biased(y.reshape(*lead, *self.features))
        init = nn.initializers.truncated_normal(self.init_scale / math.sqrt(fan_in))
        kernel = self.param("kernel", named(init, self.names), (*inputs, *self.features), jnp.dtype(self.param_dtype))
        # Two flat matrices: XLA's CPU backend multiplies these without a copy, and the kernel's gradient, too. Under a
        # mesh the batch and sequence axes may be split, so there they stay apart.
        rows = (math.prod(lead),) if jax.sharding.get_abstract_mesh().empty else lead
        y = _product(x, kernel, (*rows, fan_in), (fan_in, fan_out), dtype, out_dtype)
        return self._biased(y.reshape(*lead, *self.features))

    def _biased(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.use_bias:
            bias_init = named(nn.initializers.zeros_init(), self.names[self.in_axes :])
            y = y + self.param("bias", bias_init, self.features, jnp.dtype(self.param_dtype)).astype(y.dtype)
        return y


# Checkpointed: the backward pass keeps the arguments as they are and casts them again. The product is not repeated.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3, 4, 5))
def _product(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    rows: tuple[int, ...],
    columns: tuple[int, int],
    dtype: DTypeLike,
    out_dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The product of x, reshaped to `rows`, and the kernel, reshaped to `columns`, both in `dtype`."""
    contract = (((len(rows) - 1,), (0,)), ((), ()))
    x, kernel = x.astype(dtype).reshape(rows), kernel.astype(dtype).reshape(columns)

    def multiply(x, kernel):
        return jax.lax.dot_general(x, kernel, contract, preferred_element_type=out_dtype)

    def multiply_twice(x, kernel):
        return multiply(jnp.concatenate([x, x]), kernel)[:1]

    if math.prod(rows[:-1]) != 1:
        return multiply(x, kernel)
    # Of one row XLA's GPU compiler makes a sum over transposed kernels, and of a scan's it stores all, every time.
    return jax.lax.platform_dependent(x, kernel, cuda=multiply_twice, default=multiply)
