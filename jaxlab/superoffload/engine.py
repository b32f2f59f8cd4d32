"""The training engine: gradients leave bucket by bucket, the host steps on them, and the norm decides what stands."""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxlab.superoffload import host_adam
from jaxlab.superoffload.bucket_step import Copies, scalars_of, speculate_bucket, step_bucket, undo_bucket
from jaxlab.superoffload.config import SuperOffloadConfig
from jaxlab.superoffload.host_adam import AdamHyper
from jaxlab.superoffload.host_kernel import Moments
from jaxlab.superoffload.layout import Gradients, Layout
from jaxlab.superoffload.loss_scale import LossScaleState, init_loss_scale, update_loss_scale
from jaxlab.superoffload.pace import Pace
from jaxlab.superoffload.partition import Partition
from jaxlab.superoffload.segmented import Backward, Segmented
from jaxlab.superoffload.stv import SpeculativeState, validate
from jaxlab.superoffload.worker import HostWorker

Metrics = dict[str, Any]


@struct.dataclass
class TrainState:
    """Everything a run needs to go on; a pytree of arrays.

    Attributes:
      step: int32, calls of `train_step` (batches seen, whatever became of them).
      params: live parameters in the compute dtype, on the accelerator.
      master: float32 parameters and moments in buckets, and `count`; over a mesh, those of this process's ranks.
      scaler: of the loss, or None.
      accumulated: with `steps_per_update` > 1, gradient buckets of the batches since the last update (after it, stale).
      opt_state: of an Optax transformation, or None.
    """

    step: Any
    params: Any
    master: SpeculativeState
    scaler: LossScaleState | None
    accumulated: tuple[Any, ...]
    opt_state: Any

    @property
    def count(self) -> Any:
        """int32, updates that were made."""
        return self.master.count

    @property
    def loss_scale(self) -> Any:
        """f32, multiplies the loss; 1 without a scaler."""
        return jnp.ones((), jnp.float32) if self.scaler is None else self.scaler.scale


class SuperOffload:
    """Trains with Adam on the host: `init`, then `train_step(state, batch) -> (state, metrics)`.

    Whether, and how, a step is speculated on changes nothing in any bit of the results.

        with SuperOffload(loss_fn, AdamHyper(1e-3), SuperOffloadConfig(bucket_bytes=1 << 20)) as engine:
            state = engine.init(params)
            state, metrics = engine.train_step(state, batch)

    A state passed in is consumed. Should the host fail, undo='copy' leaves its parameters and moments as they were (but
    for the buckets that stay on the accelerator), for an engine made anew; otherwise only a checkpoint has them.

    Metrics: `loss`, `grad_norm` (before clipping), and as 0 or 1 `clipped`, `skipped` (the gradients were not finite),
    `rolled_back`; `loss_scale` of the step, `undo_bytes` and `host_ms`, the time the host worked, both of this process.
    Where a batch is only accumulated all but `loss` and `loss_scale` are 0.

    Over a mesh (ZeRO) every rank owns its slice of every bucket. The loss is computed over the whole batch, laid out
    over `data` and `fsdp`, and `sequence` for axis 1; gradients are summed into slices, the host steps on those of
    its ranks, and the cast parameters are gathered on every rank. Every process makes the same calls, with the same
    parameters and batches, or such as lie on the mesh.

    Args:
      loss: (params, batch) -> scalar, or a `Segmented` network, whose first gradients leave before the last are there.
      optimizer: an `AdamHyper`, or an Optax transformation, which is never speculated on.
      config: settings.
      plan: an `OffloadPlan`, for how many buckets stay on the accelerator.
      mesh: with axes `data`, `fsdp`, `sequence`, whose product is the number of ranks; None for one device.
      decay_mask: a tree of bools, a prefix of one, or a function params -> tree, True where weights decay, as for
        `optax.adamw`; leaves that do not decay lie in buckets of their own. None: all decay.

    Raises:
      NotImplementedError: undo 'residual' for an Optax transformation; one over several processes.
      TypeError: another kind of optimizer.
      ValueError: a mesh of other axes, or that mixes the devices of processes; a decay mask for an Optax
        transformation, which has its own.
      RuntimeError: backend 'ffi' without a C++ compiler.
    """

    def __init__(
        self,
        loss: Callable[..., Any] | Segmented,
        optimizer: AdamHyper | optax.GradientTransformation,
        config: SuperOffloadConfig = SuperOffloadConfig(),  # noqa: B008 (frozen)
        *,
        plan: Any = None,
        mesh: Mesh | None = None,
        decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    ):
        self._tx: Any = optimizer if isinstance(optimizer, optax.GradientTransformation) else None
        self._partition = Partition(mesh)
        if self._tx is not None:
            if decay_mask is not None:
                raise ValueError("decay_mask: expected None for an Optax transformation, which has its own mask")
            if config.undo == "residual":
                raise NotImplementedError("undo='residual' inverts Adam(W) (AdamHyper), got an Optax transformation")
            if self._partition.processes > 1:
                raise NotImplementedError("optimizer: over several processes an AdamHyper, got an Optax transformation")
        elif not isinstance(optimizer, AdamHyper):
            raise TypeError(f"optimizer: expected an AdamHyper or an Optax transformation, got {optimizer!r}")
        else:  # by whether a bucket decays
            self._hypers = {True: optimizer, False: replace(optimizer, weight_decay=0.0)}
        self._loss, self.config, self._plan, self._decay_mask = loss, config, plan, decay_mask
        self._backend = host_adam.resolve(config.backend)
        self._threads = max(1, round((os.cpu_count() or 1) * config.cpu_cores_share))
        self._worker = HostWorker(config.worker_timeout_s)
        self._dtype = jnp.dtype(config.compute_dtype)
        self._layout: Any = None
        self._keeps = config.undo == "copy" and config.speculation != "never"  # the old arrays, until the next step
        self._spare: dict[int, Any] = {}  # what a bucket's last step left: memory for the next
        self._pace = Pace()

    def __enter__(self) -> "SuperOffload":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker; further steps are a RuntimeError."""
        self._worker.close()

    @property
    def layout(self) -> Layout:
        """How the parameters lie in buckets.

        Raises:
          RuntimeError: before `init`.
        """
        if self._layout is None:
            raise RuntimeError("the engine has no parameters yet: call init first")
        return self._layout

    def init(self, params: PyTree) -> TrainState:
        """The state before the first step. Leaves that are not floating are frozen.

        An Optax transformation sees `optax.MaskedNode` in their places, as within `optax.masked`.

        Raises:
          ValueError: parameters of a `Segmented` network that are no tuple with one entry a piece and one for the head;
            a decay mask of another structure.
        """
        config, partition, mask = self.config, self._partition, self._decay_mask
        pieces = len(self._loss.fns) + 1 if isinstance(self._loss, Segmented) else None
        mask = mask(params) if callable(mask) else mask
        self._layout = layout = Layout.of(
            params, pieces, partition, mask, bucket_bytes=config.bucket_bytes, split=config.split
        )
        self._resident = self._on_accelerator(len(layout.places))
        self._compile(layout)
        params = partition.replicate(params)
        p = tuple(
            x if b < self._resident else partition.shared(partition.local(x)) for b, x in enumerate(self._cut(params))
        )
        opt_state, moments = None, p
        if self._tx is not None:
            moments, opt_state = (), self._tx.init(layout.trained().join(p))
        window = p if config.steps_per_update > 1 else ()
        total = tuple(jnp.zeros(x.shape, jnp.float32, device=partition.sliced) for x in window)
        scaler = None if config.loss_scale is None else init_loss_scale(config.loss_scale)
        zero = jnp.zeros((), jnp.int32)
        master = SpeculativeState(p, _zeros(moments), _zeros(moments), jnp.copy(zero))
        return TrainState(zero, self.live_params(p, params), master, scaler, total, opt_state)

    def live_params(self, p: Sequence[Array], like: PyTree) -> PyTree:
        """The parameters on the accelerator that master buckets stand for; frozen leaves come from `like`."""
        local, on_device = self._partition.local, self._partition.on_device
        casts = [
            x.astype(self._dtype) if b < self._resident else on_device(local(x).astype(self._dtype))
            for b, x in enumerate(p)
        ]
        return self._rebuild(casts, like)

    def train_step(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Forward, backward and, every `steps_per_update` batches, an update.

        Raises:
          FloatingPointError: gradients that are not finite, with nonfinite='raise' and no scaler.
          RuntimeError: the worker died or timed out, or the engine is closed; a loss scale that cannot fall.
        """
        layout = self._ready_layout()
        batch = self._partition.place_batch(batch)
        loss, gradients = self._backward(layout.parts(state.params), batch, np.asarray(state.loss_scale))
        every, step = self.config.steps_per_update, int(state.step) + 1
        state = replace(state, step=state.step + 1)
        if every > 1:
            total = sum((buckets for _, buckets in sorted(gradients, key=lambda pair: pair[0])), ())
            if step % every != 1:
                total = _add(state.accumulated, total)
            state, gradients = replace(state, accumulated=total), layout.by_segment(total)
            if step % every:
                return state, _metrics(loss_scale=state.loss_scale) | {"loss": loss}
        state, metrics = self._update(state, gradients, np.float32(1 / (float(state.loss_scale) * every)))
        return state, metrics | {"loss": loss}

    def apply_gradients(self, state: TrainState, grads: PyTree) -> tuple[TrainState, Metrics]:
        """An update by gradients that were computed elsewhere; the metrics' loss is NaN, as nobody knows it here.

        Args:
          state: consumed.
          grads: a tree like the parameters, multiplied by `state.loss_scale`; frozen leaves are ignored.

        Raises:
          ValueError: another structure or shape, named by the leaf's path.
          FloatingPointError: as for `train_step`, like RuntimeError.
        """
        gradients = self._ready_layout().by_segment(self._cut(self._partition.replicate(grads)))
        state, metrics = self._update(state, gradients, np.float32(1 / float(state.loss_scale)))
        return replace(state, step=state.step + 1), metrics | {"loss": jnp.float32(jnp.nan)}

    def master(self, state: TrainState) -> PyTree:
        """The float32 parameters, as a tree on the host; frozen leaves as they are. Collective."""
        return self._tree(state.master.p, state.params)

    def moments(self, state: TrainState) -> tuple[PyTree, PyTree]:
        """First and second moments, as trees like the parameters; frozen leaves are those themselves. Collective.

        Raises:
          TypeError: the optimizer is an Optax transformation, whose state is `state.opt_state`.
        """
        if state.opt_state is not None:
            raise TypeError("moments: those of an Optax transformation are in state.opt_state")
        return self._tree(state.master.m, state.params), self._tree(state.master.v, state.params)

    def _compile(self, layout: Layout) -> None:
        partition = self._partition
        self._places, self._decays = layout.places, layout.decays
        self._backward = Backward(self._loss, layout.specs, partition)
        # Copies, as a leaf that is a whole bucket would else be the bucket itself, which a later step overwrites.
        self._cut = jax.jit(lambda tree: tuple(map(jnp.copy, layout.cut(tree))), out_shardings=partition.sliced)

        def rebuild(casts: Sequence[Array], like: PyTree) -> PyTree:
            if partition.replicated is not None:  # gather buckets, not leaves
                casts = jax.lax.with_sharding_constraint(casts, partition.replicated)
            return jax.tree.map(jnp.copy, layout.join(casts, like, self._dtype))

        self._rebuild = jax.jit(rebuild, out_shardings=partition.replicated)
        clipping = {"clip_norm": self.config.clip_norm, "clip_eps": self.config.clip_eps}
        self._validate = partition.reduced(
            lambda g, scale, axis_name: validate(g, scale=scale, axis_name=axis_name, **clipping)
        )

        def resident(old: Moments, g: Array, everywhere: Any) -> Any:
            return step_bucket(old, g, *everywhere, backend=self._backend, emit_dtype=self._dtype)

        self._resident_step = partition.over_ranks(resident, 2)
        if self._tx is not None:
            self._optax_step = jax.jit(functools.partial(self._optax, layout.trained()), donate_argnums=(0, 1))

    def _update(self, state: TrainState, gradients: Gradients, scale: Any) -> tuple[TrainState, Metrics]:
        busy = self._worker.busy_s
        speculates = self._speculates()
        grads: list[Any] = [None] * len(self._places)
        jobs: dict[int, Future] = {}
        started = None
        scalars = {
            decays: scalars_of(state.count, self._hypers[decays], scale) for decays in set(self._decays) if speculates
        }
        for segment, buckets in gradients:
            first = self._places.index((segment, 0)) if buckets else 0
            for b in reversed(range(first, first + len(buckets))):
                grads[b] = buckets[b - first]
                if speculates and b >= self._resident:
                    started = started or time.perf_counter()
                    made = scalars[self._decays[b]]
                    jobs[b] = self._worker.submit(self._speculate, state.master, b, grads[b], scale, made)
        verdict = jax.block_until_ready(self._validate(grads, scale))
        waited_s = 0.0 if started is None else time.perf_counter() - started
        ahead = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
        adam_s = self._worker.busy_s - busy
        finite, clipped = bool(verdict.finite), bool(verdict.coef < 1)
        rolled_back = bool(ahead) and clipped
        undo_bytes = sum(leaf.nbytes for _, _, log in ahead.values() for leaf in jax.tree.leaves(log))
        if rolled_back:
            jobs = {
                b: self._worker.submit(self._undo, new, grads[b], state.count, scalars[self._decays[b]], log)
                for b, (new, _, log) in ahead.items()
            }
            old = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
            state = replace(state, master=self._put(state.master, old))
        for b, (new, cast, log) in ahead.items():
            # Copies that were rolled back to are the state again; the arrays that they undo are free instead.
            log = Copies(*new) if rolled_back and isinstance(log, Copies) else log
            self._spare[b] = (log if isinstance(log, Copies) == self._keeps else None, cast)
        if finite:
            state = self._apply(state, {} if rolled_back else ahead, grads, scale, np.float32(verdict.coef))
        self._pace.learn(clipped, adam_s, waited_s)
        metrics = _metrics(
            grad_norm=verdict.norm,
            clipped=finite and clipped,
            skipped=not finite,
            rolled_back=rolled_back,
            loss_scale=state.loss_scale,
            undo_bytes=undo_bytes,
            host_ms=1e3 * (self._worker.busy_s - busy),
        )
        if state.scaler is not None and self.config.loss_scale is not None:
            state = replace(state, scaler=update_loss_scale(state.scaler, not finite, self.config.loss_scale))
        elif not finite and self.config.nonfinite == "raise":
            raise FloatingPointError(f"the gradients of update {int(state.count) + 1} are not finite")
        return state, metrics

    def _apply(
        self, state: TrainState, ahead: dict[int, Any], grads: Sequence[Array], scale: Any, coef: Any
    ) -> TrainState:
        """Makes the update count: takes what was speculated, and steps on the other buckets."""
        if self._tx is not None:
            local = tuple(map(self._partition.local, grads))
            job = self._worker.submit(self._optax_step, state.master.p, state.opt_state, local, scale * coef)
            p, opt_state, casts = self._worker.result(job, "the Optax update")
            state = replace(state, master=replace(state.master, p=p), opt_state=opt_state)
        else:
            # As gradients arrive: the last first. Those of the accelerator, whose step is in place, last: if the host
            # fails they are as they were.
            todo = reversed(range(len(grads)))
            jobs = {
                b: self._worker.submit(self._step, state.master, b, grads[b], scale, coef)
                for b in todo
                if b not in ahead
            }
            made = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
            self._spare |= {b: (self._old(state.master, b) if self._keeps else None, made[b][1]) for b in made}
            done = ahead | made
            casts = [done[b][1] for b in range(len(grads))]
            state = replace(state, master=self._put(state.master, {b: step[0] for b, step in done.items()}))
        casts = [x if b < self._resident else self._partition.on_device(x) for b, x in enumerate(casts)]
        params = self._rebuild(casts, state.params)
        # The next step may take the memory of the copies.
        jax.block_until_ready(params)
        return replace(state, params=params, master=replace(state.master, count=state.count + 1))

    def _speculate(self, master: SpeculativeState, b: int, g: Array, scale: Any, scalars: Array) -> Any:
        settings = {"kind": self.config.undo, "backend": self._backend, "threads": self._threads}
        return speculate_bucket(
            self._old(master, b),
            self._partition.local(g),
            master.count,
            self._hypers[self._decays[b]],
            scale,
            scalars,
            donate=True,
            emit_dtype=self._dtype,
            reuse=self._spare.pop(b, (None, None)),
            **settings,
        )

    def _undo(self, new: Any, g: Array, count: Array, scalars: Array, log: Any) -> Any:
        settings = {"mode": self._hypers[True].mode, "backend": self._backend, "threads": self._threads}
        return undo_bucket(new, self._partition.local(g), count, scalars, log, donate=True, **settings)

    def _step(self, master: SpeculativeState, b: int, g: Array, scale: Any, coef: Any) -> Any:
        hyper = self._hypers[self._decays[b]]
        if b < self._resident:
            return self._resident_step(self._old(master, b), g, (master.count, hyper, scale, coef))
        log, cast = self._spare.pop(b, (None, None))
        return step_bucket(
            self._old(master, b),
            self._partition.local(g),
            master.count,
            hyper,
            scale,
            coef,
            backend=self._backend,
            donate=not self._keeps,
            keep=self._keeps,
            emit_dtype=self._dtype,
            reuse=(log if isinstance(log, Copies) else None, cast),
            threads=self._threads,
        )

    def _old(self, master: SpeculativeState, b: int) -> Copies:
        """A bucket's p, m and v as a step takes them: on the accelerator, or this process's on the host."""
        old = Copies(master.p[b], master.m[b], master.v[b])
        return old if b < self._resident else Copies(*map(self._partition.local, old))

    def _put(self, master: SpeculativeState, new: dict[int, Any]) -> SpeculativeState:
        """The buckets of `new` in their places."""
        p, m, v = list(master.p), list(master.m), list(master.v)
        for b, arrays in new.items():
            p[b], m[b], v[b] = arrays if b < self._resident else map(self._partition.shared, arrays)
        return replace(master, p=tuple(p), m=tuple(m), v=tuple(v))

    def _optax(
        self, layout: Layout, p: Sequence[Array], opt_state: PyTree, grads: Sequence[Array], factor: Array
    ) -> Any:
        tree = layout.join(p)
        updates, opt_state = self._tx.update(layout.join([g * factor for g in grads]), opt_state, tree)
        new = layout.cut(optax.apply_updates(tree, updates))
        return new, opt_state, tuple(x.astype(self._dtype) for x in new)

    def _tree(self, buckets: Sequence[Array], like: PyTree) -> PyTree:
        return self._layout.join([self._partition.whole(x) for x in buckets], like)

    def _speculates(self) -> bool:
        if self.config.undo == "off" or self._tx is not None:
            return False
        return {"always": True, "never": False, "auto": self._pace.pays()}[self.config.speculation]

    def _on_accelerator(self, buckets: int) -> int:
        """How many buckets, the first in forward order, keep their state on the accelerator."""
        if self._tx is not None:
            return 0
        if self.config.offload_ratio is not None:
            return math.floor((1 - self.config.offload_ratio) * buckets)
        return 0 if self._plan is None else min(buckets, self._plan.gpu_buckets)

    def _ready_layout(self) -> Layout:
        """The layout, if a step can be taken."""
        layout = self.layout
        self._worker.check()
        return layout


def _zeros(buckets: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(jnp.zeros(x.shape, jnp.float32, device=x.sharding) for x in buckets)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.tree.map(jnp.add, total, new)


def _metrics(**known: Any) -> Metrics:
    names = ("grad_norm", "clipped", "skipped", "rolled_back", "loss_scale", "undo_bytes", "host_ms")
    return dict.fromkeys(names, 0) | known
