"""Slow-fast policy optimisation (SFPO, arXiv 2510.04072): fast passes over a batch, part of the way back, a slow pass.

    repeat inner_steps times: params, opt_state = one_pass(params, opt_state, batch)    fast trajectory
    params = slow + alpha * (params - slow)                                             reposition
    params, opt_state = one_pass(params, opt_state, batch)                              slow correction

It comes in two forms that give the same numbers: `sfpo_update`, a whole step in one call, and `sfpo`, an Optax
transformation that any training loop can use, provided it shows it the batch inner_steps + 1 times.

A schedule inside the inner optimiser counts its updates, whereas SFPO's learning rate stays the same throughout a step
(official code). Where it is not constant, inject it and set it at the beginning of each step:

    inner = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-6)
    opt_state = optax.tree.set(opt_state, learning_rate=schedule(step))
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlab.rl.config import check_choice, check_update
from jaxlab.rl.losses import Mean
from jaxlab.training.accumulate import sum_over

STATE_POLICIES = ("carry", "reset_fast")

Scalar = float | Float[Any, ""]
Flag = bool | Bool[Any, ""]
Pass = Callable[..., tuple[PyTree, PyTree, PyTree]]


class SFPOState(NamedTuple):
    """Where a cycle of `sfpo` stands.

    `slow` are the parameters it started from, `count` the updates since, `active` whether it has fast passes; `before`
    is, with "reset_fast", the inner state that it started from.
    """

    inner_state: Any
    slow: Any
    count: Int[Array, ""]
    active: Bool[Array, ""]
    before: Any


def _check(inner_steps: int, alpha: Any, state_policy: str, allow_extrapolation: bool) -> None:
    check_choice("state_policy", state_policy, STATE_POLICIES)
    known = 0.0 if isinstance(alpha, jax.core.Tracer) else float(alpha)
    check_update(inner_steps, known, allow_extrapolation=allow_extrapolation)


def _is_mean(leaf: Any) -> bool:
    return isinstance(leaf, Mean)


def _select(condition: Any, chosen: PyTree, otherwise: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)


def _rounded(x: Array, dtype: Any, wide: Any) -> Array:
    """What `dtype` can hold of x, as `wide`. Of a cast there and back XLA may think nothing (excess precision)."""
    precision = jnp.finfo(dtype)
    x = x.astype(wide)
    return x if dtype == wide else jax.lax.reduce_precision(x, precision.nexp, precision.nmant)


def _reposition(slow: PyTree, fast: PyTree, alpha: Any) -> PyTree:
    """The point slow + alpha * (fast - slow), in f32 at least; exact at alpha 0 and 1, and where nothing has moved."""

    def one(slow, fast):
        if not jnp.issubdtype(fast.dtype, jnp.inexact):
            return fast
        wide = jnp.promote_types(fast.dtype, jnp.float32)
        start, end, part = slow.astype(wide), _rounded(fast, fast.dtype, wide), jnp.asarray(alpha, wide)
        point = jnp.where((part == 1) | (start == end), end, start + part * (end - start))
        return _rounded(point, fast.dtype, wide).astype(fast.dtype)

    return jax.tree.map(one, slow, fast)


def sfpo(
    inner: optax.GradientTransformation,
    inner_steps: int = 3,
    alpha: Scalar = 0.8,
    updates_per_pass: int = 1,
    *,
    state_policy: Literal["carry", "reset_fast"] = "carry",
    allow_extrapolation: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Slow-fast updates as an Optax transformation around `inner`.

    One cycle is (inner_steps + 1) * updates_per_pass updates, and the caller gives the gradients of the same
    mini-batches in each of its inner_steps + 1 passes. The last fast update lands on the repositioned parameters; the
    next cycle starts from the parameters that it is given. It must be the last link of a chain: what follows would
    scale the jump. Under `optax.masked` or `multi_transform` only the leaves it is applied to have an anchor. Do not
    wrap it in `optax.MultiSteps`, and stop at a gradient that `make_pass` skips: cycle and batches would part.

    `update(grads, state, params, *, alpha=None, active=None)` takes both as traced values too, so changing them does
    not recompile; None is the constructor's `alpha`, and active. `alpha` counts at the last fast update, `active` at
    the first update of a cycle: an inactive cycle is one plain pass of `updates_per_pass` updates, never alpha = 0,
    which with a stateful optimiser is something else. Other extra arguments go to `inner`.

    It is the arithmetic of `sfpo_update`, bit for bit (two compiled programs may round differently), except that Optax
    adds updates to parameters: a weight that the jump takes to less than half its size, or through 0, is off by up to
    half a unit in the last place of what is added.

    Args:
      inner: the optimiser of every update, clipping and weight decay included.
      inner_steps: K, fast passes.
      alpha: part of the fast displacement that is kept. 1 is K + 1 plain passes.
      updates_per_pass: M, optimiser updates of a pass.
      state_policy: "carry": moments and counts of `inner` run through all updates (official); "reset_fast": the slow
        pass starts from those before the fast passes, of which the state holds a copy.
      allow_extrapolation: permits alpha > 1.

    Raises:
      ValueError: `inner_steps` or `updates_per_pass` below 1, `alpha` outside its range (traced values are not looked
        at), an unknown `state_policy`; from `update`, no `params`.
    """
    _check(inner_steps, alpha, state_policy, allow_extrapolation)
    if updates_per_pass < 1:
        raise ValueError(f"updates_per_pass: expected at least 1, got {updates_per_pass}")
    transform, constructed, resets = optax.with_extra_args_support(inner), alpha, state_policy == "reset_fast"
    jump = inner_steps * updates_per_pass - 1

    def copied(tree):  # the state must not share buffers with what it is a copy of: both may be donated
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)

    def init(params):
        inner_state = transform.init(params)
        before = copied(inner_state) if resets else optax.EmptyState()
        return SFPOState(inner_state, copied(params), jnp.zeros((), jnp.int32), jnp.ones((), bool), before)

    def update(updates, state, params=None, *, alpha=None, active=None, **extra_args):
        if params is None:
            raise ValueError("params: sfpo needs the parameters in update(grads, state, params), got None")
        if alpha is None:
            alpha = constructed
        else:
            _check(inner_steps, alpha, state_policy, allow_extrapolation)
        start = state.count == 0
        running = jnp.where(start, True if active is None else active, state.active)
        slow = _select(start, params, state.slow)
        before = _select(start, state.inner_state, state.before) if resets else state.before
        updates, inner_state = transform.update(updates, state.inner_state, params, **extra_args)
        landing = running & (state.count == jump)
        target = _reposition(slow, optax.apply_updates(params, updates), alpha)

        def landed(update, param, target):
            wide = jnp.promote_types(jnp.result_type(update, param), jnp.float32)
            target, param = target.astype(wide), param.astype(wide)
            way = jnp.where(target == param, 0, target - param)  # infinities included
            return jnp.where(landing, way, update.astype(wide))

        updates = jax.tree.map(landed, updates, params, target)
        if resets:
            inner_state = _select(landing, before, inner_state)
        length = jnp.where(running, (inner_steps + 1) * updates_per_pass, updates_per_pass)
        return updates, SFPOState(inner_state, slow, (state.count + 1) % length, running, before)

    return optax.GradientTransformationExtraArgs(init, update)


def slow_fast(
    pass_fn: Pass,
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    *,
    fast_passes: int | Int[Any, ""],
    alpha: Scalar,
    active: Flag = True,
    state_policy: Literal["carry", "reset_fast"] = "carry",
) -> tuple[PyTree, PyTree, PyTree]:
    """`fast_passes` + 1 passes over a batch, repositioned before the last one where `active`: what `sfpo_update` runs.

    `fast_passes`, `alpha` and `active` may be traced: one program makes slow-fast steps and any number of plain passes.
    """

    def body(index, carry):
        fast, fast_state, last = carry
        back = (index == fast_passes) & active
        fast = _select(back, _reposition(params, fast, alpha), fast)
        if state_policy == "reset_fast":
            fast_state = _select(back, opt_state, fast_state)
        fast, fast_state, metrics = pass_fn(fast, fast_state, batch)
        if isinstance(metrics, dict) and "skipped" in metrics:
            metrics = {**metrics, "skipped": metrics["skipped"] + last["skipped"]}
        return fast, fast_state, metrics

    pass_fn = jax.jit(pass_fn, inline=True)  # traced once, for its shapes and in the loop
    shapes = jax.eval_shape(pass_fn, params, opt_state, batch)[2]
    metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, fast_passes + 1, body, (params, opt_state, metrics))


def sfpo_update(
    pass_fn: Pass,
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    *,
    inner_steps: int = 3,
    alpha: Scalar = 0.8,
    active: Flag = True,
    state_policy: Literal["carry", "reset_fast"] = "carry",
    allow_extrapolation: bool = False,
) -> tuple[PyTree, PyTree, PyTree]:
    """One slow-fast step: inner_steps fast passes over `batch`, part of the way back, one slow pass.

    To be jitted, `params` and `opt_state` donated: the passes are one loop, compiled once, and beside them the step
    holds one copy of the parameters, with "reset_fast" one of `opt_state` too.

    Args:
      pass_fn: (params, opt_state, batch) -> (params, opt_state, metrics), as `make_pass` makes it.
      params: parameters.
      opt_state: state of the pass's optimiser.
      batch: the rollouts, the same for all passes.
      inner_steps: K, fast passes.
      alpha: part of the fast displacement that is kept; may be traced.
      active: False: one plain pass. May be traced, so switching it does not recompile.
      state_policy: as for `sfpo`.
      allow_extrapolation: permits alpha > 1.

    Returns:
      Parameters, state, and the metrics of the last pass; only `skipped` is the sum over all.

    Raises:
      ValueError: `inner_steps` below 1, `alpha` outside its range, an unknown `state_policy`.
    """
    _check(inner_steps, alpha, state_policy, allow_extrapolation)
    return slow_fast(
        pass_fn,
        params,
        opt_state,
        batch,
        fast_passes=jnp.where(active, inner_steps, 0),
        alpha=alpha,
        active=active,
        state_policy=state_policy,
    )


def make_pass(
    loss_fn: Callable[[PyTree, PyTree], tuple[Any, dict[str, Any]]],
    inner: optax.GradientTransformation,
    *,
    mini_batches: int = 1,
    micro_batches: int = 1,
) -> Pass:
    """One pass over a batch: its mini-batches in turn, contiguous slices of axis 0, one optimiser update each.

    `loss_fn(params, batch)` gives a loss and a dictionary of metrics. Each of these is a scalar, which is averaged over
    the micro-batches of a mini-batch, or a `Mean`, whose sums are: then any number of micro-batches is exactly one
    (`policy_terms` returns such). Gradients are accumulated in f32 at least, and clipped by `inner` if at all. Where a
    gradient is not finite the update is not made: parameters and optimiser stay as they were. On a mesh `loss_fn` says
    how the rows of a slice lie (`jax.lax.with_sharding_constraint`).

    Args:
      loss_fn: as above.
      inner: Optax transformation; `sfpo(...)` too, for as many passes as its cycle has.
      mini_batches: M, updates of the pass.
      micro_batches: pieces of a mini-batch whose gradients are computed one after the other.

    Returns:
      pass_fn(params, opt_state, batch, **extra_args) -> (params, opt_state, metrics); extra arguments go to
      `inner.update`. Metrics are those of `loss_fn`, `loss`, and `grad_norm` (before clipping), averaged over the
      mini-batches whose update was made (over all if none was), and `skipped`, the number of those where it was not. It
      raises a ValueError if the leaves of `batch` differ in their number of rows, or it is not divisible.

    Raises:
      ValueError: `mini_batches` or `micro_batches` below 1.
    """
    for name, value in (("mini_batches", mini_batches), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    transform = optax.with_extra_args_support(inner)

    def sums(params, rows) -> tuple[PyTree, tuple[Mean, PyTree]]:
        def total(params):
            means = jax.tree.map(
                lambda x: x if _is_mean(x) else Mean(jnp.asarray(x), jnp.ones_like(x)),
                loss_fn(params, rows),
                is_leaf=_is_mean,
            )
            return means[0].total, means

        return jax.grad(total, has_aux=True)(params)

    def step(carry, rows, extra_args):
        params, opt_state = carry
        if micro_batches == 1:
            grads, (loss, metrics) = sums(params, jax.tree.map(lambda leaf: leaf[0], rows))
        else:
            grads, (loss, metrics) = sum_over(lambda piece: sums(params, piece), rows)
        values = jax.tree.map(lambda mean: mean.value, metrics, is_leaf=_is_mean)
        scale = Mean(jnp.ones(()), loss.weight).value
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.promote_types(jnp.float32, scale.dtype)))
        values |= {"loss": loss.value, "grad_norm": norm}
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)
        updates, new_state = transform.update(grads, opt_state, params, **extra_args)
        new_params = optax.apply_updates(params, updates)
        made = jnp.isfinite(norm)
        return _select(made, (new_params, new_state), (params, opt_state)), (values, made)

    def pass_fn(params: PyTree, opt_state: PyTree, batch: PyTree, **extra_args: Any) -> tuple[PyTree, PyTree, dict]:
        rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(rows) != 1 or () in rows:
            raise ValueError(f"batch: expected leaves with the same number of rows, got {sorted(rows)}")
        ((count,),) = rows
        if count % (mini_batches * micro_batches):
            raise ValueError(
                f"mini_batches, micro_batches: expected divisors of the batch's {count} rows, "
                f"got {mini_batches} mini-batches of {micro_batches} micro-batches"
            )
        pieces = jax.tree.map(lambda x: jnp.reshape(x, (mini_batches, micro_batches, -1, *jnp.shape(x)[1:])), batch)
        step_with = functools.partial(step, extra_args=extra_args)
        (params, opt_state), (values, made) = jax.lax.scan(step_with, (params, opt_state), pieces)
        counted = made | ~jnp.any(made)
        metrics = jax.tree.map(lambda x: jnp.mean(x, where=counted), values)
        return params, opt_state, metrics | {"skipped": jnp.sum(~made, dtype=jnp.int32)}

    return pass_fn
