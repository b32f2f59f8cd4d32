"""Ground truth of the simulator: how long an iteration of Llama-3.1-8B takes on an A100, from a measured profile.

The linear layers' times by number of tokens were measured by Vidur (Agrawal et al., MLSys 2024), presumably at the
highest clock; they have the staircase in the batch that routing is about. How they depend on the clock is modelled:
reading the weights and the KV cache does not, the work above that goes with 1 / f. What was not measured:

- KV reads are as fast as the weight reads of the profile, 1.58 TB/s, which are 77 % of the card's bandwidth;
- the output layer costs what its share of parameters does, 2.41 layers;
- causal attention of a prefill reaches 180 TFLOP/s of the card's 312;
- the host adds 1 ms to a decode iteration and 5 ms to a prefill, whatever the clock (ours, assumed).
"""

import csv
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from jaxlab import core

A100_PROFILE = "traces/vidur_a100_llama3_8b_linear_ops.csv"
A100_CLOCKS = tuple(range(210, 1411, 15))
"""MHz that an A100's SM clock can be locked at."""

_LINEAR = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
_POINTWISE = ("mlp_act_ms", "input_layernorm_ms", "post_attention_layernorm_ms", "add_ms", "attn_rope_ms")
_FINE = 1024  # up to here the profile has a point every 8 tokens, and the next one above is what a batch costs

_LAYERS, _WIDTH, _FFN, _KV_WIDTH, _VOCABULARY = 32, 4096, 14336, 1024, 128256
_LAYER_PARAMETERS = 2 * _WIDTH**2 + 2 * _WIDTH * _KV_WIDTH + 3 * _WIDTH * _FFN
KV_BYTES_PER_TOKEN = 2 * _LAYERS * _KV_WIDTH * 2
_ATTENTION_FLOPS_PER_MS = 180e9
_HOST_MS = {"decode": 1.0, "prefill": 5.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Milliseconds of one layer at the highest clock, TP 1.

    Attributes:
      tokens: [N] ascending numbers of tokens.
      linear_ms: [N] the four matrix products.
      pointwise_ms: [N] norms, activation, rope, residuals.
      synthetic: whether it was made up.
    """

    tokens: np.ndarray
    linear_ms: np.ndarray
    pointwise_ms: np.ndarray
    synthetic: bool = False

    @classmethod
    def a100_llama(cls) -> "Profile":
        """The measured one; where its file is absent, a staircase with steps of 128 tokens like it."""
        try:
            path = core.data_path(A100_PROFILE)
        except core.DataUnavailable:
            tokens = np.concatenate([[1], np.arange(8, _FINE + 1, 8), np.arange(2048, 32769, 1024)])
            tiles = np.where(tokens <= 128, tokens / 256, np.ceil(tokens / 128) - 0.5)
            return cls(tokens, 0.276 + 0.224 * tiles, 0.026 + 1.7e-4 * tokens, synthetic=True)
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["num_tensor_parallel_workers"] == "1"]
        tokens, found = np.unique([int(row["num_tokens"]) for row in rows], return_index=True)  # the largest came twice
        linear, pointwise = (
            np.array([sum(float(row[op]) for op in ops) for row in rows])[found] for ops in (_LINEAR, _POINTWISE)
        )
        return cls(tokens, linear, pointwise)

    def at(self, tokens: ArrayLike, column: np.ndarray) -> np.ndarray:
        """A column's values for numbers of tokens >= 1: steps up to 1024 tokens, lines between points above."""
        tokens = np.asarray(tokens, np.float64)
        stepped = column[np.minimum(np.searchsorted(self.tokens, tokens), len(self.tokens) - 1)]
        slope = (column[-1] - column[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond = column[-1] + slope * (tokens - self.tokens[-1])
        smooth = np.where(tokens > self.tokens[-1], beyond, np.interp(tokens, self.tokens, column))
        return np.where(tokens <= _FINE, stepped, smooth)


class ProfiledLatency:
    """Milliseconds of an iteration by clock, batch and tokens; has a latency table's `predict`.

    Decode: `batch` running requests with `tokens` in their KV caches. Prefill: `batch` prompts of `tokens` in all.

    Args:
      phase: "decode" or "prefill".
      profile: of one layer.
      highest: MHz the profile was measured at.
    """

    def __init__(self, phase: Literal["decode", "prefill"], profile: Profile, highest: int = A100_CLOCKS[-1]) -> None:
        if phase not in _HOST_MS:
            raise ValueError(f"phase: expected decode or prefill, got {phase!r}")
        self.phase: Literal["decode", "prefill"] = phase
        self.freqs = A100_CLOCKS
        self._profile, self._highest = profile, highest
        self._kv_read_ms = KV_BYTES_PER_TOKEN / (2 * _LAYER_PARAMETERS) * float(profile.linear_ms[0])
        self._reads_ms = float(profile.linear_ms[0])  # a layer's, with one token: nothing but the weights is read

    def predict(self, freq: ArrayLike, batch: ArrayLike, tokens: ArrayLike) -> Any:
        """Milliseconds, broadcast; a float if all are scalars, 0 for a batch of 0.

        Raises:
          ValueError: a clock that is not one of the card's.
        """
        freq, batch, tokens = (np.asarray(value, np.float64) for value in (freq, batch, tokens))
        if not np.isin(freq, self.freqs).all():
            raise ValueError(f"freq: expected a clock of {self.freqs[0]}..{self.freqs[-1]} in steps of 15, got {freq}")
        fixed, scaled = self._parts(batch, tokens)
        value = np.where(batch > 0, fixed + scaled * (self._highest / freq), 0.0)
        return float(value) if value.ndim == 0 else value

    def at(self, freq: int) -> Callable[[int, int], float]:
        """`predict` at one clock, for whole numbers and fast."""
        factor = self._highest / float(freq)
        self.predict(freq, 1, 1)
        if self.phase == "decode":
            read, table = self._kv_read_ms, self._by_batch(factor)
            return lambda batch, tokens: table[batch] + read * tokens

        @functools.lru_cache(maxsize=65536)
        def prefill(batch: int, tokens: int) -> float:
            fixed, scaled = self._parts(np.float64(batch), np.float64(tokens))
            return float(fixed + scaled * factor)

        return prefill

    def _by_batch(self, factor: float, largest: int = 8192) -> list[float]:
        fixed, scaled = self._parts(np.arange(1.0, largest + 1), np.zeros(largest))
        return [0.0, *(fixed + scaled * factor).tolist()]

    def _parts(self, batch: Any, tokens: Any) -> tuple[Any, Any]:
        """What does not depend on the clock, and what does, at the highest one."""
        head = (_VOCABULARY * _WIDTH) / _LAYER_PARAMETERS
        rows = batch if self.phase == "decode" else tokens
        body = self._profile.at(np.maximum(rows, 1), self._profile.linear_ms)
        last = self._profile.at(np.maximum(batch, 1), self._profile.linear_ms)
        pointwise = self._profile.at(np.maximum(rows, 1), self._profile.pointwise_ms)
        reads = (_LAYERS + head) * self._reads_ms
        work = _LAYERS * np.maximum(body - self._reads_ms, 0) + head * np.maximum(last - self._reads_ms, 0)
        if self.phase == "decode":
            return _HOST_MS["decode"] + reads + _LAYERS * pointwise + self._kv_read_ms * tokens, work
        flops = 2 * _WIDTH * _LAYERS * tokens * tokens / np.maximum(batch, 1)
        return _HOST_MS["prefill"] + reads + _LAYERS * pointwise, work + flops / _ATTENTION_FLOPS_PER_MS


def scalar(model: Any, freq: int) -> Callable[[int, int], float]:
    """A latency model's or table's prediction at one clock as a function of whole numbers.

    Raises:
      ValueError: the clock is none of the model's; when called, a batch that it has no prediction for.
    """
    if hasattr(model, "at"):
        return model.at(freq)
    model.predict(freq, 1, 1)

    @functools.lru_cache(maxsize=65536)
    def predict(batch: int, tokens: int) -> float:
        value = float(model.predict(freq, batch, tokens))
        if math.isnan(value):
            raise ValueError(f"models: no prediction for a batch of {batch} with {tokens} tokens at {freq} MHz")
        return value

    return predict
