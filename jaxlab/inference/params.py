"""What a caller may ask of sampling: one request's parameters, and many requests as arrays."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Checked when made.

    Sequences are kept as tuples. Truncation follows the temperature, in the order top_k, top_p, min_p; top_p counts the
    mass that top_k left.

    Attributes:
        max_tokens: how many tokens at most.
        temperature: divides the logits; 0 is greedy.
        top_k: keeps the k likeliest tokens (the lower id of equals); 0 keeps all.
        top_p: keeps the fewest likeliest tokens that hold this share of the mass; 1 keeps all.
        min_p: keeps tokens at least this times as likely as the likeliest; 0 keeps all.
        stop_ids: tokens that end the request; the one met is kept.
        ignore_eos: go on where the tokenizer's `eos_token_id` is drawn; `stop_ids` still end the request.
        stop: strings that end the request; `text` ends before the one met. Needs a tokenizer.
        seed: of this request alone (serving engine; `generate` takes `rng`).
        logprobs: how many alternatives to report with each token (serving engine).
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self):
        for name in ("max_tokens", "top_k", "logprobs"):
            self._store(name, self._integer(name, getattr(self, name)))
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            self._store(name, float(value))
        self._check("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "finite and at least 0")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        if self.seed is not None:
            self._store("seed", self._integer("seed", self.seed))
        self._store("stop_ids", tuple(self._integer("stop_ids", i) for i in self.stop_ids))
        self._check("stop_ids", all(i >= 0 for i in self.stop_ids), "ids of at least 0")
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(string, str) for string in strings):
            raise TypeError(f"stop: expected strings, got {self.stop!r}")
        self._store("stop", strings)
        self._check("stop", all(strings), "strings that are not empty")

    def ending_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """All tokens that end the request, where a tokenizer (or None) reads it."""
        eos = None if tokenizer is None or self.ignore_eos else tokenizer.eos_token_id
        return (*self.stop_ids, *([] if eos is None else [int(eos)]))

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {rule}, got {getattr(self, name)!r}")

    @staticmethod
    def _integer(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        return int(value)


@struct.dataclass
class SamplingArrays:
    """The sampling parameters of B rows, as `sample` takes them: changing a value compiles nothing."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> "SamplingArrays":
        """One row for each element of `params`."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(one, name) for one in params], dtype)

        # A top_k beyond int32 is beyond any vocabulary.
        top_k = np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32)
        # device_put compiles nothing, where jnp.asarray makes a program for each new shape.
        columns = column("temperature", np.float32), top_k, column("top_p", np.float32), column("min_p", np.float32)
        return cls(*jax.device_put(columns))
