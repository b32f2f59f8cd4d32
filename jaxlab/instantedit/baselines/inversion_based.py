"""Methods that take the image up to noise and come down again with the target prompt.

On PeRFlow's piecewise straight path a step of DDIM (Song et al., arXiv 2010.02502) is the schedule's own step: both
move the predicted clean latents and noise, whose shares change linearly along it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlab.instantedit.baselines.flow import EditProblem, down, intervals, up
from jaxlab.instantedit.guidance import ili
from jaxlab.instantedit.network import EditorNetwork


def plain_inversion(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """InstantEdit's inversion with the empty prompt, and nothing else of it: the target prompt all the way down.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N, up and down.
    """
    pairs = intervals(network.schedule, num_steps)
    noise = up(network.schedule, problem.predictor(network, "null"), problem.z0, pairs)[-1]
    guided = problem.predictor(network, "target", guided=True)
    return down(network.schedule, guided, noise, pairs)


def ddim_inversion(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """DDIM inversion as it is practised (Mokady et al., arXiv 2211.09794): the source prompt on the way up.

    The network is asked for the time that a step goes to, at the latents it comes from.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
    """
    pairs = intervals(network.schedule, num_steps)
    unguided = problem.predictor(network, "source")
    noise = up(network.schedule, unguided, problem.z0, pairs, ask_above=True)[-1]
    guided = problem.predictor(network, "target", guided=True)
    return down(network.schedule, guided, noise, pairs)


def direct_inversion(network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4) -> Array:
    """Direct Inversion (PnP Inversion; Ju et al., arXiv 2310.01506): the way down is corrected towards the way up.

    At each step the source branch's distance to the inversion's latents is added to both branches (the paper's "add
    target"; without shared attention a correction of the source branch alone would not reach the target).

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
    """
    schedule, z0 = network.schedule, problem.z0
    pairs = intervals(schedule, num_steps)
    way = up(schedule, problem.predictor(network, "source"), z0, pairs, ask_above=True)
    both = problem.predictors(network, source=True, target=True)

    def step(z, given):
        (t, low), above, below = given
        of_source, of_target = both([above, z], t)
        moved, back = schedule.step(of_target, t, low, z), schedule.step(of_source, t, low, above)
        return ili(below, moved, back), None

    return jax.lax.scan(step, way[-1], (pairs, way[:0:-1], way[-2::-1]))[0]


def renoise(
    network: EditorNetwork, problem: EditProblem, *, num_steps: int = 4, iterations: int = 2, averaged: int = 1
) -> Array:
    """ReNoise (Garibi et al., arXiv 2403.14602): each step up is repeated from where it led, as an implicit step is.

    Its losses that keep the noise normal are left out, as they need the network's gradient.

    Args:
      network: the network; its schedule gives times and steps.
      problem: what is asked for.
      num_steps: N.
      iterations: predictions of each step up; 1 is DDIM inversion.
      averaged: the step is made with the mean of that many last ones.

    Raises:
      ValueError: averaged is not within 1 and iterations.
    """
    if not 1 <= averaged <= iterations:
        raise ValueError(f"averaged: expected 1 to {iterations}, got {averaged}")
    schedule, z0 = network.schedule, problem.z0
    pairs = intervals(schedule, num_steps)
    predict = problem.predictor(network, "source")

    def step(z, pair):
        t, low = pair

        def again(guess, _):
            eps = predict(guess, t)
            return schedule.inverse_step(eps, t, low, z)[0], eps

        _, made = jax.lax.scan(again, z, length=iterations)
        return schedule.inverse_step(jnp.mean(made[-averaged:], axis=0), t, low, z)[0], None

    noise, _ = jax.lax.scan(step, jnp.asarray(z0, jnp.float32), pairs[::-1])
    guided = problem.predictor(network, "target", guided=True)
    return down(schedule, guided, noise, pairs)
