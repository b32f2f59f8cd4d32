"""Methods that never invert: they add noise instead."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlab.instantedit.baselines.flow import EditProblem, down, intervals, noised
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import TRAIN_STEPS


def sdedit(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4, strength: float = 0.75) -> Array:
    """SDEdit (Meng et al., arXiv 2108.01073): noise up to a time, and the target prompt down from there.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
      strength: where it begins, as a fraction of the way.

    Raises:
      ValueError: no key, or a strength below every step.
    """
    pairs = intervals(network.schedule, num_steps, strength)
    guided = problem.predictor(network, "target", guided=True)
    noisy = noised(network.schedule, problem.z0, problem.draw(), pairs[0, 0])
    return down(network.schedule, guided, noisy, pairs)


def virtual_inversion(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """InfEdit's virtual inversion by DDCM (Xu et al., arXiv 2312.04965), without its attention control.

    Each step draws new noise for the image itself; the target's clean latents are predicted with that noise, corrected
    by the difference of the two prompts' predicted noise.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.

    Raises:
      ValueError: no key.
    """
    schedule, z0 = network.schedule, problem.z0
    pairs = intervals(schedule, num_steps)
    both = problem.predictors(network, source=False, target=True)

    def noise_in(eps, z, t):
        """The unit noise that a prediction takes z to hold."""
        v = schedule.velocity(eps, t, z)
        at = schedule.marginal(t, z)
        return (at.signal * v - at.signal_slope * z) / (at.signal * at.noise_slope - at.signal_slope * at.noise)

    def step(clean, given):
        t, noise = given
        z_source, z_target = (noised(schedule, x, noise, t) for x in (z0, clean))
        at = schedule.marginal(t, z0)
        of_source, of_target = both([z_source, z_target], t)
        consistent = noise_in(of_target, z_target, t) - noise_in(of_source, z_source, t) + noise
        return (z_target - at.noise * consistent) / at.signal, None

    given = pairs[:, 0], problem.draw(len(pairs))
    return jax.lax.scan(step, jnp.asarray(z0, jnp.float32), given)[0]


def flow_edit(
    network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4, strength: float = 1.0, draws: int = 1
) -> Array:
    """FlowEdit (Kulikov et al., arXiv 2412.08629): the image moves by the difference of the two prompts' velocities.

    Both are taken where the image, with noise drawn anew each step, and the edit so far lead to.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
      strength: where it begins, as a fraction of the way (the paper's n_max).
      draws: of noise in each step, whose differences are averaged (the paper's n_avg).

    Raises:
      ValueError: no key, no draws, or a strength below every step.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    schedule, z0 = network.schedule, problem.z0
    pairs = intervals(schedule, num_steps, strength)
    both = problem.predictors(network, source=False, target=True)

    def step(edited, given):
        (t, low), noises = given

        def difference(_, noise):
            z_source = noised(schedule, z0, noise, t)
            z_target = edited + z_source - z0
            of_source, of_target = both([z_source, z_target], t)
            return None, schedule.velocity(of_target, t, z_target) - schedule.velocity(of_source, t, z_source)

        _, velocities = jax.lax.scan(difference, None, noises)
        return edited + jnp.mean(velocities, axis=0) * ((low - t) / TRAIN_STEPS), None

    given = pairs, problem.draw(len(pairs), draws)
    return jax.lax.scan(step, jnp.asarray(z0, jnp.float32), given)[0]
