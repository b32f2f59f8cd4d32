"""Argument checks that the ops on a mixture of experts' buffer share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def floating(**arrays: tuple[Array, int]) -> None:
    """Each name stands for an array and its rank; the dtype must be floating."""
    _check(arrays, jnp.floating, "floating")


def integers(**arrays: tuple[Array, int]) -> None:
    """Each name stands for an array and its rank; the dtype must be integer."""
    _check(arrays, jnp.integer, "integers")


def count(name: str, value: Array, most: int) -> None:
    """A concrete count lies in [0, most]."""
    if not isinstance(value, jax.core.Tracer) and value.is_fully_addressable and not 0 <= int(value) <= most:
        raise ValueError(f"{name} must lie in [0, {most}], the rows of the buffer, got {int(value)}")


def _check(arrays: dict[str, tuple[Array, int]], kind: type, word: str) -> None:
    for name, (array, rank) in arrays.items():
        if array.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(f"{name} must be {word}, got {array.dtype}")
