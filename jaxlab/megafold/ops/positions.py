"""Where two tokens stand to each other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def relative_position(
    asym_id: Int[Array, "*batch n"],
    residue_index: Int[Array, "*batch n"],
    entity_id: Int[Array, "*batch n"],
    sym_id: Int[Array, "*batch n"],
    token_index: Int[Array, "*batch n"],
    *,
    r_max: int = 32,
    s_max: int = 2,
) -> Float[Array, "*batch n n width"]:
    """One-hot offsets of pairs of tokens (AlphaFold3, algorithm 3), float32.

    Side by side: the residues' offset i - j, clipped to r_max, or "other chain" (2 r_max + 2 bits); the tokens' offset
    inside one residue, or "other residue" (as many); same entity (1 bit); the copies' offset of one entity, clipped to
    s_max, or "other entity" (2 s_max + 2 bits): 139 by default. The last goes by entity, as in AlphaFold3's code and
    Protenix, so that copies of one sequence are told apart.

    Args:
      asym_id: chain.
      residue_index: place in the chain's sequence.
      entity_id: sequence.
      sym_id: which copy of it.
      token_index: place among all tokens.
      r_max: largest offset of residues and tokens.
      s_max: largest offset of copies.

    Raises:
      ValueError: shapes that differ, r_max or s_max below 0.
    """
    given = {"residue_index": residue_index, "entity_id": entity_id, "sym_id": sym_id, "token_index": token_index}
    for name, x in given.items():
        if x.shape != asym_id.shape or not x.ndim:
            raise ValueError(f"{name}: expected the shape of asym_id, [..., N] = {asym_id.shape}, got {x.shape}")
    if r_max < 0 or s_max < 0:
        raise ValueError(f"r_max, s_max: expected at least 0, got {r_max}, {s_max}")

    def same(x: Array) -> Array:
        return x[..., :, None] == x[..., None, :]

    def offset(x: Array, limit: int, where: Array) -> Array:
        clipped = jnp.clip(x[..., :, None] - x[..., None, :] + limit, 0, 2 * limit)
        return jax.nn.one_hot(jnp.where(where, clipped, 2 * limit + 1), 2 * limit + 2, dtype=jnp.float32)

    chain, entity = same(asym_id), same(entity_id)
    parts = (
        offset(residue_index, r_max, chain),
        offset(token_index, r_max, chain & same(residue_index)),
        entity[..., None].astype(jnp.float32),
        offset(sym_id, s_max, entity),
    )
    return jnp.concatenate(parts, axis=-1)
