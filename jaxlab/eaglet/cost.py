"""What reinforcement costs: of a planner whose executors are frozen, against that of the executor itself.

Training a planner backpropagates through one plan a rollout and only runs the executors; training the executor
backpropagates through every token of every episode. Counts are measured, the price of a token follows from parameters:
2 N FLOPs forward and 4 N backward (Kaplan et al., arXiv 2001.08361), attention aside; prompts are read once, with a
cache.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counts:
    """Means of one run's episodes and plans.

    Attributes:
      tasks: P, of an update.
      group: G, plans or episodes of each task.
      steps: actions of an episode.
      step_tokens: tokens of an action and what is seen after it.
      prompt_tokens: of task and plan, read once an episode.
      plan_prompt_tokens: of the planner's prompt.
      plan_tokens: of its output.
      executors: that try each plan out.
      cached: episodes without a plan are run in the first epoch alone, and do not count.
    """

    tasks: int
    group: int
    steps: float
    step_tokens: float
    prompt_tokens: float
    plan_prompt_tokens: float
    plan_tokens: float
    executors: int = 2
    cached: bool = True

    @property
    def episode_tokens(self) -> float:
        """Tokens that an executor reads and writes in one episode."""
        return self.prompt_tokens + self.steps * self.step_tokens


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one update.

    Attributes:
      environment_steps: actions in environments.
      executor_tokens: tokens that executors run forward.
      trained_tokens: tokens that a gradient goes through.
      flops: of all models.
    """

    environment_steps: float
    executor_tokens: float
    trained_tokens: float
    flops: float


def planner_update(counts: Counts, planner_parameters: float, executor_parameters: float) -> Cost:
    """GRPO of a planner: plans are drawn and trained on, executors run them and stay as they are."""
    plans = counts.tasks * counts.group
    episodes = plans * counts.executors * (1 if counts.cached else 2)
    trained = plans * (counts.plan_prompt_tokens + counts.plan_tokens)
    run = episodes * counts.episode_tokens
    # Drawn once, read for the old and the reference policy, forward and backward in the update.
    flops = planner_parameters * trained * (2 + 2 + 2 + 6) + executor_parameters * run * 2
    return Cost(episodes * counts.steps, run, trained, flops)


def executor_update(counts: Counts, executor_parameters: float) -> Cost:
    """GRPO of an executor on its own episodes, without a plan; the same groups."""
    episodes = counts.tasks * counts.group
    tokens = episodes * counts.episode_tokens
    return Cost(episodes * counts.steps, tokens, tokens, executor_parameters * tokens * (2 + 2 + 2 + 6))
