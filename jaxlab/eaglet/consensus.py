"""Homologous consensus filtering (arXiv 2510.05608): a plan is kept if it harms neither of two related executors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.gain import hcf_keep
from jaxlab.eaglet.pairs import means, paired_rollouts
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.rollouts import Env, RolloutCache


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """What the filter did.

    Attributes:
      kept: the pairs that passed, in the order given.
      dropped: those that did not.
      table: for each pair given `task_id`, `r_with`, `r_without` (rewards of expert and novice, means over the seeds;
        None where the plan was not tried or its episodes were lost), and `keep`.
    """

    kept: list[tuple[Task, Plan]]
    dropped: list[tuple[Task, Plan]]
    table: list[dict[str, Any]]


def hcf_filter(
    pairs: Sequence[tuple[Task, Plan]],
    expert: Executor,
    novice: Executor,
    *,
    env: Env,
    seeds: Sequence[int] = (0,),
    strict: bool = False,
    cache: RolloutCache | None = None,
    workers: int | None = None,
    timeout_s: float | None = None,
) -> FilterReport:
    """Runs both executors with and without each plan, and keeps the plans that `hcf_keep` keeps.

    A plan without text is dropped untried, and so is one of whose episodes an executor lost all.

    Args:
      pairs: tasks and plans for them.
      expert: the executor that was trained further.
      novice: one of the same family that was not.
      env: an environment, or what makes one in each worker process; as in `plan_rewards`.
      seeds: of the episodes, the same with and without.
      strict: ask for a gain of both.
      cache: where baselines are found, and put.
      workers: processes; None: one a CPU.
      timeout_s: limit for one episode in a worker.

    Raises:
      ValueError: no seed, or one executor (or name) twice.
      FloatingPointError: a reward is NaN; the message names task and plan.
      RuntimeError: every episode was lost.
    """
    paired, _ = paired_rollouts(
        pairs, env=env, executors=(expert, novice), cache=cache, seeds=seeds, workers=workers, timeout_s=timeout_s
    )
    kept, dropped, table = [], [], []
    r_with, r_without, _, _ = means(paired, len(pairs), 2)
    for pair, r1, r0 in zip(pairs, r_with, r_without):
        keep = not np.isnan(r1).any() and bool(hcf_keep(r1, r0, strict=strict, allow_raw=True))
        (kept if keep else dropped).append(pair)
        table.append({"task_id": pair[0].id, "r_with": _listed(r1), "r_without": _listed(r0), "keep": keep})
    return FilterReport(kept, dropped, table)


def _listed(rewards: np.ndarray) -> list[float | None]:
    return [None if np.isnan(reward) else float(reward) for reward in rewards]
