"""One list of cases over every implementation of an op, every dtype and every gradient.

An op's tests give the op, a float64 oracle and cases; `check` runs one case. Functions are compiled once for each
(implementation, dtype, shapes), so cases that differ only in their values cost nothing more.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of an op, and how long its longest sum is.

    Attributes:
      name: for the test's id.
      make: random generator -> (arguments, cotangent), numpy; floating ones are rounded to the dtype under test.
      reduced: length of the longest sum in the result or in a gradient: errors grow with its square root.
    """

    name: str
    make: Callable[[np.random.Generator], tuple[tuple[np.ndarray, ...], np.ndarray]]
    reduced: int


# What one rounding costs, with room for the inputs' spread.
_UNIT = {jnp.dtype(jnp.float32): 2.0**-22, jnp.dtype(jnp.bfloat16): 2.0**-7, jnp.dtype(jnp.float64): 2.0**-50}


def tolerance(dtype: Any, reduced: int) -> float:
    """Largest error allowed relative to the size of the result: rounding errors add up like a random walk."""
    return 2 * _UNIT[jnp.dtype(dtype)] * max(1.0, reduced) ** 0.5


def check(
    op: Callable[..., jax.Array],
    case: Case,
    implementation: str | None,
    dtype: Any,
    *,
    oracle: Callable[..., np.ndarray],
    gradients: Callable[..., Sequence[np.ndarray]],
    differentiate: tuple[int, ...],
) -> None:
    """Compares value and gradients of `op(*args, implementation=...)` with the oracle's.

    Args:
      op: the public function.
      case: the inputs.
      implementation: handed to the op.
      dtype: of floating inputs; results and gradients must have it too.
      oracle: (*args) -> value, float64.
      gradients: (*args, cotangent) -> gradients, float64, one for each of `differentiate`.
      differentiate: positions of the arguments with gradients.
    """
    args, cotangent = case.make(np.random.default_rng(0))
    rounded = [jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x) for x in args]
    cotangent = jnp.asarray(cotangent, dtype)
    value, grads = _value_and_gradients(op, implementation, differentiate)(cotangent, *rounded)
    exact = [np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in rounded]
    bound = tolerance(dtype, case.reduced)
    expected = [oracle(*exact), *gradients(*exact, np.asarray(cotangent, np.float64))]
    for name, got, want in zip(("value", *(f"gradient {i}" for i in differentiate)), (value, *grads), expected):
        assert got.dtype == dtype, f"{name} has dtype {got.dtype}, not {dtype}"
        size = np.sqrt(np.mean(np.square(want))) if want.size else 0.0
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=bound, atol=bound * size, err_msg=name)


@functools.cache
def _value_and_gradients(op, implementation, differentiate):
    @jax.jit
    def run(cotangent, *args):
        def of(*chosen):
            full = list(args)
            for position, value in zip(differentiate, chosen):
                full[position] = value
            return op(*full, implementation=implementation)

        value, pullback = jax.vjp(of, *(args[i] for i in differentiate))
        return value, pullback(cotangent)

    return run


def compare(got: Sequence[jax.Array], want: Sequence[np.ndarray], value: float, gradients: float) -> None:
    """Holds the largest error of a value, and of each gradient after it, to a share of the largest magnitude."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-9)
        assert error <= (gradients if index else value), f"result {index}: {error}"
