"""Token log-probabilities and entropy, as SFPO's loss takes them: time and temporaries on this CPU, and of a GPU.

Peers are the formula over all logits and, for the log-probabilities alone and where it is installed, tokamax's
`linear_softmax_cross_entropy_loss` in its XLA form.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import temporary_bytes
from jaxlab.core.errors import MissingExtra
from pallas_kernels.logprob_entropy import logprob_entropy

SYSTEM = "sfpo"
MIB = 2**20

# SmolLM2-135M's head and 1024 tokens. The bars are those of the specification, section 7.
ROWS, WIDTH, VOCABULARY = 1024, 576, 49152
TEMPERATURE = 0.9
TIME_BAR, MEMORY_BAR = 1 / 1.3, 4.0


def formula(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The peer: logits of all tokens, float32."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / TEMPERATURE
    logs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0], -jnp.sum(jnp.exp(logs) * logs, axis=1)


def ours(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logprob_entropy without the log-sum-exp."""
    made = logprob_entropy(hidden, head, targets, temperature=TEMPERATURE)
    return made.logp, made.entropy


def loss(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array]:
    """What tokamax returns: minus the sum of the log-probabilities at temperature 1."""
    return (-jnp.sum(logprob_entropy(hidden, head, targets).logp),)


def with_gradients(function: Callable[..., Sequence[jax.Array]]) -> Callable[..., Any]:
    """(hidden, head, targets, *cotangents) -> results and gradients of hidden and head."""

    def run(hidden, head, targets, *cotangents):
        out, pull = jax.vjp(lambda hidden, head: function(hidden, head, targets), hidden, head)
        return out, pull(cotangents)

    return run


def abstract(dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """hidden, head and targets, not there."""
    array = jax.ShapeDtypeStruct
    return array((ROWS, WIDTH), dtype), array((WIDTH, VOCABULARY), dtype), array((ROWS,), jnp.int32)


def arrays(dtype: Any = jnp.float32, shape: tuple[int, int, int] = (ROWS, WIDTH, VOCABULARY)) -> tuple[jax.Array, ...]:
    """Rows that a norm has left, a head that makes logits of size 3, targets."""
    rng = np.random.default_rng(0)
    rows, width, vocabulary = shape
    hidden, head = rng.normal(size=(rows, width)), 3 * rng.normal(size=(width, vocabulary)) / np.sqrt(width)
    targets = rng.integers(0, vocabulary, rows)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets, jnp.int32)


def cases(quick: bool) -> Iterator[Case]:
    """Forward and with gradients against the formula (bfloat16 unless quick), tokamax, an H100's temporaries."""
    repeats = 3 if quick else 9
    cotangents = tuple(jnp.asarray(np.random.default_rng(1).normal(size=(2, ROWS)), jnp.float32))
    for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.bfloat16):
        args = arrays(dtype)
        for what, wrap, given in (("forward", _same, args), ("with gradients", with_gradients, (*args, *cotangents))):
            title = f"logprob_entropy {what}, {_SIZES} {jnp.dtype(dtype).name}, CPU"
            bars = (TIME_BAR, MEMORY_BAR) if dtype == jnp.float32 else (None, None)
            yield from _compared(title, wrap(ours), wrap(formula), given, "the formula", bars, repeats)
            if wrap is with_gradients:
                logits, own = 4 * ROWS * VOCABULARY / MIB, temporary_bytes(_compiled(wrap(ours), given)) / MIB
                yield Case(SYSTEM, title, "temporary MiB", own, logits, "the float32 logits alone", bars[1])
    if (peer := tokamax()) is not None:
        title, given = f"minus the sum of logp with gradients, {_SIZES} float32, CPU", (*arrays(), jnp.float32(1))
        programs = with_gradients(loss), with_gradients(peer)
        yield from _compared(title, *programs, given, "tokamax xla", (None, None), repeats)
    try:
        mine, theirs = ({k: v / MIB for k, v in gpu_temporaries(program).items()} for program in (ours, formula))
    except MissingExtra:
        return
    for what, own in mine.items():
        title = f"logprob_entropy {what}, {_SIZES} bfloat16, H100"
        yield Case(SYSTEM, title, "temporary MiB", own, theirs[what], "the formula")


def tokamax() -> Callable[..., tuple[jax.Array]] | None:
    """The XLA form of tokamax's fused cross-entropy, all logits stored; None where it is not installed."""
    try:
        from absl import flags
        from tokamax import linear_softmax_cross_entropy_loss
    except ImportError:
        return None
    flags.FLAGS.mark_as_parsed()  # it would look for its own options among those of this command
    return lambda hidden, head, targets: (
        linear_softmax_cross_entropy_loss(hidden, targets, head, reduction="sum", implementation="xla"),
    )


def gpu_temporaries(function: Callable[..., Sequence[jax.Array]], gpu: str = "h100") -> dict[str, int]:
    """Temporary bytes forward and with gradients, compiled for a GPU that need not be there.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    args, cotangents = abstract(jnp.bfloat16), [jax.ShapeDtypeStruct((ROWS,), jnp.float32)] * 2
    programs = {"forward": (function, args), "with gradients": (with_gradients(function), (*args, *cotangents))}
    target = plan.target(gpu)
    return {
        name: plan.compile(program, *given, target=target, labels=["input"] * len(given)).bytes["temporaries"]
        for name, (program, given) in programs.items()
    }


_SIZES = f"{ROWS} x {WIDTH} x {VOCABULARY}"


def _compared(
    title: str,
    own: Callable[..., Any],
    peer: Callable[..., Any],
    args: Sequence[jax.Array],
    peer_name: str,
    bars: tuple[float | None, float | None],
    repeats: int,
) -> Iterator[Case]:
    """Time and temporaries."""
    programs = [_compiled(program, args) for program in (own, peer)]
    seconds = interleaved(*(functools.partial(program, *args) for program in programs), repeats=repeats)
    yield Case(SYSTEM, title, "ms", *(1e3 * each for each in seconds), peer_name, bars[0])
    mib = (temporary_bytes(program) / MIB for program in programs)
    yield Case(SYSTEM, title, "temporary MiB", *mib, peer_name, bars[1])


def _compiled(program: Callable[..., Any], args: Sequence[jax.Array]) -> Any:
    return jax.jit(program).lower(*args).compile()


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
