"""One bucket's step, with or without a log of it, and the step undone: compiled once for each kind, donating or not."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlab.superoffload import host_adam, host_kernel, undo
from jaxlab.superoffload.host_adam import AdamHyper
from jaxlab.superoffload.host_kernel import Moments, Residual


class Copies(NamedTuple):
    """The old p, m and v of one bucket."""

    p: Array
    m: Array
    v: Array


@jax.jit
def scalars_of(count: Int[Array, ""], hyper: AdamHyper, scale: Any) -> Float[Array, "12"]:
    """The scalars of step `count + 1`, as `undo.scalars` makes them."""
    return undo.scalars(hyper.at(count) | {"scale": scale})


def step_bucket(
    old: Moments,
    g: Float[Array, " n"],
    count: Int[Array, ""],
    hyper: AdamHyper,
    scale: Any,
    coef: Any = 1.0,
    *,
    backend: str,
    donate: bool = False,
    keep: bool = False,
    emit_dtype: Any = None,
    reuse: Any = None,
    threads: int = 0,
) -> tuple[Moments, Array | None]:
    """The new p, m and v, and the copy of p in `emit_dtype` or None.

    Args:
      old: p, m and v.
      g: gradients.
      count: steps made.
      hyper: of Adam or AdamW.
      scale: inverse loss scale.
      coef: clipping coefficient; gradients are multiplied by `scale * coef`.
      backend: as `host_adam.resolve` gives it.
      donate: consume `old`.
      keep: the caller goes on using `old`, so under `jit` too the step is not in place.
      emit_dtype: of the copy.
      reuse: arrays like some results, whose memory these may take.
      threads: at most so many for "ffi"; 0 for all of XLA's.
    """
    run = _jitted(_step, donate, reuse is not None)
    place = donate or (is_traced(old, g) and not keep)
    settings = {"backend": backend, "emit_dtype": emit_dtype, "in_place": place, "threads": threads}
    return run(old, g, count, hyper, scale, coef, reuse, **settings)


def speculate_bucket(
    old: Moments,
    g: Float[Array, " n"],
    count: Int[Array, ""],
    hyper: AdamHyper,
    scale: Any,
    scalars: Float[Array, "12"],
    *,
    kind: str,
    backend: str,
    capacity: float = 0.01,
    donate: bool = False,
    emit_dtype: Any = None,
    reuse: Any = None,
    threads: int = 0,
) -> tuple[Moments, Array | None, Copies | Residual]:
    """`step_bucket`, and the log that undoes it; outside `jit` a residual log without room is replaced by copies.

    Args:
      old: p, m and v.
      g: gradients.
      count: steps made.
      hyper: of Adam or AdamW.
      scale: inverse loss scale.
      scalars: `scalars_of` the three before.
      kind: "copy" or "residual".
      backend: as `host_adam.resolve` gives it.
      capacity: room for exceptions, as a part of the bucket.
      donate: consume `old`, unless that is the log.
      emit_dtype: of the copy.
      reuse: arrays like some results, whose memory these may take.
      threads: at most so many for "ffi"; 0 for all of XLA's.
    """
    step = functools.partial(step_bucket, backend=backend, emit_dtype=emit_dtype, threads=threads)
    if kind == "copy":
        return *step(old, g, count, hyper, scale, reuse=reuse, keep=True), Copies(*old)
    traced = is_traced(old, g)
    # XLA needs the old values to the end, and could not leave some blocks as they were.
    in_place = donate and not traced and _steps_in_cpp(g, backend)
    new, cast, log = _jitted(_logged_step, in_place, reuse is not None)(
        old,
        g,
        count,
        hyper,
        scale,
        scalars,
        reuse,
        backend=backend,
        emit_dtype=emit_dtype,
        room=math.ceil(g.shape[0] * capacity),
        in_place=in_place or traced,
        stop=in_place,
        threads=threads,
    )
    if traced or not overflowed(log):
        return new, cast, log
    if not in_place:
        return new, cast, Copies(*old)
    # Blocks without room were left as they were; the others are undone, which gives the old arrays back.
    before = undo_bucket(new, g, count, scalars, log, mode=hyper.mode, backend=backend, donate=True, threads=threads)
    return *step(before, g, count, hyper, scale, reuse=cast, keep=True), Copies(*before)


def undo_bucket(
    new: Moments,
    g: Float[Array, " n"],
    count: Int[Array, ""],
    scalars: Float[Array, "12"],
    log: Copies | Residual,
    *,
    mode: str,
    backend: str,
    donate: bool = False,
    threads: int = 0,
) -> Moments:
    """The p, m and v before the step of `count`, `g` and `scalars` that made the log."""
    if isinstance(log, Copies):
        return log.p, log.m, log.v
    run, place = _jitted(_undo, donate, False), donate or is_traced(new, g)
    settings = {"decoupled": mode == "adamw", "backend": backend, "in_place": place, "threads": threads}
    return run(new, g, count, scalars, log, **settings)


def overflowed(log: Copies | Residual) -> bool:
    """Whether a log, no longer traced, had no room for some exceptions."""
    return isinstance(log, Residual) and bool(np.asarray(log.status)[1])


def is_traced(*trees: Any) -> bool:
    """Whether something in these trees is not known yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


_STATICS = {
    "_step": ("backend", "emit_dtype", "in_place", "threads"),
    "_logged_step": ("backend", "emit_dtype", "room", "in_place", "stop", "threads"),
    "_undo": ("decoupled", "backend", "in_place", "threads"),
}


@functools.cache
def _jitted(function: Callable[..., Any], donate: bool, reuse: bool) -> Callable[..., Any]:
    donated = (*(("old",) if donate else ()), *(("reuse",) if reuse else ()))
    statics = _STATICS[function.__name__]
    return jax.jit(function, static_argnames=statics, donate_argnames=donated, keep_unused=reuse)


def _step(old, g, count, hyper, scale, coef, reuse, *, backend, emit_dtype, in_place, threads):
    del reuse
    factor = jnp.asarray(scale, jnp.float32) * jnp.asarray(coef, jnp.float32)
    settings = {"emit_dtype": emit_dtype, "backend": backend, "in_place": in_place, "threads": threads}
    return host_adam.step(old, g, hyper.at(count), factor, **settings)


def _logged_step(old, g, count, hyper, scale, scalars, reuse, *, backend, emit_dtype, room, in_place, stop, threads):
    decoupled = hyper.mode == "adamw"

    def xla(old, g):
        plain = backend if backend == "xla" else "pallas"
        settings = {"backend": plain, "emit_dtype": emit_dtype, "in_place": False, "threads": 0}
        new, cast = _step(old, g, count, hyper, scale, 1.0, reuse, **settings)
        return new, cast, undo.encode(old, new, g, scalars, count, decoupled=decoupled, capacity=room)

    def ffi(old, g):
        settings = {"decoupled": decoupled, "capacity": room, "in_place": in_place, "stop": stop, "threads": threads}
        new, cast, _, log = host_kernel.step(old, g, scalars, emit=emit_dtype, **settings)
        return new, cast, log

    return _either(backend, ffi, xla, old, g)


def _undo(old, g, count, scalars, log, *, decoupled, backend, in_place, threads):
    def xla(new, g, log):
        return undo.decode(new, g, scalars, count, log, decoupled=decoupled)

    def ffi(new, g, log):
        return host_kernel.undo(new, g, scalars, log, decoupled=decoupled, in_place=in_place, threads=threads)

    return _either(backend, ffi, xla, old, g, log)


def _either(backend: str, ffi: Callable[..., Any], xla: Callable[..., Any], *args: Any) -> Any:
    if backend == "auto":
        return lax.platform_dependent(*args, cpu=ffi, default=xla)
    return (ffi if backend == "ffi" else xla)(*args)


def _steps_in_cpp(g: Array, backend: str) -> bool:
    return backend == "ffi" or (backend == "auto" and all(device.platform == "cpu" for device in g.devices()))
