"""What a simulated run cost, and how well it kept its objectives."""

import dataclasses
from typing import NamedTuple

import numpy as np


class Moment(NamedTuple):
    """An iteration of a worker, for pictures."""

    time_s: float
    worker: str
    clock_mhz: int
    batch: int


@dataclasses.dataclass(frozen=True, eq=False)
class SimResult:
    """A run of the simulator. Energy is simulated, never measured.

    A request counts as aborted if it arrived and did not finish: it does not fit in the KV pool, or the run ended
    before. Aborted requests, and tokens that never came, are misses in every attainment; with nothing to judge it is 1.

    Attributes:
      energy_j: of all GPUs, busy and idle, until the last completion or the run's end.
      energy_per_gpu_j: [W] the same by worker, prefill workers first.
      idle_energy_j: the part of `energy_j` drawn by idle GPUs.
      duration_s: what the energy is counted over.
      num_done: requests that finished.
      num_aborted: requests that arrived and did not.
      output_tokens: tokens emitted, those of aborted requests included.
      mean_in_flight: requests in the cluster, on average over the time.
      busy_s_by_clock: MHz -> seconds in which a GPU computed at this clock, summed over GPUs.
      clock_switches: changes of a worker's clock, requested by its controller.
      decode_iterations: of all workers.
      peak_kv_tokens: most tokens that a decode worker's running requests had in its KV pool.
      first_token_s: [N] time of each request's first token, NaN if it has none.
      finish_s: [N] time of its last token, NaN if it did not finish.
      ttft_ms: [N] from its arrival to its first token, NaN if it has none.
      ttft_attainment: share of requests whose TTFT is at most the objective.
      itl_token_attainment: share of tokens, the first of each request excepted, that come within the objective after
        the one before.
      itl_request_attainment: share of requests of at least two tokens whose mean time between tokens is within it.
      itl_ms: [N] this mean, NaN where there is none.
      moments: every iteration, if they were recorded.
    """

    energy_j: float
    energy_per_gpu_j: np.ndarray
    idle_energy_j: float
    duration_s: float
    num_done: int
    num_aborted: int
    output_tokens: int
    mean_in_flight: float
    busy_s_by_clock: dict[int, float]
    clock_switches: int
    decode_iterations: int
    peak_kv_tokens: int
    first_token_s: np.ndarray
    finish_s: np.ndarray
    ttft_ms: np.ndarray
    ttft_attainment: float
    itl_token_attainment: float
    itl_request_attainment: float
    itl_ms: np.ndarray
    moments: tuple[Moment, ...] = ()

    @property
    def joules_per_token(self) -> float:
        """Energy over output tokens; infinite without any."""
        return self.energy_j / self.output_tokens if self.output_tokens else float("inf")

    @property
    def joules_per_request(self) -> float:
        """Energy over finished requests; infinite without any."""
        return self.energy_j / self.num_done if self.num_done else float("inf")
