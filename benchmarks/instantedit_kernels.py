"""InstantEdit's kernels at Stable Diffusion's shapes: time and temporaries on this CPU, temporaries of an H100.

The peer of self-attention is `jax.nn.dot_product_attention`; those of the others are the formulas, fused by XLA.
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
from pallas_kernels.attention_with_map import attention_with_map
from pallas_kernels.dpg_ili_update import dpg_ili_update
from pallas_kernels.flash_self_attention import flash_self_attention

SYSTEM = "instantedit"
MIB = 2**20
HEADS, WORDS = 8, 77
PEER = "jax.nn.dot_product_attention"

# Rows, places and head size of the layers of Stable Diffusion 1.5 at 512 x 512; bars of time and of temporaries.
_SELF = {(1, 4096, 40): (1.0, 8.0), (4, 1024, 80): (1.0, 8.0), (4, 256, 160): (None, 8.0), (4, 64, 160): (None, None)}
_WORDS = {(4, 4096, 40): (None, 8.0), (4, 256, 160): (None, 8.0)}
_MAP = (4, 256, 160)
# gamma, t_start, t_end, t, t_next of the second of four steps.
STEP = (0.451579, 0.75, 0.5, 0.75, 0.5)


def self_attention(rows: int, places: int, dim: int, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v and the output's cotangent, not there."""
    return (jax.ShapeDtypeStruct((rows, places, HEADS, dim), dtype),) * 4


def with_map(rows: int, places: int, dim: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """q, k, v and the cotangents of output and map, not there."""
    q, k = (jax.ShapeDtypeStruct((rows, length, HEADS, dim), dtype) for length in (places, WORDS))
    return q, k, k, (q, jax.ShapeDtypeStruct((rows, places, WORDS), jnp.float32))


def arrays(shapes: Any) -> Any:
    """Normal numbers of some shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def latents(rows: int, side: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """The arguments of `dpg_ili_update`."""
    *floats, chance = arrays((jax.ShapeDtypeStruct((rows, side, side, 4), dtype),) * 8)
    return *floats, *map(jnp.float32, STEP), chance[..., 0] > 0, jnp.float32(1.1), jnp.float32(3.0)


def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The peer of `attention_with_map`: probabilities of all heads, float32."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhts,bshd->bthd", probabilities.astype(v.dtype), v), jnp.mean(probabilities, axis=1)


def gradients(attend: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    """(q, k, v, cotangents) -> gradients of q, k and v."""
    return lambda q, k, v, cotangents: jax.vjp(attend, q, k, v)[1](cotangents)


def cases(quick: bool) -> Iterator[Case]:
    """Each kernel beside its peer; and what is allocated on an H100."""
    compared = functools.partial(_compared, repeats=5 if quick else 11)
    peer = jax.nn.dot_product_attention
    for sizes, bars in _SELF.items():
        if quick and sizes[1] > 1024:
            continue
        args, what = arrays(self_attention(*sizes)), "{} x {} places, 8 heads of {}".format(*sizes)
        yield from compared(f"flash_self_attention, {what}", flash_self_attention, peer, args[:3], PEER, bars)
        if not quick or sizes[1] < 1024:
            title, programs = f"flash_self_attention gradients, {what}", map(gradients, (flash_self_attention, peer))
            yield from compared(title, *programs, args, PEER, (bars[0], None))  # the output is kept
    for sizes, bars in _WORDS.items():
        args, what = arrays(with_map(*sizes))[:3], "{} x {} places, 8 heads of {}, 77 words".format(*sizes)
        yield from compared(f"flash_self_attention, {what}", flash_self_attention, peer, args, PEER, bars)
    args, what = arrays(with_map(*_MAP)), "{} x {} places, 8 heads of {}, 77 words".format(*_MAP)
    bars = 1.0, 8.0
    yield from compared(f"attention_with_map, {what}", attention_with_map, formula, args[:3], "the formula", bars)
    programs = map(gradients, (attention_with_map, formula))
    yield from compared(f"attention_with_map gradients, {what}", *programs, args, "the formula", bars)
    plain = functools.partial(dpg_ili_update, implementation="reference")
    yield from compared("dpg_ili_update, 64 x 64", dpg_ili_update, plain, latents(1, 64), "the formula", (None, None))
    try:
        yield from _on_an_h100()
    except MissingExtra:
        return


def _on_an_h100() -> Iterator[Case]:
    shapes = self_attention(4, 4096, 40, jnp.bfloat16)
    for what, wrap, args in (("", _same, shapes[:3]), (" gradients", gradients, shapes)):
        mib = (_gpu_mib(wrap(program), args) for program in (flash_self_attention, jax.nn.dot_product_attention))
        title = f"flash_self_attention{what}, 4 x 4096 places, 8 heads of 40, bfloat16, H100"
        yield Case(SYSTEM, title, "temporary MiB", *mib, PEER, 8.0)
    shapes = with_map(*_MAP, jnp.bfloat16)
    for what, wrap, args in (("", _same, shapes[:3]), (" gradients", gradients, shapes)):
        mib = (_gpu_mib(wrap(program), args) for program in (attention_with_map, formula))
        title = f"attention_with_map{what}, 4 x 256 places, 8 heads of 160, 77 words, bfloat16, H100"
        yield Case(SYSTEM, title, "temporary MiB", *mib, "the formula", 8.0)


def _compared(
    title: str,
    own: Callable[..., Any],
    peer: Callable[..., Any],
    args: Sequence[Any],
    peer_name: str,
    bars: tuple[float | None, float | None],
    repeats: int,
) -> Iterator[Case]:
    programs = [jax.jit(program).lower(*args).compile() for program in (own, peer)]
    seconds = interleaved(*(functools.partial(program, *args) for program in programs), repeats=repeats)
    yield Case(SYSTEM, f"{title}, CPU", "ms", *(1e3 * each for each in seconds), peer_name, bars[0])
    mib = (temporary_bytes(program) / MIB for program in programs)
    yield Case(SYSTEM, f"{title}, CPU", "temporary MiB", *mib, peer_name, bars[1])


def _gpu_mib(program: Callable[..., Any], args: Sequence[Any]) -> float:
    from jaxlab.core import plan

    made = plan.compile(program, *args, target=plan.target("h100"), labels=["input"] * len(args))
    return made.bytes["temporaries"] / MIB


def _same(program: Callable[..., Any]) -> Callable[..., Any]:
    return program
