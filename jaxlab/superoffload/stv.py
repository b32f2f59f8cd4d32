"""Speculation, then validation: step before the gradients are known to be good, and undo it exactly if they are not.

`speculate` then `commit` gives the bits of `replay`, the synchronous step; so does `speculate`, `rollback`, `replay`,
which is what clipping needs. A rolled-back step of gradients that are not finite leaves no trace. (Paper, section on
speculation-then-validation; the official code rolls back by algebra in float32, which is not exact.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxlab.superoffload import host_adam
from jaxlab.superoffload.bucket import BucketSpec, flatten
from jaxlab.superoffload.bucket_step import (
    Copies,
    is_traced,
    overflowed,
    scalars_of,
    speculate_bucket,
    step_bucket,
    undo_bucket,
)
from jaxlab.superoffload.host_adam import AdamHyper
from jaxlab.superoffload.host_kernel import Residual
from pallas_kernels.grad_stats import grad_stats

Buckets = Sequence[Float[Array, " _"]]
UNDO = ("copy", "residual")


@struct.dataclass
class SpeculativeState:
    """Master parameters and moments in flat buckets.

    Attributes:
      p: parameters, f32 [sizes[b]] each.
      m: first moments.
      v: second moments.
      count: int32 scalar, steps that count; a speculation does not before it is committed.
      pending: whether a speculation waits for `commit` or `rollback` (structure, not data).
    """

    p: Any
    m: Any
    v: Any
    count: Any
    pending: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class UndoLog:
    """What takes a speculation back.

    Attributes:
      buckets: `Copies` or `Residual` of each.
      grads: the gradients speculated on; a residual log needs them, and shares them with the caller.
      scalars: f32 [12] of that step.
      count: int32 scalar, the state's when it speculated.
      mode: "adamw" or "adam".
      backend: which wrote it.
    """

    buckets: Any
    grads: Any
    scalars: Any
    count: Any
    mode: str = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False)

    @property
    def exact(self) -> Bool[Array, " b"]:
        """By bucket; False where a residual log had no room for its exceptions, which happens under `jit` only."""
        found = [x.status[1] == 0 if isinstance(x, Residual) else jnp.bool_(True) for x in self.buckets]
        return jnp.stack(found) if found else jnp.ones((0,), bool)

    @property
    def nbytes(self) -> int:
        """Bytes of the log itself; the gradients are the caller's."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.buckets))


class Verdict(NamedTuple):
    """What the validator found.

    Attributes:
      norm: f32, global norm of the un-scaled gradients, before clipping.
      finite: bool, every gradient and the norm are finite.
      coef: f32, multiplies the gradients: 1 unless clipped, 0 if not finite.
    """

    norm: Float[Array, ""]
    finite: Bool[Array, ""]
    coef: Float[Array, ""]


def init_state(params: PyTree, spec: BucketSpec) -> SpeculativeState:
    """The state before the first step: parameters as they are, moments zero.

    Raises:
      ValueError: params do not match the spec.
    """
    p = flatten(params, spec)
    m, v = (tuple(jnp.zeros(x.shape, jnp.float32) for x in p) for _ in range(2))
    return SpeculativeState(p, m, v, jnp.zeros((), jnp.int32))


def validate(
    grads: Buckets,
    *,
    scale: Any = 1.0,
    clip_norm: float | None = None,
    clip_eps: float = 1e-6,
    axis_name: str | tuple[str, ...] | None = None,
) -> Verdict:
    """Norm, finiteness and clipping coefficient min(1, clip_norm / (norm + clip_eps)) of all buckets together.

    Squares are summed in float32, bucket after bucket, so the norm's last bit may depend on how a state is cut.

    Args:
      grads: buckets, any floating dtype.
      scale: multiplies them: the inverse of the loss scale.
      clip_norm: largest norm; None does not clip.
      clip_eps: 1e-6 as DeepSpeed and torch have it, 0 as Optax.
      axis_name: inside `jax.shard_map`, of the ranks that each have a slice of every bucket; all get the same verdict.

    Raises:
      ValueError: clip_norm not positive, negative clip_eps.
    """
    if clip_norm is not None and not isinstance(clip_norm, jax.core.Tracer) and not clip_norm > 0:
        raise ValueError(f"clip_norm: expected a value > 0, or None for no clipping, got {clip_norm}")
    if not isinstance(clip_eps, jax.core.Tracer) and not clip_eps >= 0:
        raise ValueError(f"clip_eps: expected a value >= 0, got {clip_eps}")
    return _validate(tuple(grads), scale, clip_norm, clip_eps, axis_name)


@functools.partial(jax.jit, static_argnums=4)
def _validate(grads: tuple[Array, ...], scale: Any, clip_norm: Any, clip_eps: Any, axis_name: Any) -> Verdict:
    def norm_of(grads: tuple[Array, ...], factor: float) -> tuple[Array, Array]:
        total, finite = jnp.zeros((), jnp.float32), jnp.bool_(True)
        for g in grads:
            part, good = grad_stats(g if factor == 1 else g.astype(jnp.float32) * factor)
            total, finite = total + part, finite & good
        if axis_name is not None:
            total, finite = lax.psum(total, axis_name), lax.pmin(finite.astype(jnp.int32), axis_name) == 1
        return jnp.sqrt(total) / factor, finite

    norm, finite = norm_of(grads, 1.0)
    # Gradients beyond 1.8e19 are finite and their squares are not: a second look, at smaller ones.
    norm = lax.cond(finite & jnp.isinf(norm), lambda grads: norm_of(grads, 2.0**-64)[0], lambda _: norm, grads)
    norm = norm * jnp.asarray(scale, jnp.float32)
    finite = finite & jnp.isfinite(norm)
    coef = jnp.ones((), jnp.float32)
    if clip_norm is not None:
        coef = jnp.minimum(coef, jnp.asarray(clip_norm, jnp.float32) / (norm + clip_eps))
    return Verdict(norm, finite, jnp.where(finite, coef, 0))


def speculate(
    state: SpeculativeState,
    grads: Buckets,
    hyper: AdamHyper,
    *,
    scale: Any = 1.0,
    undo: str = "copy",
    backend: str = "auto",
    capacity: float = 0.01,
    donate: bool = False,
    reuse: UndoLog | None = None,
) -> tuple[SpeculativeState, UndoLog]:
    """Steps every bucket as if the gradients were good, and keeps what takes that back.

    "copy" keeps the old arrays: 12 bytes a parameter. "residual" keeps 3.2: the difference of the old values to the
    algebraic inverse of the new ones, and the values where that does not suffice. Where more than `capacity` of a
    bucket are such (gradients far larger than before, or not finite), the bucket is copied after all; under `jit`,
    where that cannot be decided, `log.exact` is False for it.

    Args:
      state: not pending.
      grads: buckets as `flatten` makes them.
      hyper: of Adam or AdamW.
      scale: multiplies the gradients: the inverse of the loss scale.
      undo: "copy" or "residual".
      backend: as for `fused_adamw`.
      capacity: room for exceptions of a residual log, as a part of the bucket.
      donate: consume the state, so that a residual speculation by "ffi" works in place.
      reuse: a log of such a state that is no longer needed, whose memory becomes the new arrays'.

    Returns:
      The pending state, and the log for `rollback`.

    Raises:
      RuntimeError: a speculation is pending; backend "ffi" without a C++ compiler.
      ValueError: gradients that do not match the state, unknown undo or backend, capacity outside (0, 1].
      NotImplementedError: undo="residual" for an optimizer other than Adam(W).
      TypeError: hyper is no `AdamHyper`.
    """
    if state.pending:
        raise RuntimeError("speculate: a speculation is pending; commit it or roll it back first")
    if undo not in UNDO:
        raise ValueError(f"undo: expected one of {UNDO}, got {undo!r} (without undo, `replay` is the step)")
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity: expected a value in (0, 1], got {capacity}")
    if undo == "residual" and not isinstance(hyper, AdamHyper):
        raise NotImplementedError(
            f"undo='residual' inverts Adam and AdamW (AdamHyper) only, got {type(hyper).__name__}"
        )
    grads = _checked(state, grads, hyper)
    backend = host_adam.resolve(backend)
    scalars = scalars_of(state.count, hyper, scale)
    made, logs = [], []
    for b, (p, m, v, g) in enumerate(zip(state.p, state.m, state.v, grads)):
        spare = None if reuse is None or isinstance(reuse.buckets[b], Copies) != (undo == "copy") else reuse.buckets[b]
        settings = {"kind": undo, "backend": backend, "capacity": capacity, "donate": donate, "reuse": spare}
        new, _, entry = speculate_bucket((p, m, v), g, state.count, hyper, scale, scalars, **settings)
        made.append(new)
        logs.append(entry)
    log = UndoLog(tuple(logs), grads, scalars, state.count, hyper.mode, backend)
    return _with(state, made, pending=True), log


def commit(state: SpeculativeState) -> SpeculativeState:
    """Accepts the pending speculation: it counts as a step.

    Raises:
      RuntimeError: none is pending.
    """
    if not state.pending:
        raise RuntimeError("commit: no speculation is pending")
    return dataclasses.replace(state, count=state.count + 1, pending=False)


def rollback(state: SpeculativeState, log: UndoLog, *, donate: bool = False) -> SpeculativeState:
    """Takes the pending speculation back: every bit of p, m, v and count is as before.

    Args:
      state: as `speculate` returned it.
      log: returned with it.
      donate: consume the state, so that "ffi" works in place.

    Raises:
      RuntimeError: no speculation is pending (or it has been rolled back already).
      ValueError: a log of another step or of other buckets, or, outside `jit`, one that is not exact.
    """
    if not state.pending:
        raise RuntimeError("rollback: no speculation is pending")
    if len(log.buckets) != len(state.p) or any(g.shape != p.shape for g, p in zip(log.grads, state.p)):
        raise ValueError("log: expected one of this state's buckets, got one of other sizes")
    if not is_traced(state, log):
        if int(log.count) != int(state.count):
            raise ValueError(
                f"log: expected that of step {int(state.count) + 1}, got that of step {int(log.count) + 1}"
            )
        if full := [b for b, entry in enumerate(log.buckets) if overflowed(entry)]:
            where = ", ".join(map(str, full))
            raise ValueError(f"log: had no room for the exceptions of bucket {where}; expected log.exact to be true")
    settings = {"mode": log.mode, "backend": log.backend, "donate": donate}
    made = [
        undo_bucket((p, m, v), g, log.count, log.scalars, entry, **settings)
        for p, m, v, g, entry in zip(state.p, state.m, state.v, log.grads, log.buckets)
    ]
    return _with(state, made, pending=False)


def replay(
    state: SpeculativeState,
    grads: Buckets,
    hyper: AdamHyper,
    *,
    scale: Any = 1.0,
    coef: Any = 1.0,
    backend: str = "auto",
    donate: bool = False,
) -> SpeculativeState:
    """One complete step, which counts: what follows a rollback, and the synchronous step of those who do not speculate.

    Args:
      state: not pending.
      grads: buckets as `flatten` makes them.
      hyper: of Adam or AdamW.
      scale: multiplies the gradients: the inverse of the loss scale.
      coef: multiplies `scale`: the verdict's.
      backend: as for `fused_adamw`.
      donate: consume the state, so that the step is in place.

    Raises:
      RuntimeError: a speculation is pending; backend "ffi" without a C++ compiler.
      ValueError: gradients that do not match the state, unknown backend.
      TypeError: hyper is no `AdamHyper`.
    """
    if state.pending:
        raise RuntimeError("replay: a speculation is pending; commit it or roll it back first")
    grads = _checked(state, grads, hyper)
    backend = host_adam.resolve(backend)
    settings = {"backend": backend, "donate": donate}
    made = [
        step_bucket((p, m, v), g, state.count, hyper, scale, coef, **settings)[0]
        for p, m, v, g in zip(state.p, state.m, state.v, grads)
    ]
    return _with(state, made, count=state.count + 1)


def _checked(state: SpeculativeState, grads: Buckets, hyper: AdamHyper) -> tuple[Array, ...]:
    if not isinstance(hyper, AdamHyper):
        raise TypeError(f"hyper must be an AdamHyper, got {type(hyper).__name__}")
    grads = tuple(jnp.asarray(g) for g in grads)
    if len(grads) != len(state.p):
        raise ValueError(f"grads: expected {len(state.p)} buckets, got {len(grads)}")
    for b, (g, p) in enumerate(zip(grads, state.p)):
        if g.shape != p.shape:
            raise ValueError(f"grads: bucket {b} must have shape {p.shape}, got {g.shape}")
        if not jnp.issubdtype(g.dtype, jnp.floating):
            raise TypeError(f"grads: bucket {b} must be floating, got {g.dtype}")
    return grads


def _with(state: SpeculativeState, buckets: Sequence[Sequence[Array]], **changes: Any) -> SpeculativeState:
    p, m, v = (tuple(bucket[i] for bucket in buckets) for i in range(3))
    return dataclasses.replace(state, p=p, m=m, v=v, **changes)
