"""How likely a decoder finds commands: a context once, and behind it all commands side by side.

A row holds a context and then every command. Tokens of a command see the context and their own command alone, and
stand at the positions that follow the context, so that each command is scored as if it were the only one. Sizes are
rounded up to few shapes: other contexts and commands compile nothing new.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.models.decoder import head_weight
from pallas_kernels.logprob_entropy import logprob_entropy

_ROWS = (1, 4, 16)
_TOKENS = 4096  # of one program's batch; attention needs rows * heads * length^2 numbers


def command_logps(
    model: Any, params: Any, contexts: Sequence[Sequence[int]], commands: Sequence[Sequence[Sequence[int]]]
) -> list[list[Float[np.ndarray, " t"]]]:
    """The log-probability of each token of each command behind its context.

    Args:
      model: a `Decoder`.
      params: its parameters.
      contexts: ids, at least one each.
      commands: of each context, ids of each of its commands, at least one each.

    Returns:
      For each context, for each of its commands: float32, one number a token.
    """
    rows = [_Row(context, listed) for context, listed in zip(contexts, commands, strict=True)]
    branching = model.clone(attention=_branching)
    found: list[list[np.ndarray]] = []
    start = 0
    while start < len(rows):
        left = rows[start:]
        size = _bucket(max(len(row.tokens) for row in left[: _ROWS[-1]]), 64)
        most = max(1, min(_ROWS[-1], _TOKENS // size))
        count = next((each for each in _ROWS if each >= min(len(left), most)), most)
        taken = left[:count]
        scored = _bucket(max(len(row.targets) for row in taken), 16)
        arrays = [np.zeros((count, size), np.int32) for _ in range(3)]
        places = [np.zeros((count, scored), np.int32) for _ in range(2)]
        for index, row in enumerate(taken):
            for array, values in zip(arrays, (row.tokens, row.positions, row.segments)):
                array[index, : len(values)] = values
            for array, values in zip(places, (row.before, row.targets)):
                array[index, : len(values)] = values
        logps = np.asarray(_logps(branching, params, *arrays, *places))
        found += [row.split(values) for row, values in zip(taken, logps)]
        start += count
    return found


class _Row:
    """One context with its commands: segment 1 is the context, 2, 3, ... are the commands, 0 is padding."""

    def __init__(self, context: Sequence[int], commands: Sequence[Sequence[int]]):
        length = len(context)
        self._lengths = [len(command) for command in commands]
        self.tokens, self.positions, self.segments = [*context], [*range(length)], [1] * length
        self.before: list[int] = []
        self.targets: list[int] = []
        for number, command in enumerate(commands, 2):
            at = len(self.tokens)
            self.before += [length - 1, *range(at, at + len(command) - 1)]
            self.targets += command
            self.tokens += command
            self.positions += range(length, length + len(command))
            self.segments += [number] * len(command)

    def split(self, logps: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum(self._lengths)
        return [logps[end - length : end] for length, end in zip(self._lengths, ends)]


@functools.partial(jax.jit, static_argnums=0)
def _logps(
    model: Any,
    params: Any,
    tokens: Int[Array, "r s"],
    positions: Int[Array, "r s"],
    segments: Int[Array, "r s"],
    before: Int[Array, "r m"],
    targets: Int[Array, "r m"],
) -> Float[Array, "r m"]:
    """Log-probabilities of targets by the hidden states before them."""
    hidden = model.apply({"params": params}, tokens, positions, segments).hidden
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    head = head_weight(params).astype(hidden.dtype)
    out = logprob_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))
    return out.logp.reshape(targets.shape)


def _branching(q, k, v, *, positions, segment_ids, scale, window):
    """Attention to the context and to one's own command; every row has a context, so that no query sees nothing."""
    batch, length, _, dim = q.shape
    index = jnp.arange(length)
    seen = (segment_ids[:, None, :] == segment_ids[:, :, None]) | (segment_ids[:, None, :] == 1)
    seen &= index[None, :] <= index[:, None]
    if window is not None:
        seen &= positions[:, None, :] > positions[:, :, None] - window
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30), axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def _bucket(size: int, least: int) -> int:
    """The least power of two, or three quarters of one, that holds `size`."""
    whole = 1 << (max(size, least) - 1).bit_length()
    return whole if size > 3 * whole // 4 or whole == least else 3 * whole // 4
