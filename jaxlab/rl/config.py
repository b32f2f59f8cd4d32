"""What a run of group-relative policy optimisation takes: batches, objective, sampling, update."""

import dataclasses
from typing import Literal, get_args

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"]

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "rloo")
AGGREGATIONS = get_args(Aggregation)
KL_KINDS = ("k1", "k2", "k3")

_AGGREGATION_OF: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",  # arXiv 2402.03300, equation 3
    "dr_grpo": "seq-mean-token-sum-norm",  # arXiv 2503.20783
    "dapo": "token-mean",  # arXiv 2503.14476; SFPO's scripts too
    "rloo": "token-mean",  # ours
}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises the ValueError of an unknown name, the valid ones listed."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_update(inner_steps: int, alpha: float, *, allow_extrapolation: bool = False) -> None:
    """Checks the two numbers of a slow-fast update.

    Raises:
      ValueError: `inner_steps` below 1, or `alpha` outside [0, 1] (above 1 only with `allow_extrapolation`).
    """
    if isinstance(inner_steps, bool) or inner_steps != int(inner_steps) or inner_steps < 1:
        raise ValueError(f"inner_steps: expected an integer of at least 1, got {inner_steps!r}")
    if not alpha >= 0 or (alpha > 1 and not allow_extrapolation):
        raise ValueError(
            f"alpha: expected a value in [0, 1] (above 1 only with allow_extrapolation=True), got {alpha!r}"
        )


@dataclasses.dataclass(frozen=True)
class SFPOConfig:
    """Slow-fast policy optimisation (arXiv 2510.04072); defaults are the official scripts'.

    Attributes:
      inner_steps: K, fast passes over the rollout batch.
      alpha: how much of the fast displacement is kept before the slow pass, in [0, 1]. The scripts' 0.8, for
        Qwen3-4B-Base 0.9.
      window: entropies that the stop rule looks at.
      threshold: z-score of the entropy that ends the fast passes for good.
      two_sided: stop at a fall of the entropy as well; the official rule sees a rise only.
      state_policy: "carry" lets the optimiser's moments run through all passes (official); "reset_fast" gives the slow
        pass those from before the fast ones.
    """

    inner_steps: int = 3
    alpha: int | float = 0.8
    window: int = 30
    threshold: int | float = 1.0
    two_sided: bool = False
    state_policy: Literal["carry", "reset_fast"] = "carry"

    def __post_init__(self):
        check_update(self.inner_steps, self.alpha)
        if self.window < 2:
            raise ValueError(f"window: expected at least 2 entropies, got {self.window}")
        check_choice("state_policy", self.state_policy, ("carry", "reset_fast"))


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """A run of `GRPOTrainer`; names as in TRL and Tunix, batch sizes in sequences. Defaults are ours unless cited.

    Attributes:
      num_generations: G, completions of each prompt; at least 2, with `loss_type="rloo"` at least 1.
      prompts_per_step: P, prompts of a step, over all devices; a step has B = P * G sequences.
      mini_batch_size: sequences of one optimiser update, contiguous; None: the whole batch.
      micro_batch_size: sequences whose gradient is computed at once; None: the mini-batch.
      num_iterations: passes over a rollout batch where SFPO is off.
      loss_type: "grpo" (arXiv 2402.03300), "dr_grpo" (2503.20783: no division by the standard deviation or the
        length), "dapo" (2503.14476: token mean) or "rloo" (2402.14740: the others' mean as baseline).
      loss_agg_mode: one of `AGGREGATIONS`; None: the loss type's.
      scale_rewards: whether centred rewards are divided by their group's standard deviation; None: the loss type's.
      epsilon: clip range of the probability ratio below 1.
      epsilon_high: and above 1; None: the same (DAPO: 0.28).
      dual_clip: bound of the ratio for negative advantages, above 1; None: none (verl: 3).
      beta: weight of the KL divergence from the reference policy.
      kl: its estimator.
      entropy_coef: weight of the entropy, which is rewarded.
      advantage_eps: added to the standard deviation (verl, Tunix 1e-6; TRL 1e-4).
      temperature: of sampling and of the trained distribution alike.
      top_p: nucleus of sampling; log-probabilities stay those of the whole distribution.
      max_prompt_length: tokens.
      max_completion_length: tokens.
      truncate_prompts: cut longer prompts at their beginning instead of raising.
      dynamic_sampling: DAPO: groups whose rewards are all equal are dropped and prompts drawn anew, for at most this
        many rounds of sampling in all; 0: off.
      mask_truncated: completions cut off at the maximum length do not count in the loss.
      overlong_buffer: DAPO's soft penalty: falls from 0 to -1 over the last so many tokens of the maximum; 0: off.
      recompute_old_logps: the trainer computes the old policy's log-probabilities; False takes the sampler's.
      importance_cap: with recomputed ones, weights every token by min(trainer's / sampler's probability, this); None:
        no correction.
      learning_rate: of AdamW.
      weight_decay: of AdamW; on matrices only.
      max_grad_norm: global norm that gradients are clipped to; None: no clipping.
      nonfinite: "raise" at a gradient that is not finite, or "skip" its update and count it.
      steps: rollout batches to train on.
      seed: of the data order and of sampling.
      checkpoint_every: steps between checkpoints; 0: at the end only.
      sfpo: slow-fast updates; None: plain passes.
    """

    num_generations: int = 8  # official scripts
    prompts_per_step: int = 8
    mini_batch_size: int | None = None
    micro_batch_size: int | None = None
    num_iterations: int = 1
    loss_type: Literal["grpo", "dr_grpo", "dapo", "rloo"] = "grpo"
    loss_agg_mode: Aggregation | None = None
    scale_rewards: bool | None = None
    epsilon: int | float = 0.2  # official scripts
    epsilon_high: int | float | None = None
    dual_clip: int | float | None = None
    beta: int | float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: int | float = 0.0
    advantage_eps: int | float = 1e-6
    temperature: int | float = 1.0
    top_p: int | float = 1.0
    max_prompt_length: int = 512
    max_completion_length: int = 256
    truncate_prompts: bool = False
    dynamic_sampling: int = 0
    mask_truncated: bool = False
    overlong_buffer: int = 0
    recompute_old_logps: bool = True
    importance_cap: int | float | None = None
    learning_rate: int | float = 1e-6  # official scripts, like the next two
    weight_decay: int | float = 0.01
    max_grad_norm: int | float | None = 1.0
    nonfinite: Literal["raise", "skip"] = "raise"
    steps: int = 400
    seed: int = 0
    checkpoint_every: int = 0
    sfpo: SFPOConfig | None = None

    def __post_init__(self):
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("kl", self.kl, KL_KINDS)
        check_choice("nonfinite", self.nonfinite, ("raise", "skip"))
        if self.loss_agg_mode is not None:
            check_choice("loss_agg_mode", self.loss_agg_mode, AGGREGATIONS)
        least = {
            "num_generations": 1 if self.loss_type == "rloo" else 2,
            "prompts_per_step": 1,
            "num_iterations": 1,
            "max_prompt_length": 1,
            "max_completion_length": 1,
            "dynamic_sampling": 0,
            "overlong_buffer": 0,
            "steps": 1,
            "checkpoint_every": 0,
            "beta": 0,
            "entropy_coef": 0,
            "advantage_eps": 0,
            "learning_rate": 0,
            "weight_decay": 0,
        }
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: expected a value >= {bound}, got {getattr(self, name)}")
        check_clip(self.epsilon, self.epsilon_high, self.dual_clip)
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a value > 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a value in (0, 1], got {self.top_p}")
        for name in ("max_grad_norm", "importance_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a value > 0 or None, got {value}")
        if self.importance_cap is not None and not self.recompute_old_logps:
            raise ValueError(f"importance_cap: needs recompute_old_logps=True, got {self.importance_cap} without")
        if self.dynamic_sampling and self.num_generations == 1:
            raise ValueError(
                f"dynamic_sampling: needs groups of at least 2 (num_generations), got {self.dynamic_sampling}"
            )
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer: expected at most max_completion_length = {self.max_completion_length}, "
                f"got {self.overlong_buffer}"
            )
        for name, whole, of in (
            ("mini_batch_size", self.batch_size, "prompts_per_step * num_generations"),
            ("micro_batch_size", self.mini_batch_size or self.batch_size, "the mini-batch"),
        ):
            part = getattr(self, name)
            if part is not None and (part < 1 or whole % part):
                raise ValueError(f"{name}: expected a divisor of {of} = {whole}, got {part}")

    @property
    def batch_size(self) -> int:
        """B, sequences of a step."""
        return self.prompts_per_step * self.num_generations

    @property
    def mini_batches(self) -> int:
        """M, optimiser updates of one pass."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

    @property
    def micro_batches(self) -> int:
        """Pieces whose gradients make up one update."""
        mini = self.mini_batch_size or self.batch_size
        return mini // (self.micro_batch_size or mini)

    @property
    def aggregation(self) -> Aggregation:
        """The name of how token losses become one number."""
        return self.loss_agg_mode or _AGGREGATION_OF[self.loss_type]

    @property
    def advantage_kind(self) -> Literal["grpo", "dr_grpo", "rloo"]:
        """`kind` of `compute_advantages`."""
        if self.loss_type == "rloo":
            return "rloo"
        scaled = self.loss_type != "dr_grpo" if self.scale_rewards is None else self.scale_rewards
        return "grpo" if scaled else "dr_grpo"


def check_clip(epsilon: float, epsilon_high: float | None, dual_clip: float | None) -> None:
    """Checks the clip ranges of a policy loss.

    Raises:
      ValueError: `epsilon` outside [0, 1), `epsilon_high` negative, or `dual_clip` not above 1.
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon: expected a value in [0, 1), got {epsilon}")
    if epsilon_high is not None and not epsilon_high >= 0:
        raise ValueError(f"epsilon_high: expected a value >= 0, got {epsilon_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected a value > 1, got {dual_clip}")
