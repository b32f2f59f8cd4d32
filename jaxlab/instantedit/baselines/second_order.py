"""Solvers of second order, up with the source prompt and down with the target."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlab.instantedit.baselines.flow import EditProblem, Predict, intervals
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import TRAIN_STEPS, PeRFlowSchedule

Solve = Callable[[PeRFlowSchedule, Predict, Any, Any, bool], Array]
"""(schedule, network, latents, intervals, whether up) -> latents at the other end."""


def rf_solver(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """RF-Solver (Wang et al., arXiv 2411.04746): Taylor's second term, from a velocity half a step ahead.

    Its sharing of attention features is left out.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
    """
    return _there_and_back(_taylor, network, problem, num_steps)


def fire_flow(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """FireFlow (Deng et al., arXiv 2412.07517): midpoint steps that reuse the last midpoint's velocity to get there.

    The velocity that is reused is another window's where a step begins one; its sharing of attention features is left
    out.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
    """
    return _there_and_back(_reusing, network, problem, num_steps)


def _there_and_back(solve: Solve, network: EditorNetwork, problem: EditProblem, num_steps: int) -> Array:
    schedule, pairs = network.schedule, intervals(network.schedule, num_steps)
    z0 = jnp.asarray(problem.z0, jnp.float32)
    noise = solve(schedule, problem.predictor(network, "source"), z0, pairs, True)
    return solve(schedule, problem.predictor(network, "target", guided=True), noise, pairs, False)


def _steps(pairs: Any, upwards: bool) -> tuple[Any, Any, Any, Any]:
    """Of each step where it begins, its middle, its length in tau, and the time whose window it is in."""
    high, low = (pairs[::-1] if upwards else pairs).T
    begin, end = (low, high) if upwards else (high, low)
    return begin, (begin + end) / 2, (end - begin) / TRAIN_STEPS, high


def _taylor(schedule: PeRFlowSchedule, predict: Predict, z: Array, pairs: Any, upwards: bool) -> Array:
    def step(z, given):
        begin, middle, length, window = given

        def ask(at, t):
            v = schedule.velocity(predict(at, t), t, at, window_at=window)
            return z + length / 2 * v, v

        # A scan, so that the program has the network once.
        _, (v, ahead) = jax.lax.scan(ask, z, jnp.stack([begin, middle]))
        derivative = (ahead - v) / (length / 2)
        return z + length * v + length**2 / 2 * derivative, None

    return jax.lax.scan(step, z, _steps(pairs, upwards))[0]


def _reusing(schedule: PeRFlowSchedule, predict: Predict, z: Array, pairs: Any, upwards: bool) -> Array:
    def step(carry, given):
        z, v = carry
        middle, length, window = given
        ahead = z + length / 2 * v
        v = schedule.velocity(predict(ahead, middle), middle, ahead, window_at=window)
        return (z + length * v, v), None

    begin, middle, length, window = _steps(pairs, upwards)
    # The first velocity is that of a step of no length.
    given = [np.append(first, rest) for first, rest in ((begin[0], middle), (0, length), (window[0], window))]
    given = tuple(np.asarray(x, np.float32) for x in given)
    return jax.lax.scan(step, (z, jnp.zeros_like(z)), given)[0][0]
