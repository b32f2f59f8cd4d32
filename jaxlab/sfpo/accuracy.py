"""How often a policy is right, without drawing: the probability of the answer, and whether it is the likeliest."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree


class Answers(NamedTuple):
    """Prompts with their right answers as tokens, one a row, right-padded.

    Attributes:
        tokens: `[Q,S]` int32: prompt, answer, and the token that ends a text.
        answered: `[Q,S]`, True at tokens of the answer, its end included.
    """

    tokens: Int[np.ndarray, "Q S"]
    answered: Bool[np.ndarray, "Q S"]


class Accuracy(NamedTuple):
    """Means over problems.

    Attributes:
        sampled: the probability that a completion drawn at temperature 1 is the answer.
        greedy: the share of problems whose likeliest tokens are the answer's.
    """

    sampled: float
    greedy: float


def answers(rows: Sequence[Mapping[str, str]], tokenizer: Any) -> Answers:
    """The rows of a family's problems as tokens."""
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    ends = [[*tokenizer.encode(row["answer"]), tokenizer.eos_token_id] for row in rows]
    size = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends))
    tokens, answered = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
    for row, (prompt, end) in enumerate(zip(prompts, ends)):
        whole = len(prompt) + len(end)
        tokens[row, :whole] = prompt + end
        answered[row, len(prompt) : whole] = True
    return Answers(tokens, answered)


def measure(model: Any, params: PyTree, given: Answers) -> Accuracy:
    """One forward pass over all problems.

    `exact_match` gives the sampled accuracy on average, white space around an answer aside; its variance is that of the
    policy only.
    """
    sampled, greedy = _measure(model, params, given)
    return Accuracy(float(sampled), float(greedy))


@functools.partial(jax.jit, static_argnums=0)
def _measure(model: Any, params: PyTree, given: Answers) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = model.apply({"params": params}, given.tokens).logits[:, :-1].astype(jnp.float32)
    targets, answered = given.tokens[:, 1:], given.answered[:, 1:]
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    right = jnp.exp(jnp.sum(logp, axis=1, where=answered))
    likeliest = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~answered, axis=1)
    return jnp.mean(right), jnp.mean(likeliest.astype(jnp.float32))
