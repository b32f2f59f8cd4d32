"""AdamW on flat buckets in host memory: one step by three backends, and the same as Optax transformations."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, DTypeLike, Float, PyTree

from jaxlab.superoffload import host_kernel, undo
from jaxlab.superoffload.host_kernel import Moments
from pallas_kernels.fused_adam import check_arrays, check_emit, check_hyper, fused_adam

AnyArray = Array | np.ndarray
BACKENDS = ("auto", "xla", "ffi", "pallas")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of AdamW, or of Adam with L2 decay; a pytree, so that numbers are traced and never compiled in.

    Attributes:
      lr: learning rate, or a schedule: steps made -> learning rate.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator, positive.
      weight_decay: decoupled ("adamw") or added to the gradient ("adam").
      mode: "adamw" or "adam"; "amsgrad" is a NotImplementedError.
      bias_correction: whether moments are divided by 1 - b^t.
    """

    lr: Any
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    weight_decay: Any = 0.0
    mode: str = "adamw"
    bias_correction: bool = True

    def __post_init__(self):
        values = vars(self) | {"lr": None if callable(self.lr) else self.lr}
        del values["bias_correction"]
        check_hyper(**values)

    def at(self, count: Any) -> dict[str, Any]:
        """The keywords of a step after `count` steps, for `fused_adamw`; the schedule is evaluated."""
        lr = self.lr(count) if callable(self.lr) else self.lr
        return {**vars(self), "lr": lr, "count": count}

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Numbers as leaves; a schedule, the mode and the switch as structure."""
        schedule, lr = (self.lr, None) if callable(self.lr) else (None, self.lr)
        return (lr, self.b1, self.b2, self.eps, self.weight_decay), (schedule, self.mode, self.bias_correction)

    @classmethod
    def tree_unflatten(cls, structure: tuple[Any, ...], leaves: tuple[Any, ...]) -> "AdamHyper":
        """Puts them together again, unchecked: leaves may be anything while JAX handles the tree."""
        schedule, *switches = structure
        made = object.__new__(cls)
        values = (leaves[0] if schedule is None else schedule, *leaves[1:], *switches)
        vars(made).update(zip((field.name for field in dataclasses.fields(cls)), values))
        return made


def fused_adamw(
    p: Float[AnyArray, " n"],
    m: Float[AnyArray, " n"],
    v: Float[AnyArray, " n"],
    g: Float[AnyArray, " n"],
    *,
    count: Any,
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    scale: Any = 1.0,
    mode: str = "adamw",
    bias_correction: bool = True,
    emit_dtype: DTypeLike | None = jnp.bfloat16,
    backend: str = "auto",
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"], Float[Array, " n"] | None]:
    """Step `count + 1` of AdamW (or Adam with L2 decay) on one bucket; formula and arguments as for `fused_adam`.

    "xla" and "ffi" give the same bits, those of the formula rounded operation by operation in float32 (a denormal
    counts as zero), however a state is cut into buckets. "ffi" reads and writes every array once; XLA makes three loops
    of it.

    Called by itself it leaves its inputs alone. In a jitted function that donates p, m and v the step is in place, and
    needs no new memory:

        step = jax.jit(functools.partial(fused_adamw, lr=1e-3), donate_argnums=(0, 1, 2))

    Args:
      p: parameters, float32.
      m: first moments, float32.
      v: second moments, float32.
      g: gradients, any floating dtype.
      count: steps already made.
      lr: learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      weight_decay: decoupled ("adamw"), or added to the gradient times p ("adam").
      scale: multiplies the gradient.
      mode: "adamw" or "adam".
      bias_correction: whether moments are divided by 1 - b^t.
      emit_dtype: dtype of the copy of the new parameters (bfloat16, float16, float32); None for none.
      backend: "ffi" (compiled by the system's C++ compiler on first use; CPU only), "xla" (anywhere), "pallas"
        (`pallas_kernels.fused_adam`: a kernel on GPUs), or "auto": "ffi" on a CPU, "pallas" elsewhere; without a
        compiler "xla", with one warning.

    Returns:
      p, m, v, and the copy of p or None.

    Raises:
      ValueError: shapes that differ, a rank other than 1, hyper-parameters out of range, unknown mode or backend.
      TypeError: p, m or v not float32; g not floating; another dtype to emit.
      NotImplementedError: mode "amsgrad".
      RuntimeError: backend "ffi" without a C++ compiler.
    """
    p, m, v, g = check_arrays(p, m, v, g)
    check_hyper(count=count)
    hyper = AdamHyper(lr, b1, b2, eps, weight_decay, mode, bias_correction).at(count)
    settings = {"emit_dtype": check_emit(emit_dtype), "backend": resolve(backend)}
    (p, m, v), cast = step((p, m, v), g, hyper, scale, **settings)
    return p, m, v, cast


def resolve(backend: str) -> str:
    """Checks a backend's name and compiles what it needs: "xla", "ffi", "pallas", or "auto" where "ffi" can run too.

    Raises:
      ValueError: unknown.
      RuntimeError: "ffi" without a C++ compiler.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "ffi":
        host_kernel.load()
    return "auto" if backend == "auto" and _ffi_loads() else "xla" if backend == "auto" else backend


@functools.cache  # so that there is one warning
def _ffi_loads() -> bool:
    try:
        host_kernel.load()
    except RuntimeError as error:
        warnings.warn(f"the host optimizer falls back to backend='xla', which is slower: {error}", stacklevel=4)
        return False
    return True


def step(
    old: Moments,
    g: Float[Array, " n"],
    hyper: dict[str, Any],
    scale: Any,
    *,
    emit_dtype: DTypeLike | None,
    backend: str,
    in_place: bool | None = None,
    threads: int = 0,
) -> tuple[Moments, Array | None]:
    """`fused_adamw` by a resolved backend: the new p, m and v, and the copy of p or None.

    Args:
      old: p, m and v.
      g: gradients.
      hyper: keywords as `AdamHyper.at` gives them.
      scale: multiplies the gradients.
      emit_dtype: of the copy, or None.
      backend: as `resolve` gives it.
      in_place: whether "ffi" updates p, m and v where they are; None: only where they are traced.
      threads: at most so many for "ffi"; 0 for all of XLA's.
    """
    traced = hyper | {"scale": scale}
    if in_place is None:
        in_place = isinstance(g, jax.core.Tracer)

    def xla(old: Moments, g: Array, implementation: str | None = "xla") -> tuple[Moments, Array | None]:
        p, m, v, cast = fused_adam(*old, g, **traced, emit_dtype=emit_dtype, implementation=implementation)
        return (p, m, v), cast

    def ffi(old: Moments, g: Array) -> tuple[Moments, Array | None]:
        settings = {"decoupled": hyper["mode"] == "adamw", "emit": emit_dtype, "in_place": in_place, "threads": threads}
        return host_kernel.step(old, g, undo.scalars(traced), **settings)[:2]

    anywhere = functools.partial(xla, implementation=None)
    if backend == "auto":
        return jax.lax.platform_dependent(old, g, cpu=ffi, default=anywhere)
    return {"xla": xla, "ffi": ffi, "pallas": anywhere}[backend](old, g)


class HostAdamState(NamedTuple):
    """State of `scale_by_host_adam`: steps made (int32) and moments (float32, in the shape of the parameters)."""

    count: Array
    mu: Any
    nu: Any


def scale_by_host_adam(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, *, backend: str = "auto"
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` by the fused step: updates are the bias-corrected directions, moments are float32.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      backend: as for `fused_adamw`.

    Raises:
      ValueError: a value out of range, an unknown backend.
    """
    check_hyper(b1=b1, b2=b2, eps=eps)
    resolve(backend)

    def init(params: PyTree) -> HostAdamState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        return HostAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **_: Any) -> tuple[PyTree, HostAdamState]:
        del params
        resolved, hyper = resolve(backend), AdamHyper(0.0, b1, b2, eps).at(state.count) | {"lr": jnp.float32(-1)}

        def one(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            # What a step of size -1 from zero arrives at is the direction.
            old = (jnp.zeros((g.size,), jnp.float32), mu.reshape(-1), nu.reshape(-1))
            (moved, m, v), _ = step(old, g.reshape(-1), hyper, 1.0, emit_dtype=None, backend=resolved)
            return moved.reshape(g.shape).astype(g.dtype), m.reshape(g.shape), v.reshape(g.shape)

        made = jax.tree.map(one, updates, state.mu, state.nu)
        directions, mu, nu = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0, 0, 0)), made)
        return directions, HostAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def host_adamw(
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any | Callable[[PyTree], Any] | None = None,
    *,
    backend: str = "auto",
) -> optax.GradientTransformation:
    """`optax.adamw` by the fused step, for whatever is built from Optax transformations.

    Optax applies updates in a pass of its own; `fused_adamw` and the engine do not, and are faster.

    Args:
      lr: learning rate or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      weight_decay: decoupled.
      mask: tree of bools, or a function params -> tree, True where weights decay.
      backend: as for `fused_adamw`.

    Raises:
      ValueError: a value out of range, an unknown backend.
    """
    check_hyper(lr=None if callable(lr) else lr, weight_decay=weight_decay)
    return optax.chain(
        scale_by_host_adam(b1, b2, eps, backend=backend),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(lr),
    )
