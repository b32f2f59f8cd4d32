"""The obvious product with packed experts: the specification that every other implementation is held to."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.grouped_matmul.gating import activate
from pallas_kernels.grouped_matmul.reference import owners
from pallas_kernels.packed_moe_matmul.bits import Slots, decode, resolve
from pallas_kernels.packed_moe_matmul.codes import decode_codes


def rows_times_experts(
    rows: Float[Array, "m k"],
    weights: Sequence[Slots],
    group_sizes: Int[Array, " e"],
    slot_of: Int[Array, " e"],
    pos_of: Int[Array, " e"],
    *,
    act: str | None,
    transpose: bool,
    dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Row i of expert e gives `rows[i] @ matrix(e)` (or its transpose), or the gated product of two `weights`."""
    experts = group_sizes.shape[0]
    precise = jnp.promote_types(rows.dtype, jnp.float32)
    owner = owners(group_sizes, rows.shape[0])[:, None]
    rows = jnp.where(owner < experts, rows, 0).astype(precise)
    n = weights[0].inputs if transpose else weights[0].words.shape[2]

    def add_expert(out, expert):
        index, slot, pos, poison = expert
        matrices = [_matrix(slots, slot, pos, precise) for slots in weights]
        products = [
            jnp.dot(rows, matrix.T if transpose else matrix, precision=jax.lax.Precision.HIGHEST) for matrix in matrices
        ]
        product = products[0] if act is None else activate(products[0], act) * products[1]
        return jnp.where(owner == index, product + poison.astype(precise), out), None

    start = zeros_alike((rows.shape[0], n), precise, rows)
    addresses = resolve(slot_of, pos_of, weights[0].number)
    return jax.lax.scan(add_expert, start, (jnp.arange(experts), *addresses))[0].astype(dtype)


def _matrix(slots: Slots, slot: Int[Array, ""], pos: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "k n"]:
    packed = slots.words.shape[0]
    address = jnp.minimum(slot, packed - 1)
    if slots.scales is None:
        decoded = decode(slots.words[address], pos, dtype)
    else:
        decoded = decode_codes(slots.words[address], slots.scales[address], pos, dtype, slots.bits)
    if slots.dense is None:
        return decoded
    return jnp.where(slot < packed, decoded, slots.dense[jnp.maximum(slot - packed, 0)].astype(dtype))
