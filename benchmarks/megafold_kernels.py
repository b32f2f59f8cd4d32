"""MegaFold's attention with a pair bias: time and temporaries on this CPU, and what a GPU would allocate.

The program is that of training: output and the gradients of q, k, v and the bias. Peers are the formula as one would
write it, `jax.nn.dot_product_attention`, torch's attention with a mask that takes a gradient, and, where it is
installed, tokamax's chunked form.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import temporary_bytes
from jaxlab.core.errors import MissingExtra
from pallas_kernels.evo_attention import evo_attention

SYSTEM = "megafold"
MIB = 2**20

Shape = tuple[int, int, int, int, int]
"""B, S, N, H, D"""

# The bars of MegaFold's specification, section 8, by length: how many times less than the formula.
TIME_BARS = {128: 1 / 0.85, 256: 1 / 0.85}
MEMORY_BARS = {256: 4.0, 384: 5.0}
# By length, of `jax.nn.dot_product_attention`: time, memory.
JAX_NN_BARS = {256: (1.0, 4.0)}
# Bytes that the program may take on an H100 at 384 residues; tokamax's Triton kernels take 439 MiB.
GPU_BYTES = 24 * MIB
# Other uses: one row of many heads (single attention), diffusion samples under one bias.
OTHERS = {"single, 384": (1, 1, 384, 16, 24), "48 samples, 128": (1, 48, 128, 16, 48)}


def triangle(length: int, dim: int = 32) -> Shape:
    """Triangle attention: as many rows as residues, 4 heads."""
    return (1, length, length, 4, dim)


def formula(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """The peer: logits of all rows at once, in q's dtype but for the softmax."""
    logits = jnp.einsum("bsihd,bsjhd->bshij", q, k) * q.shape[-1] ** -0.5 + bias
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum("bshij,bsjhd->bsihd", weights, v)


def jax_nn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention`: rows are batch entries, over which the bias is repeated."""
    batch, rows, length, heads, dim = q.shape
    flat = (x.reshape(-1, length, heads, dim) for x in (q, k, v))
    bias = jnp.broadcast_to(bias, (batch, rows, *bias.shape[2:])).reshape(-1, *bias.shape[2:])
    return jax.nn.dot_product_attention(*flat, bias=bias).reshape(q.shape)


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(q, k, v, bias, d_out) -> output and four gradients."""

    def run(q, k, v, bias, d_out):
        out, pull = jax.vjp(attend, q, k, v, bias)
        return out, *pull(d_out)

    return run


def ours(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """evo_attention without a mask."""
    return evo_attention(q, k, v, None, bias)


def abstract(shape: Shape, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, bias and d_out, not there."""
    batch, _, length, heads, _ = shape
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return *[array(shape)] * 3, array((batch, 1, heads, length, length)), array(shape)


def cases(quick: bool) -> Iterator[Case]:
    """Time at 128 residues (and 256 unless quick), temporaries up to 384, the other uses, and an H100's temporaries."""
    repeats = 5 if quick else 9
    peers = {"the formula": formula, "jax.nn.dot_product_attention": jax_nn}
    if (chunked := tokamax()) is not None:
        peers["tokamax xla_chunked"] = chunked
    for length in (128, 256, 384):
        shape, what = triangle(length), f"evo_attention, [1,{length},{length},4,32] float32, CPU"
        programs = {name: _compiled(attend, shape) for name, attend in {"ours": ours, **peers}.items()}
        args = _arrays(shape) if length in TIME_BARS and not (quick and length > 128) else None
        for name in peers:
            time_bar, memory_bar = TIME_BARS.get(length), MEMORY_BARS.get(length)
            if name != "the formula":
                time_bar, memory_bar = JAX_NN_BARS.get(length, (None, None)) if "jax" in name else (None, None)
            if args is not None:
                yield _timed(what, programs["ours"], programs[name], args, name, time_bar, repeats)
            mib = [temporary_bytes(programs[key]) / MIB for key in ("ours", name)]
            yield Case(SYSTEM, what, "temporary MiB", *mib, name, memory_bar)
        if args is not None and (peer := torch_program(args)) is not None:
            seconds = interleaved(functools.partial(programs["ours"], *args), peer, repeats=repeats, warmup=2)
            yield Case(SYSTEM, what, "ms", *(1e3 * each for each in seconds), "torch SDPA with a mask's gradient")
    for name, shape in OTHERS.items():
        args, what = _arrays(shape), f"evo_attention, {name} residues, {shape[3]} x {shape[4]} float32, CPU"
        own, peer = (_compiled(attend, shape) for attend in (ours, formula))
        yield _timed(what, own, peer, args, "the formula", None, repeats)
        yield Case(SYSTEM, what, "temporary MiB", *(temporary_bytes(x) / MIB for x in (own, peer)), "the formula")
    try:
        own, peer = (gpu_plan(attend, triangle(384)).bytes["temporaries"] / MIB for attend in (ours, formula))
    except MissingExtra:
        return
    what = "evo_attention, [1,384,384,4,32] bfloat16, H100"
    yield Case(SYSTEM, what, "temporary MiB", own, peer, "the formula", peer * MIB / GPU_BYTES)


def gpu_plan(attend: Callable[..., jax.Array], shape: Shape, dtype: Any = jnp.bfloat16, gpu: str = "h100") -> Any:
    """Output and four gradients, compiled for a GPU that need not be there.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    return plan.compile(with_gradients(attend), *abstract(shape, dtype), target=plan.target(gpu), labels=["input"] * 5)


def torch_program(args: Sequence[jax.Array]) -> Callable[[], Any] | None:
    """Output and four gradients of the same arrays in torch; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    q, k, v, bias, d_out = (torch.from_numpy(np.array(x[0])) for x in args)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]

    def run():
        for leaf in leaves:
            leaf.grad = None
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)
        out.backward(d_out)

    return run


def tokamax() -> Callable[..., jax.Array] | None:
    """The chunked XLA form of tokamax, rows as batch entries; None where it is not installed or does not load."""
    try:
        from tokamax import dot_product_attention
    except ImportError:
        return None

    def attend(q, k, v, bias):
        rows = (x.reshape(-1, *q.shape[2:]) for x in (q, k, v))
        bias = jnp.repeat(bias[:, 0], q.shape[1], 0)
        return dot_product_attention(*rows, bias=bias, implementation="xla_chunked").reshape(q.shape)

    return attend


def _arrays(shape: Shape) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in abstract(shape))


def _compiled(attend: Callable[..., jax.Array], shape: Shape) -> Any:
    return jax.jit(with_gradients(attend)).lower(*abstract(shape)).compile()


def _timed(
    what: str, own: Any, peer: Any, args: Sequence[jax.Array], peer_name: str, bar: float | None, repeats: int
) -> Case:
    seconds = interleaved(functools.partial(own, *args), functools.partial(peer, *args), repeats=repeats, warmup=2)
    return Case(SYSTEM, what, "ms", *(1e3 * each for each in seconds), peer_name, bar)
