"""What a kernel needs to be shown in docs/kernels.md."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Op:
    """A kernel and the inputs on which it is shown.

    Attributes:
      name: of the op.
      what: one sentence.
      function: (*args, implementation=...) -> array or arrays.
      implementations: names that run on a CPU.
      peer: the one to which times are compared.
      gpu_implementations: names compiled for GPUs.
      arrays: CPU inputs, float32.
      shape: those in words.
      oracle: (*args, cotangent) -> values and gradients, float64; without gradients (*args) -> values. A function of
        several arrays has as many cotangents, in a tuple.
      differentiate: positions of the arguments with gradients; none for an op that has no gradient.
      gpu_shapes: arguments and, last, the cotangent (if there are gradients) of the programs compiled for GPUs.
      gpu_shape: those in words.
      notes: what else a reader should know.
    """

    name: str
    what: str
    function: Callable[..., Any]
    implementations: tuple[str, ...]
    peer: str
    gpu_implementations: tuple[str, ...]
    arrays: Callable[[], tuple[jax.Array, ...]]
    shape: str
    oracle: Callable[..., Sequence[np.ndarray]]
    differentiate: tuple[int, ...]
    gpu_shapes: Callable[[], tuple[jax.ShapeDtypeStruct, ...]]
    gpu_shape: str
    notes: str = ""
