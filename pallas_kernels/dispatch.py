"""The one dispatcher of the kernels: which implementation runs is decided when a program is lowered for a platform.

Two kinds of failure are kept apart. *Cannot* (a dtype, a shape, a platform that an implementation does not serve) is
`NotImplementedError`: the next implementation is tried, and where none is left all reasons are raised together. *Wrong*
(bad arguments) is `ValueError` or `TypeError`, and is never caught.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import compat

NAMES = ("reference", "xla", "triton", "mosaic", "interpret")

# The order behind `implementation=None`; an op takes from it what it has.
_ORDER: Mapping[str | None, tuple[str, ...]] = {
    "cuda": ("mosaic", "triton", "xla"),
    "rocm": ("triton", "xla"),
    None: ("xla",),  # every other platform
}
# Names that do not serve every platform.
_SERVES = {"triton": ("cuda", "rocm"), "mosaic": ("cuda",), "ragged": ("cuda", "rocm")}

Implementation = str | Sequence[str] | None


class NoImplementation(ExceptionGroup, NotImplementedError):
    """No implementation asked for can run; `exceptions` holds the reason of each."""

    def derive(self, excs: Any, /) -> Any:
        """Keeps the class when `except*` splits the group."""
        return NoImplementation(self.message, excs)


def implementations(
    reference: Callable[..., Any], xla: Callable[..., Any], triton: Callable[..., Any], **others: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """A table for `dispatch`: these three, the Triton kernel interpreted, and an op's own extras by name."""
    interpret = functools.partial(triton, interpret=True)
    return {"reference": reference, "xla": xla, "triton": triton, "interpret": interpret, **others}


def dispatch(
    op: str, table: Mapping[str, Callable[..., Any]], implementation: Implementation, *args: Any, **kwargs: Any
) -> Any:
    """Calls the implementation of `op` that serves the platform for which the program is lowered.

    The traced program holds one branch for each order of names (`lax.platform_dependent`), so that one and the same
    trace runs on a CPU and compiles for a GPU that is not there: under `jit`, `vmap`, `shard_map`, and inside the
    functions of a `custom_vjp`.

    Args:
      op: name of the op, for messages.
      table: name -> function. Names are `NAMES` and the op's own extras; all functions agree in what they return.
      implementation: a name, names tried in order, or None for the platform's order: mosaic, triton, xla on CUDA;
        triton, xla on ROCm; xla elsewhere (an op without "xla" ends in "reference").
      *args: arrays (pytrees of them), handed to the function.
      **kwargs: static settings, handed to the function.

    Returns:
      What the chosen function returns.

    Raises:
      ValueError: a name that `table` lacks, or no name at all.
      NoImplementation: (an `ExceptionGroup` and a `NotImplementedError`) nothing that was asked for can run. Where only
        the platform stands against it, the error comes when the program is lowered for that platform.
    """
    names = check_names(op, table, implementation)
    orders = {
        platform: tuple(name for name in names or _default_order(table, platform) if _serves(name, platform))
        for platform in _ORDER
    }
    request = _Request(op, tuple(table), names or tuple(dict.fromkeys(sum(orders.values(), ()))))

    def first_willing(platform: str | None, *args: Any) -> Any:
        reasons = []
        for name in orders[platform]:
            try:
                with compat.default_device_for(platform):
                    return table[name](*args, **kwargs)
            except NotImplementedError as error:
                reasons.append(error)
        raise _Unwilling(reasons)

    # Platforms with the same order share one branch, traced once.
    leaders = {order: platform for platform, order in reversed(orders.items())}

    def result_type(*args: Any) -> Any:
        reasons = []
        for platform in leaders.values():
            try:
                return jax.eval_shape(functools.partial(first_willing, platform), *args)
            except _Unwilling as unwilling:
                reasons += unwilling.reasons
        raise request.refusal(None, reasons)

    def branch(platform: str | None, *args: Any) -> Any:
        try:
            return first_willing(platform, *args)
        except _Unwilling as unwilling:
            # An error only if the program is lowered for this platform; until then it needs a value of the right type.
            return _refuse(request, tuple(unwilling.reasons), result_type(*args))

    if len(leaders) == 1:
        return branch(None, *args)
    branches = {order: functools.partial(branch, platform) for order, platform in leaders.items()}
    chosen = {platform: branches[order] for platform, order in orders.items() if platform is not None}
    return jax.lax.platform_dependent(*args, default=branches[orders[None]], **chosen)


def check_names(
    op: str, table: Mapping[str, Callable[..., Any]], implementation: Implementation
) -> tuple[str, ...] | None:
    """The names asked for as a tuple, or None for the platform's own order.

    Raises:
      ValueError: a name that `table` lacks, or no name at all.
      TypeError: neither a name nor a sequence of names.
    """
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{op}: implementation must be a name or a sequence of names, got {name!r}")
        if name not in table:
            raise ValueError(f"{op}: unknown implementation {name!r}; expected one of: {', '.join(table)}")
    if not names:
        raise ValueError(f"{op}: implementation is an empty sequence; expected some of: {', '.join(table)}")
    return names


def _default_order(table: Mapping[str, Callable[..., Any]], platform: str | None) -> tuple[str, ...]:
    order = tuple(name for name in _ORDER[platform] if name in table)
    return order if "xla" in table else (*order, "reference")


def _serves(name: str, platform: str | None) -> bool:
    return name not in _SERVES or platform in _SERVES[name]


class _Unwilling(Exception):
    """Every implementation that serves a platform has refused the arguments."""

    def __init__(self, reasons: list[NotImplementedError]):
        super().__init__(reasons)
        self.reasons = reasons


@dataclasses.dataclass(frozen=True)
class _Request:
    """Who asked for what: enough to word a refusal."""

    op: str
    known: tuple[str, ...]
    asked: tuple[str, ...]

    def refusal(self, platform: str | None, reasons: Sequence[Exception]) -> NoImplementation:
        """The error on one platform (None: on any); `reasons` are those that the implementations gave."""
        others = [name for name in self.known if name not in self.asked and _serves(name, platform)]
        unable = [
            NotImplementedError(f"{self.op}: {name!r} runs on {' and '.join(_SERVES[name])} only, not on {platform!r}")
            for name in self.asked
            if platform is not None and not _serves(name, platform)
        ]
        where = "" if platform is None else f" on platform {platform!r}"
        every = [*unable, *reasons]
        return NoImplementation(
            f"{self.op}: implementation {', '.join(map(repr, self.asked))} cannot run{where} "
            f"({'; '.join(map(str, every))}); names to try instead: {', '.join(others) or 'none'}",
            every,
        )


# The identity, except that lowering it raises the refusal.
_refuse_p = Primitive("no_implementation")
_refuse_p.multiple_results = True


def _refuse(request: _Request, reasons: tuple[Exception, ...], result: Any) -> Any:
    leaves, tree = jax.tree.flatten(result)
    zeros = [_vary(jnp.zeros(x.shape, x.dtype), getattr(x.manual_axis_type, "varying", frozenset())) for x in leaves]
    return tree.unflatten(_refuse_p.bind(*zeros, request=request, reasons=reasons))


def _refuse_lowering(ctx: Any, *_: Any, request: _Request, reasons: tuple[Exception, ...]) -> Any:
    raise request.refusal((ctx.platforms or ctx.module_context.platforms)[0], reasons)


_refuse_p.def_impl(lambda *args, **params: jax.jit(functools.partial(_refuse_p.bind, **params))(*args))
_refuse_p.def_abstract_eval(lambda *avals, **_: list(avals))
mlir.register_lowering(_refuse_p, _refuse_lowering)


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """Makes all arrays vary over the union of their `shard_map` axes (nothing to do outside a `shard_map`).

    JAX does so for its own operations. An op with a `custom_vjp` does it first of all, because the transpose (a sum
    over the added axes) then lies outside, and the hand-written gradients need not know about it.
    """
    union = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    return tuple(_vary(array, union) for array in arrays)


def _vary(array: Any, axes: frozenset[str]) -> Any:
    missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def zeros_alike(shape: tuple[int, ...], dtype: Any, *arrays: Any) -> jax.Array:
    """Zeros for a loop's carry: under `shard_map` they vary as `arrays` (after `vary_alike`) do."""
    return _vary(jnp.zeros(shape, dtype), jax.typeof(arrays[0]).manual_axis_type.varying)


def output_like(shape: tuple[int, ...], dtype: Any, *arrays: Any) -> jax.ShapeDtypeStruct:
    """The `out_shape` of a `pallas_call`: under `shard_map` it varies as `arrays` (after `vary_alike`) do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)
