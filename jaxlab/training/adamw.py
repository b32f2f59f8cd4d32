"""AdamW and its learning-rate schedules, as one typed config."""

import dataclasses
from typing import Literal

import jax
import optax
from jaxtyping import PyTree

# The last name on a parameter's path that exempts it from weight decay: norm scales, biases, embedding tables.
UNDECAYED = ("scale", "bias", "embedding")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) behind a global-norm clip. Defaults are ours unless cited.

    Schedules, after a linear warm-up from 0 over `warmup_steps`: `constant`; `cosine` and `linear` fall to
    `final_fraction * learning_rate` at step `steps`; `wsd` (warm-up, stable, decay; arXiv 2404.06395) stays at the peak
    and falls linearly during the last `decay_fraction` of `steps`. `steps` is what `train` runs unless set here.
    """

    learning_rate: int | float = 3e-4
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0
    steps: int | None = None
    final_fraction: int | float = 0.1
    decay_fraction: int | float = 0.1
    b1: int | float = 0.9
    b2: int | float = 0.95  # GPT-3 (arXiv 2005.14165), appendix B
    eps: int | float = 1e-8
    weight_decay: int | float = 0.1
    clip_norm: int | float | None = 1.0  # None: no clipping

    def __post_init__(self):
        schedules = ("constant", "cosine", "linear", "wsd")
        if self.schedule not in schedules:
            raise ValueError(f"schedule: expected one of {schedules}, got {self.schedule!r}")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "final_fraction"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value in [0, 1), got {getattr(self, name)}")
        if self.eps <= 0:
            raise ValueError(f"eps: expected a value > 0, got {self.eps}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm: expected a value > 0, or None for no clipping, got {self.clip_norm}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: expected a value in (0, 1], got {self.decay_fraction}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected a value >= 1, got {self.steps}")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made.

    Raises:
        ValueError: The schedule ends somewhere, but `config.steps` is not set.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.steps is None:
        raise ValueError(f"steps: expected the number of steps that schedule {config.schedule!r} spans, got None")
    else:
        span = max(1, config.steps - warmup)  # a run that ends within its warm-up never falls
        final = config.final_fraction * peak
        if config.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, span, alpha=config.final_fraction)
        elif config.schedule == "linear":
            after = optax.linear_schedule(peak, final, span)
        else:
            decay = min(span, max(1, round(config.decay_fraction * config.steps)))
            after = optax.linear_schedule(peak, final, decay, transition_begin=span - decay)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: matrices, but no norm scale, bias or embedding table (tied heads neither)."""

    def decays(path, leaf) -> bool:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return leaf.ndim >= 2 and not (names and names[-1] in UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with schedule, clip by global norm, and weight decay on matrices only (`decay_mask`).

    Moments have the parameters' dtype: keep f32 master parameters (`DecoderConfig.param_dtype`) and let the network
    compute in bf16 (`DecoderConfig.dtype`).
    """
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
