"""Log-probabilities and entropies of completions under the decoder that is being trained."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlab.models.decoder import head_weight
from jaxlab.training.loss import auto_axes
from jaxlab.training.sharding import BATCH_AXES
from pallas_kernels.logprob_entropy import logprob_entropy


@struct.dataclass
class TextInputs:
    """Prompts with their completions, one a row, right-padded.

    Attributes:
        tokens: `[B,S]` int32, a prompt, its completion, and after it any ids.
        starts: `[B]` int32, tokens of the prompt, at least 1.
    """

    tokens: Any
    starts: Any


class TokenLogps(NamedTuple):
    """Of each completion token, float32: its log-probability and the entropy of the distribution it was drawn from."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


def text_logps(
    model: Any, params: PyTree, inputs: TextInputs, *, length: int, temperature: float | Array = 1.0
) -> TokenLogps:
    """What a decoder says of completions. Only the logits of a few tokens exist at a time.

    Padding needs no mask: it lies behind everything that is read. Over a mesh each device works on its own rows.

    Args:
        model: a `Decoder`.
        params: its parameters; differentiable in them.
        inputs: rows of S >= length + 1 tokens.
        length: T, tokens of a completion at most; what lies beyond a row's completion is without meaning.
        temperature: divides the logits.
    """
    hidden = model.apply({"params": params}, jnp.asarray(inputs.tokens)).hidden
    return completion_logps(hidden, head_weight(params), inputs, length=length, temperature=temperature)


def completion_logps(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    inputs: TextInputs,
    *,
    length: int,
    temperature: float | Array = 1.0,
) -> TokenLogps:
    """The second half of `text_logps`, for a model of another kind.

    Args:
        hidden: final hidden states of `inputs.tokens`.
        head: of the model.
        inputs: as in `text_logps`, like the next two.
        length: T.
        temperature: divides the logits.
    """
    tokens, starts = jnp.asarray(inputs.tokens), jnp.asarray(inputs.starts)
    # The token at position p was drawn from the hidden state at p - 1.
    before = jnp.minimum(starts[:, None] - 1 + jnp.arange(length), tokens.shape[1] - 2)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, before + 1, axis=1)
    heads = functools.partial(_heads, temperature=temperature)
    return _over_rows(heads, hidden, head.astype(hidden.dtype), targets)


def _heads(hidden: Array, head: Array, targets: Array, *, temperature: float | Array) -> TokenLogps:
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = logprob_entropy(rows, head, targets.reshape(-1), temperature=temperature)
    return TokenLogps(out.logp.reshape(targets.shape), out.entropy.reshape(targets.shape))


def _over_rows(function: Any, hidden: Array, head: Array, targets: Array) -> TokenLogps:
    """Left to itself XLA would gather what a kernel, or a loop over pieces of the tokens, reads."""
    rows = auto_axes(jax.sharding.get_abstract_mesh(), BATCH_AXES, targets.shape[0])
    if not rows:
        return function(hidden, head, targets)
    place = PartitionSpec(rows)
    return jax.shard_map(
        function,
        in_specs=(place, PartitionSpec(), place),
        out_specs=place,
        axis_names=set(rows),
        check_vma=False,
    )(hidden, head, targets)
