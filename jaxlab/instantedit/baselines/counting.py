"""How many samples of the network a method takes, read off its program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from jaxlab.instantedit.baselines.flow import EditProblem
from jaxlab.instantedit.baselines.methods import Edit
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import PeRFlowSchedule

_MARK = "network sample"


class _Probe(EditorNetwork):
    """A network that only marks in the program what it is asked."""

    def text(self, states: Any) -> Any:
        """The states."""
        return states

    def eps(self, z: Any, t: Any, text: Any, *, control: Any = None) -> Any:
        """Marked latents."""
        return checkpoint_name(z, _MARK)


def count_samples(edit: Edit, schedule: PeRFlowSchedule, *, guided: bool = True, **options: Any) -> int:
    """Samples of the network that an edit of one image takes; the ControlNet, where there is one, takes as many.

    Args:
      edit: one of `METHODS`, or what is called like them and asks its network only for `text` and `eps`.
      schedule: of the network.
      guided: whether the problem has a guidance.
      **options: of the edit.
    """
    states = jnp.zeros((1, 1, 1))
    problem = EditProblem(jnp.zeros((1, 1, 1, 1)), states, states, states, 1.0 if guided else None)
    network = _Probe({}, None, schedule)
    program = jax.make_jaxpr(lambda key: edit(network, problem.replace(rng=key), **options))(jax.random.key(0))
    return _marked(program.jaxpr)


def steps_within(edit: Edit, schedule: PeRFlowSchedule, budget: int, **options: Any) -> int:
    """The most steps with which an edit takes no more samples than a budget.

    Args:
      edit: as in `count_samples`.
      schedule: of the network; there are at least as many steps as windows.
      budget: in samples of the network for one image.
      **options: as in `count_samples`, but for `num_steps`.

    Raises:
      ValueError: the fewest steps already take more.
    """
    fewest = steps = schedule.num_windows
    while count_samples(edit, schedule, num_steps=steps, **options) <= budget:
        steps += 1
    if steps == fewest:
        least = count_samples(edit, schedule, num_steps=fewest, **options)
        raise ValueError(f"budget: expected at least {least} samples, those of {fewest} steps, got {budget}")
    return steps - 1


def _marked(jaxpr: jex.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"] == _MARK:
            marked: Any = equation.invars[0].aval
            total += marked.shape[0]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, jex.ClosedJaxpr)):
            inner = value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
            if isinstance(inner, jex.Jaxpr):
                total += times * _marked(inner)
    return total
