"""SFPO, slow-fast policy optimisation (arXiv 2510.04072): fast updates on one batch, part of the way back, one more.

Example:
    import jax.numpy as jnp, optax
    from jaxlab.sfpo import sfpo, sfpo_update
    from jaxlab.rl import make_pass

    one_pass = make_pass(lambda p, batch: (jnp.mean((p - batch) ** 2), {}), optax.adamw(1e-2))
    params, opt_state = jnp.ones(3), optax.adamw(1e-2).init(jnp.ones(3))
    params, opt_state, metrics = sfpo_update(one_pass, params, opt_state, jnp.zeros((8, 3)), inner_steps=3, alpha=0.8)
    transform = sfpo(optax.adamw(1e-2), inner_steps=3, alpha=0.8)  # the same, for a loop of one's own

`GRPOTrainer` of `jaxlab.rl` takes `GRPOConfig(sfpo=SFPOConfig())`. Names are loaded when they are first used, so that
importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.rl import EntropyZScoreStop, SFPOConfig, sfpo, sfpo_update

__all__ = ["EntropyZScoreStop", "SFPOConfig", "sfpo", "sfpo_update"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxlab import rl

    return getattr(rl, name)


def __dir__() -> list[str]:
    return sorted(__all__)
