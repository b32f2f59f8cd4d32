"""The ways of updating a policy that are compared: the same rollouts and rewards, other passes or losses."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxlab.rl.config import GRPOConfig, SFPOConfig, check_choice

if TYPE_CHECKING:
    import optax

Settings = tuple[GRPOConfig, "optax.GradientTransformation | None"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
      label: for tables and pictures.
      changes: (config of plain GRPO, K and alpha) -> fields of the config that are different.
      lookahead: None, or (config, K and alpha) -> updates between synchronisations of `optax.lookahead`.
    """

    label: str
    changes: Callable[[GRPOConfig, SFPOConfig], dict[str, Any]]
    lookahead: Callable[[GRPOConfig, SFPOConfig], int] | None = None


def _loss(name: str, **more: Any) -> Callable[[GRPOConfig, SFPOConfig], dict[str, Any]]:
    return lambda config, sfpo: {"loss_type": name, "loss_agg_mode": None, "scale_rewards": None, **more}


METHODS: dict[str, Method] = {
    "grpo": Method("GRPO", lambda config, sfpo: {}),
    "sfpo": Method("SFPO", lambda config, sfpo: {"sfpo": sfpo}),
    "more_passes": Method("GRPO, K + 1 passes", lambda config, sfpo: {"num_iterations": sfpo.inner_steps + 1}),
    "larger_rate": Method(
        "GRPO, (alpha K + 1) x rate",
        lambda config, sfpo: {"learning_rate": config.learning_rate * (sfpo.alpha * sfpo.inner_steps + 1)},
    ),
    "dr_grpo": Method("Dr.GRPO", _loss("dr_grpo")),
    "dapo": Method("DAPO", _loss("dapo", epsilon_high=0.28, dynamic_sampling=4)),
    "rloo": Method("RLOO", _loss("rloo")),
    "lookahead": Method(
        "GRPO, optax.lookahead", lambda config, sfpo: {}, lambda config, sfpo: sfpo.inner_steps * config.mini_batches
    ),
    "no_correction": Method(
        "SFPO without its slow pass",
        lambda config, sfpo: {"num_iterations": sfpo.inner_steps},
        lambda config, sfpo: sfpo.inner_steps * config.mini_batches,
    ),
}
"""Name -> way. "more_passes" reuses the batch as often as SFPO does; "larger_rate" goes as far as SFPO does to first
order; "lookahead" goes back by the same K and alpha, but across batches."""


def settings(method: str, config: GRPOConfig, sfpo: SFPOConfig) -> Settings:
    """The config of a run by a method, and its optimiser where that is not `GRPOTrainer`'s own.

    Args:
      method: a name in `METHODS`.
      config: of plain GRPO.
      sfpo: K, alpha and stop rule.

    Raises:
      ValueError: unknown method.
    """
    check_choice("method", method, tuple(METHODS))
    way = METHODS[method]
    made = dataclasses.replace(config, **way.changes(config, sfpo))
    if way.lookahead is None:
        return made, None
    from jaxlab.rl.loop import default_optimizer
    from jaxlab.sfpo.lookahead import lookahead

    return made, lookahead(default_optimizer(made), way.lookahead(config, sfpo), sfpo.alpha)
