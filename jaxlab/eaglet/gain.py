"""What a plan is worth to executors, in numbers (arXiv 2510.05608, equations of the filter and of the reward).

The last axis of rewards and steps is the executor, in the order expert, novice; the other axes are free and broadcast.
NumPy arrays, JAX arrays and Python numbers come in; float64 or float32 goes out, as it came (Python numbers: float64).
Values are checked where they are known, so not under a JAX transformation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.eaglet.plans import parse_plan
from jaxlab.rl import compute_advantages


def capability_gain(
    r_with: Any,
    r_without: Any,
    n_without: Any,
    m_with: Any,
    *,
    alpha: float = 0.01,
    max_decay: float | None = None,
    tie_bonus: bool = False,
    allow_raw: bool = False,
) -> Any:
    """Gain of each executor from a plan, `[..., X]`: (1 + alpha)^(n - m) where the plan raises the reward, else 0.

    Args:
      r_with: rewards of the runs with the plan, `[..., X]`, in [0, 1]; with several seeds their mean.
      r_without: rewards of the runs without it.
      n_without: n, steps of the runs without it, above 0.
      m_with: m, steps of the runs with it. Fewer steps with the plan raise the gain.
      alpha: above -1. The paper's value is not known; 0.01 is ours.
      max_decay: the largest factor (1 + alpha)^(n - m); None: no bound, as in the paper.
      tie_bonus: ours: an executor whose two rewards are equal and positive and which needs fewer steps with the plan
        gets max(0, min((1 + alpha)^(n - m), max_decay) - 1), where the paper's strict comparison gives 0.
      allow_raw: rewards may be in [-1, 1]: -1 is a fatal end.

    Raises:
      ValueError: `alpha` or `max_decay` out of range, rewards outside their range (NaN too), steps not above 0, shapes
        that do not broadcast, or no executor.
    """
    if not alpha > -1:
        raise ValueError(f"alpha: expected more than -1, got {alpha}")
    if max_decay is not None and not max_decay > 0:
        raise ValueError(f"max_decay: expected None or more than 0, got {max_decay}")
    xp, dtype, arrays = _arrays(r_with=r_with, r_without=r_without, n_without=n_without, m_with=m_with)
    for name in ("r_with", "r_without"):
        _check_rewards(name, arrays[name], allow_raw)
    for name in ("n_without", "m_with"):
        _check(name, arrays[name], lambda steps: steps > 0, "steps above 0")
    better = arrays["r_with"] > arrays["r_without"]
    equal = (arrays["r_with"] == arrays["r_without"]) & (arrays["r_with"] > 0)
    saved = arrays["n_without"].astype(dtype) - arrays["m_with"].astype(dtype)
    # A factor beyond the largest float is infinite; where the plan is no gain, it is 0.
    with np.errstate(over="ignore"):
        factor = xp.exp(saved * np.log1p(alpha).astype(dtype))
    if max_decay is not None:
        factor = xp.minimum(factor, xp.asarray(max_decay, dtype))
    otherwise = xp.where(equal & (saved > 0), xp.maximum(factor - 1, 0), 0) if tie_bonus else 0
    return xp.where(better, factor, otherwise).astype(dtype)


def ecgr(
    r_with: Any,
    r_without: Any,
    n_without: Any,
    m_with: Any,
    *,
    alpha: float = 0.01,
    max_decay: float | None = None,
    tie_bonus: bool = False,
    allow_raw: bool = False,
) -> Any:
    """Executor capability gain reward, `[...]`: `capability_gain` summed over the executors; same arguments, errors."""
    gains = capability_gain(
        r_with,
        r_without,
        n_without,
        m_with,
        alpha=alpha,
        max_decay=max_decay,
        tie_bonus=tie_bonus,
        allow_raw=allow_raw,
    )
    return gains.sum(axis=-1)


def hcf_keep(r_with: Any, r_without: Any, *, strict: bool = False, allow_raw: bool = False) -> Any:
    """Homologous consensus filter: whether a plan harms none of the executors, bool `[...]`.

    Args:
      r_with: rewards with the plan, `[..., X]`.
      r_without: rewards without it.
      strict: ask for a gain of all of them (>) rather than for no harm (>=, the paper's).
      allow_raw: rewards may be in [-1, 1].

    Raises:
      ValueError: rewards outside their range, shapes that do not broadcast, or no executor.
    """
    _, _, arrays = _arrays(r_with=r_with, r_without=r_without)
    for name, array in arrays.items():
        _check_rewards(name, array, allow_raw)
    good = arrays["r_with"] > arrays["r_without"] if strict else arrays["r_with"] >= arrays["r_without"]
    return good.all(axis=-1)


def format_reward(text: str, *, max_plan_tokens: int | None = None, tokenizer: Any = None) -> float:
    """1.0 for a text that `parse_plan` accepts whole, else 0.0; takes its arguments. The paper's scale is not known."""
    return float(parse_plan(text, max_plan_tokens=max_plan_tokens, tokenizer=tokenizer).ok)


def final_reward(ecgr: Any, format_reward: Any) -> Any:
    """The planner's reward: the plain sum of the two, `[...]`.

    Raises:
      ValueError: shapes that do not broadcast.
    """
    _, dtype, arrays = _arrays(last_axis=False, ecgr=ecgr, format_reward=format_reward)
    return (arrays["ecgr"] + arrays["format_reward"]).astype(dtype)


def group_advantages(rewards: Any, *, eps: float = 1e-6) -> Any:
    """(r - mean) / (std + eps) over the plans of each task, `[P, G]`; std of the population, equal rewards give 0.

    Args:
      rewards: `[P, G]`, tasks by plans.
      eps: added to the standard deviation.

    Raises:
      ValueError: another number of axes, fewer than two plans a task, or a negative `eps`.
    """
    _, dtype, arrays = _arrays(last_axis=False, rewards=rewards)
    values = arrays["rewards"].astype(dtype)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"rewards: expected shape [P, G] with at least 2 plans a task, got {values.shape}")
    if isinstance(values, jax.Array):
        return _normalised(values, eps)
    with jax.enable_x64(True):
        return np.asarray(_normalised(values, eps))


@functools.partial(jax.jit, static_argnums=1)
def _normalised(rewards: jax.Array, eps: float) -> jax.Array:
    flat = compute_advantages(rewards.reshape(-1), group_size=rewards.shape[1], eps=eps, ddof=0)
    return flat.reshape(rewards.shape)


def _arrays(*, last_axis: bool = True, **values: Any) -> tuple[Any, Any, dict[str, Any]]:
    """NumPy or jax.numpy, the dtype of results, and the values as arrays of one shape.

    Raises:
      ValueError: shapes that do not broadcast, or a last axis that is absent or empty.
    """
    xp = jnp if any(isinstance(value, jax.Array) for value in values.values()) else np
    typed = [value.dtype for value in values.values() if hasattr(value, "dtype")]
    given = [dtype for dtype in typed if jnp.issubdtype(dtype, jnp.floating)]
    dtype = np.result_type(np.float32, *given) if given else xp.asarray(0.0).dtype
    arrays = {name: xp.asarray(value) for name, value in values.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    try:
        shape = np.broadcast_shapes(*shapes.values())
    except ValueError as error:
        raise ValueError(f"{', '.join(shapes)}: expected shapes that broadcast, got {shapes}") from error
    if last_axis and (not shape or shape[-1] == 0):
        raise ValueError(f"{', '.join(shapes)}: expected a last axis with one entry an executor, got shape {shape}")
    return xp, dtype, {name: xp.broadcast_to(array, shape) for name, array in arrays.items()}


def _check(name: str, array: Any, good: Callable[[np.ndarray], Any], expected: str) -> None:
    if isinstance(array, jax.core.Tracer):
        return
    values = np.asarray(array)
    wrong = ~good(values)
    if wrong.any():
        raise ValueError(f"{name}: expected {expected}, got {values[wrong][0]}")


def _check_rewards(name: str, rewards: Any, allow_raw: bool) -> None:
    low, hint = (-1, "") if allow_raw else (0, " (or allow_raw=True)")
    _check(name, rewards, lambda values: (values >= low) & (values <= 1), f"values in [{low}, 1]{hint}")
