"""Loss and gradients bucket by bucket: a backward pass in segments, so that the host can begin before it has ended."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlab.superoffload.bucket import BucketSpec
from jaxlab.superoffload.layout import cut
from jaxlab.superoffload.partition import Partition


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A network in pieces, for `SuperOffload`.

    Its parameters are a tuple with one entry a piece, and one for the head:

        x = fns[0](params[0], batch);   x = fns[i](params[i], x);   loss = head(params[-1], x, batch)

    A piece keeps only its input for the backward pass, which computes it again; its gradients leave for the host while
    those of the pieces before it are computed.

    Attributes:
      fns: the pieces, in forward order.
      head: the last one, which gives a scalar.
    """

    fns: Sequence[Callable[..., Any]]
    head: Callable[..., Any]


Gradients = Iterator[tuple[int, tuple[Array, ...]]]


class Backward:
    """Compiled forward and backward pass of a loss function or a `Segmented` network.

    Over a mesh a loss is that of the whole batch, and its gradients are summed into slices: each rank gets its own.

    Args:
      loss: (params, batch) -> scalar, or a `Segmented`.
      specs: buckets of each segment's parameters; one segment for a loss function.
      partition: how the buckets are shared.
    """

    def __init__(self, loss: Callable[..., Any] | Segmented, specs: Sequence[BucketSpec], partition: Partition):
        pieces = loss.fns if isinstance(loss, Segmented) else ()
        head = loss.head if isinstance(loss, Segmented) else _alone(loss)
        mesh, sliced = partition.mesh, partition.sliced

        def compiled(function: Callable[..., Any], *out_shardings: Any) -> Callable[..., Any]:
            if mesh is None:
                return jax.jit(function)
            run = jax.jit(function, out_shardings=out_shardings or None)

            def over_mesh(*args: Any) -> Any:
                with jax.set_mesh(mesh):  # the network lays its activations out over the mesh in force
                    return run(*args)

            return over_mesh

        self._forward = [compiled(fn) for fn in pieces]
        self._pullbacks = [
            compiled(_pullback(fn, spec, partition, first=i == 0), sliced, None)
            for i, (fn, spec) in enumerate(zip(pieces, specs))
        ]
        self._head = compiled(_head_gradients(head, specs[-1], partition), partition.replicated, sliced, None)

    def __call__(self, params: Sequence[PyTree], batch: PyTree, scale: Any) -> tuple[Array, Gradients]:
        """The loss, and an iterator over (segment, gradient buckets of `scale` times the loss), last segment first."""
        inputs = [batch]
        for fn, weights in zip(self._forward, params):
            inputs.append(fn(weights, inputs[-1]))
        loss, buckets, cotangent = self._head(params[-1], inputs[-1] if self._forward else None, batch, scale)

        def gradients() -> Gradients:
            nonlocal cotangent
            yield len(self._pullbacks), buckets
            for i in reversed(range(len(self._pullbacks))):
                grads, cotangent = self._pullbacks[i](params[i], inputs[i], cotangent)
                inputs.pop()  # nothing needs the output of this segment any more
                yield i, grads

        return loss, gradients()


# Equal pieces, and engines of one network, share what is compiled: jit knows a function again.
_shared = functools.lru_cache(maxsize=256)


@_shared
def _alone(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, _, batch: loss(params, batch)


@_shared
def _head_gradients(head: Callable[..., Any], spec: BucketSpec, partition: Partition) -> Callable[..., Any]:
    def run(params: PyTree, x: Any, batch: PyTree, scale: Any) -> tuple[Array, tuple[Array, ...], Any]:
        join, trained = _split(params, spec)

        def scaled(trained: list[Array], x: Any) -> tuple[Array, Array]:
            loss = head(join(trained), x, batch)
            return loss.astype(jnp.float32) * scale, loss

        (_, loss), (grads, cotangent) = jax.value_and_grad(scaled, (0, 1), has_aux=True)(trained, x)
        return loss, cut(join(grads), spec, partition), cotangent

    return run


@_shared
def _pullback(fn: Callable[..., Any], spec: BucketSpec, partition: Partition, *, first: bool) -> Callable[..., Any]:
    def run(params: PyTree, x: Any, cotangent: Any) -> tuple[tuple[Array, ...], Any]:
        join, trained = _split(params, spec)
        if first:  # nobody wants the gradient of the batch
            (grads,) = jax.vjp(lambda trained: fn(join(trained), x), trained)[1](cotangent)
            return cut(join(grads), spec, partition), None
        grads, before = jax.vjp(lambda trained, x: fn(join(trained), x), trained, x)[1](cotangent)
        return cut(join(grads), spec, partition), before

    return run


def _split(params: PyTree, spec: BucketSpec) -> tuple[Callable[[Sequence[Array]], PyTree], list[Array]]:
    """The trained leaves, and a function that puts such leaves in their places among the frozen ones."""
    leaves = jax.tree.leaves(params)

    def join(trained: Sequence[Array]) -> PyTree:
        every = list(leaves)
        for i, leaf in zip(spec.order, trained):
            every[i] = leaf
        return jax.tree.unflatten(spec.treedef, every)

    return join, [leaves[i] for i in spec.order]
