"""The public product with packed experts: checks, choice of implementation, the gradient of the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8, UInt16

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.grouped_matmul.gating import ACTIVATIONS, activate
from pallas_kernels.packed_moe_matmul import reference, triton, xla
from pallas_kernels.packed_moe_matmul.bits import AnyArray, Slots, check_members, check_words, is_concrete
from pallas_kernels.packed_moe_matmul.codes import BITS, check_codes, check_groups

_OP = "packed_moe_matmul"
_TABLE = implementations(reference.rows_times_experts, xla.rows_times_experts, triton.rows_times_experts)


def packed_moe_matmul(
    x: Float[AnyArray, "m k"],
    words: UInt16[AnyArray, "s k n"] | UInt8[AnyArray, "s r n"],
    group_sizes: Integer[AnyArray, " e"],
    slot_of: Integer[AnyArray, " e"],
    pos_of: Integer[AnyArray, " e"],
    *,
    words_up: UInt16[AnyArray, "s k n"] | UInt8[AnyArray, "s r n"] | None = None,
    dense: Float[AnyArray, "d k n"] | None = None,
    dense_up: Float[AnyArray, "d k n"] | None = None,
    act: str | None = None,
    scales: Float[AnyArray, "s g n"] | None = None,
    scales_up: Float[AnyArray, "s g n"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "m n"]:
    """Multiplies every row with the matrix of its expert, which is decoded from packed words on the way.

    The rows of `x` lie expert after expert: the first `group_sizes[0]` belong to expert 0, and so on. Expert e is
    member `pos_of[e]` of slot `slot_of[e]`. Slots past those of `words` are whole matrices of `dense`: experts that
    were not paired. No expert's rows are padded, an expert may have none (its words are then not read), and rows past
    `sum(group_sizes)` belong to nobody: they give zero rows and take zero gradient, whatever they hold (NaN too).

    With `scales` the pairs are quantised: `words` are the bytes of `pack_codes`, with as many rows as the matrices have
    (8 bits a position) or three quarters of them (6 bits), and a group of inputs of a column shares a scale. Levels are
    exact in every dtype and scales are applied in float32; tensor cores take scaled weights, rounded to the dtype of
    the rows, for gradients only.

    With `words_up` every row gives `act(row @ W[e]) * (row @ U[e])`, the first half of a gated expert, and the two
    products are not stored.

    Differentiable in `x` (reverse mode), and in nothing else: packed weights are not trained. Usable under `jit`,
    `vmap` (one element after the other), `jax.checkpoint` and `shard_map`. Sums are taken in float32 (float64 for
    float64 rows).

    On a GPU few rows (a decode step) take a kernel that reads the words of a slot once for both of its members. One
    active expert still costs 16 bits a weight, as in bfloat16: sharing is the only saving of bandwidth.

    Args:
      x: rows, any floating dtype.
      words: packed matrices of the slots, [slots, inputs, outputs] (`unpack` reads them); codes where scales are given
        (`unpack_codes` reads those).
      group_sizes: rows of each expert, any integer dtype; not negative, together at most m.
      slot_of: slot of each expert.
      pos_of: which member of its slot each expert is, 0 or 1; of no consequence in dense slots.
      words_up: a second matrix for each slot; `words` is then the gate.
      dense: matrices of the slots past those of `words`, any floating dtype.
      dense_up: the same for `words_up`.
      act: of the gate: "silu" (also called "swiglu") or "gelu" (the exact one); goes with `words_up`, and only with it.
      scales: steps between levels, [slots, groups, outputs], floating; a group is a multiple of 4 inputs.
      scales_up: the same for `words_up`.
      implementation: "triton" (CUDA, ROCm), "xla" (anywhere), "interpret" (the Triton kernels, interpreted, for tests),
        "reference", or several of them to be tried in order; None takes the best for the platform for which the program
        is lowered.

    Returns:
      The products, [m, n], in the dtype of `x`. Where traced `slot_of` or `pos_of` name no matrix, the rows of that
      expert are NaN (concrete ones are an error).

    Raises:
      ValueError: ranks, shapes or the number of experts disagree; `words_up` without `act` or the reverse, an unknown
        `act`; concrete sizes are negative or exceed m, concrete slots do not exist or positions are neither 0 nor 1;
        unknown implementation.
      TypeError: words are not uint16 (codes not uint8), rows, dense matrices or scales not floating, sizes, slots or
        positions not integers.
      NotImplementedError: a gradient of `dense` or `scales` is wanted; the implementation asked for cannot serve the
        dtype, the size of groups or the platform (the latter when the program is lowered).
    """
    names = check_names(_OP, _TABLE, implementation)
    x, words, group_sizes, slot_of, pos_of = map(jnp.asarray, (x, words, group_sizes, slot_of, pos_of))
    words_up, dense, dense_up, scales, scales_up = (
        None if w is None else jnp.asarray(w) for w in (words_up, dense, dense_up, scales, scales_up)
    )
    _check(x, words, group_sizes, slot_of, pos_of, quantised=scales is not None)
    bits = _check_scales(x.shape[1], words, words_up, scales, scales_up)
    _check_gate(x.shape[1], words, words_up, dense, dense_up, act, quantised=scales is not None)
    _check_values(x, group_sizes, slot_of, pos_of, words.shape[0] + (0 if dense is None else dense.shape[0]))
    act = None if act is None else ACTIVATIONS[act]
    of_gate, of_up = (words, dense, scales), (words_up, dense_up, scales_up)
    return _jitted(x, of_gate, of_up, group_sizes, slot_of, pos_of, act=act, bits=bits, implementation=names)


def _check(x: Array, words: Array, group_sizes: Array, slot_of: Array, pos_of: Array, *, quantised: bool) -> None:
    per_expert = (("group_sizes", group_sizes), ("slot_of", slot_of), ("pos_of", pos_of))
    for name, array, rank in (("x", x, 2), ("words", words, 3), *((name, array, 1) for name, array in per_expert)):
        if array.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {array.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}")
    (check_codes if quantised else check_words)("words", words)
    for name, array in per_expert:
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        if array.shape != group_sizes.shape:
            raise ValueError(
                f"{name} must have one entry for each of the {group_sizes.shape[0]} experts of group_sizes, got "
                f"{array.shape}"
            )
    if x.shape[1] != words.shape[1] and not quantised:
        raise ValueError(f"x [m, k] and words [slots, k, n] must agree in k, got {x.shape} and {words.shape}")
    if words.shape[0] == 0:
        raise ValueError(f"words must hold at least one slot, got {words.shape}")


def _check_scales(k: int, words: Array, words_up: Array | None, scales: Array | None, scales_up: Array | None) -> int:
    """Bits of a position."""
    if (scales_up is None) != (scales is None or words_up is None):
        raise ValueError("scales_up must be given with scales and words_up, and only then")
    if scales is None:
        return 16
    slots, rows, n = words.shape
    bits = next((bits for bits in BITS if rows * 8 == k * bits), None)
    if bits is None:
        raise ValueError(
            "words [slots, r, n] of x [m, k] must have r = k (8 bits) or r = 3 k / 4 (6 bits) where scales are given, "
            f"got {words.shape} and k = {k}"
        )
    for name, array in (("scales", scales), ("scales_up", scales_up)):
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")
        if array.ndim != 3 or (array.shape[0], array.shape[2]) != (slots, n) or array.shape != scales.shape:
            raise ValueError(f"{name} must be [{slots}, groups, {n}] as words, the same for both, got {array.shape}")
        if array.shape[1] == 0 or k % array.shape[1]:
            raise ValueError(f"{name} must have as many groups as divide k = {k}, got {array.shape}")
    check_groups(bits, k // scales.shape[1])
    return bits


def _check_gate(
    k: int,
    words: Array,
    words_up: Array | None,
    dense: Array | None,
    dense_up: Array | None,
    act: str | None,
    *,
    quantised: bool,
) -> None:
    if (words_up is None) != (act is None):
        state = "without" if words_up is None else "with"
        raise ValueError(f"words_up and act go together, got act={act!r} {state} words_up")
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"unknown act {act!r}; expected one of: {', '.join(ACTIVATIONS)}")
    if words_up is not None:
        (check_codes if quantised else check_words)("words_up", words_up)
        if words_up.shape != words.shape:
            raise ValueError(f"words_up must have the shape of words, {words.shape}, got {words_up.shape}")
        if (dense is None) != (dense_up is None):
            raise ValueError("dense and dense_up go together where words_up is given, got only one of them")
    elif dense_up is not None:
        raise ValueError("dense_up goes with words_up, got it without")
    for name, array in (("dense", dense), ("dense_up", dense_up)):
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")
        if array.ndim != 3 or array.shape[1:] != (k, words.shape[2]):
            raise ValueError(f"{name} must be [slots, {k}, {words.shape[2]}] as words, got {array.shape}")
    if dense is not None and dense_up is not None and dense.shape != dense_up.shape:
        raise ValueError(f"dense_up must have the shape of dense, {dense.shape}, got {dense_up.shape}")


def _check_values(x: Array, group_sizes: Array, slot_of: Array, pos_of: Array, slots: int) -> None:
    if is_concrete(group_sizes):
        sizes = np.asarray(group_sizes).astype(np.int64)
        if (sizes < 0).any():
            raise ValueError(f"group_sizes must not be negative, got {sizes.min()} for expert {sizes.argmin()}")
        if sizes.sum() > x.shape[0]:
            raise ValueError(f"group_sizes sum to {sizes.sum()}, but x has {x.shape[0]} rows")
    if is_concrete(slot_of):
        wrong = [(e, int(s)) for e, s in enumerate(np.asarray(slot_of)) if not 0 <= s < slots]
        if wrong:
            raise ValueError(f"slot_of must be below the {slots} slots, got {wrong[0][1]} for expert {wrong[0][0]}")
    if is_concrete(pos_of):
        check_members("pos_of", pos_of)


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames=("act", "bits", "implementation"))
def _jitted(x, of_gate, of_up, group_sizes, slot_of, pos_of, *, act, bits, implementation):
    if 0 in (*x.shape, *of_gate[0].shape, *group_sizes.shape):
        return jnp.zeros((x.shape[0], of_gate[0].shape[2]), x.dtype)
    given = tuple(
        Slots(words, None if dense is None or dense.shape[0] == 0 else dense, scales, bits)
        for words, dense, scales in (of_gate, of_up)
        if words is not None
    )
    leaves, tree = jax.tree.flatten((x, given, *(array.astype(jnp.int32) for array in (group_sizes, slot_of, pos_of))))
    x, weights, group_sizes, slot_of, pos_of = jax.tree.unflatten(tree, vary_alike(*leaves))
    return _product(act, implementation, x, weights, group_sizes, slot_of, pos_of)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(act, implementation, x, weights, group_sizes, slot_of, pos_of):
    return _run(implementation, x, weights, group_sizes, slot_of, pos_of, act=act, transpose=False, dtype=x.dtype)


def _product_forward(act, implementation, *given):
    x, weights, *addresses = jax.tree.map(lambda leaf: leaf.value, given)
    for name in ("dense", "scales"):
        if any(getattr(getattr(slots, name), "perturbed", False) for slots in given[1]):
            raise NotImplementedError(
                f"{_OP} is differentiable in x only, but a gradient of {name} is wanted; wrap the weights in "
                "jax.lax.stop_gradient, or unpack them to train"
            )
    return _product(act, implementation, x, weights, *addresses), (x, weights, *addresses)


def _product_backward(act, implementation, residuals, grads):
    x, weights, *addresses = residuals
    if isinstance(grads, jax.custom_derivatives.SymbolicZero):
        return (jnp.zeros(x.shape, x.dtype), *(None,) * 4)
    run = functools.partial(_run, implementation, act=None)
    if act is None:
        d_x = run(grads, weights, *addresses, transpose=True, dtype=x.dtype)
    else:
        # The two products are made again: that is cheaper than keeping them.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        z, u = (run(x, (slots,), *addresses, transpose=False, dtype=wide) for slots in weights)
        d_z, d_u = jax.vjp(lambda z, u: activate(z, act) * u, z, u)[1](grads.astype(wide))
        of_gate, of_up = (
            run(d.astype(x.dtype), (slots,), *addresses, transpose=True, dtype=wide)
            for d, slots in zip((d_z, d_u), weights)
        )
        d_x = (of_gate + of_up).astype(x.dtype)
    return (d_x, *(None,) * 4)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _run(implementation, *args, **settings):
    # Under vmap one element after the other: kernels keep their grid, and the loops their in-place updates.
    call = functools.partial(dispatch, _OP, _TABLE, implementation, **settings)
    return jax.custom_batching.sequential_vmap(call)(*args)
