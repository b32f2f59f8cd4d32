"""The training engine: gradients leave bucket by bucket, the host steps on them, and the norm decides what stands."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, PyTree

from jaxlab.superoffload import host_adam
from jaxlab.superoffload.bucket import BucketSpec, flatten, make_buckets, unflatten
from jaxlab.superoffload.bucket_step import Copies, scalars_of, speculate_bucket, step_bucket, undo_bucket
from jaxlab.superoffload.config import SuperOffloadConfig
from jaxlab.superoffload.host_adam import AdamHyper
from jaxlab.superoffload.loss_scale import LossScaleState, init_loss_scale, update_loss_scale
from jaxlab.superoffload.segmented import Backward, Segmented
from jaxlab.superoffload.stv import SpeculativeState, Verdict, init_state, validate
from jaxlab.superoffload.worker import HostWorker

Metrics = dict[str, Any]


@struct.dataclass
class TrainState:
    """Everything a run needs to go on; a pytree of arrays.

    Attributes:
      step: int32, calls of `train_step` (batches seen, whatever became of them).
      params: live parameters in the compute dtype, on the accelerator.
      master: float32 parameters and moments in buckets, and `count`.
      scaler: of the loss, or None.
      accumulated: gradient buckets of the batches since the last update, or none.
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

    A state passed in is consumed. Metrics: `loss`, `grad_norm` (before clipping), and as 0 or 1 `clipped`, `skipped`
    (the gradients were not finite), `rolled_back`; `loss_scale` of the step, `undo_bytes`, and `host_ms`, the time the
    host worked. Where a batch is only accumulated all but `loss` and `loss_scale` are 0.

    Args:
      loss: (params, batch) -> scalar, or a `Segmented` network, whose first gradients leave before the last are there.
      optimizer: an `AdamHyper`, or an Optax transformation, which is never speculated on.
      config: settings.
      plan: an `OffloadPlan`, for how many buckets stay on the accelerator.
      mesh: not supported yet; None.

    Raises:
      NotImplementedError: undo 'residual' for an Optax transformation; a mesh.
      TypeError: another kind of optimizer.
      RuntimeError: backend 'ffi' without a C++ compiler.
    """

    def __init__(
        self,
        loss: Callable[..., Any] | Segmented,
        optimizer: AdamHyper | optax.GradientTransformation,
        config: SuperOffloadConfig = SuperOffloadConfig(),  # noqa: B008 (frozen)
        *,
        plan: Any = None,
        mesh: Any = None,
    ):
        if mesh is not None:
            raise NotImplementedError("mesh: one device only, got a mesh")
        self._hyper: Any = optimizer if isinstance(optimizer, AdamHyper) else None
        self._tx: Any = optimizer if isinstance(optimizer, optax.GradientTransformation) else None
        if self._tx is not None:
            if config.undo == "residual":
                raise NotImplementedError("undo='residual' inverts Adam(W) (AdamHyper), got an Optax transformation")
        elif self._hyper is None:
            raise TypeError(f"optimizer: expected an AdamHyper or an Optax transformation, got {optimizer!r}")
        self._loss, self._config, self._plan = loss, config, plan
        self._backend = host_adam.resolve(config.backend)
        self._threads = max(1, round((os.cpu_count() or 1) * config.cpu_cores_share))
        self._worker = HostWorker(config.worker_timeout_s)
        self._host, self._device = jax.devices("cpu")[0], jax.devices()[0]
        self._dtype = jnp.dtype(config.compute_dtype)
        self._specs: tuple[BucketSpec, ...] = ()
        self._spare: dict[int, Any] = {}  # what a bucket's last step left: memory for the next
        self._pace = _Pace()

    def __enter__(self) -> "SuperOffload":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker; further steps are a RuntimeError."""
        self._worker.close()

    def init(self, params: PyTree) -> TrainState:
        """The state before the first step. Leaves that are not floating are frozen.

        Raises:
          ValueError: parameters of a `Segmented` network that are no tuple with one entry a piece and one for the head.
          TypeError: leaves that are not floating, for an Optax transformation.
        """
        parts = self._parts(params)
        settings = {"bucket_bytes": self._config.bucket_bytes, "split": self._config.split}
        self._specs = tuple(make_buckets(part, trainable=_floating(part), **settings) for part in parts)
        self._backward = Backward(self._loss, self._specs)
        self._places = [(s, b) for s, spec in enumerate(self._specs) for b in range(spec.n_buckets)]
        self._resident = self._on_accelerator(len(self._places))
        states = [init_state(part, spec) for part, spec in zip(parts, self._specs)]
        p, m, v = (sum((getattr(state, name) for state in states), ()) for name in "pmv")
        opt_state = None
        if self._tx is not None:
            if any(len(spec.order) < len(spec.paths) for spec in self._specs):
                raise TypeError("params: an Optax transformation takes floating leaves only")
            m, v, opt_state = (), (), self._tx.init(self._trees(p))
            self._optax_step = jax.jit(self._optax, donate_argnums=(0, 1))
        keep = lambda b, x: x if b < self._resident else jax.device_put(x, self._host)  # noqa: E731
        p, m, v = (tuple(keep(b, x) for b, x in enumerate(buckets)) for buckets in (p, m, v))
        scaler = None if self._config.loss_scale is None else init_loss_scale(self._config.loss_scale)
        self._rebuild = jax.jit(self._live_params)
        live = self._rebuild(tuple(x.astype(self._dtype) for x in jax.device_put(p, self._device)), params)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, live, SpeculativeState(p, m, v, jnp.copy(zero)), scaler, (), opt_state)

    def train_step(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Forward, backward and, every `steps_per_update` batches, an update.

        Raises:
          FloatingPointError: gradients that are not finite, with nonfinite='raise' and no scaler.
          RuntimeError: the worker died or timed out, or the engine is closed; a loss scale that cannot fall.
        """
        self._check_ready()
        loss, gradients = self._backward(self._parts(state.params), batch, state.loss_scale)
        every, step = self._config.steps_per_update, int(state.step) + 1
        state = replace(state, step=state.step + 1)
        if every > 1:
            found = self._gathered(gradients)
            total = _add(state.accumulated, found) if state.accumulated else found
            if step % every:
                metrics = _metrics(loss_scale=state.loss_scale)
                return replace(state, accumulated=total), metrics | {"loss": loss}
            state, gradients = replace(state, accumulated=()), self._by_segment(total)
        state, metrics = self._update(state, gradients, np.float32(1 / (float(state.loss_scale) * every)))
        return state, metrics | {"loss": loss}

    def apply_gradients(self, state: TrainState, grads: PyTree) -> tuple[TrainState, Metrics]:
        """An update by gradients that were computed elsewhere.

        Args:
          state: consumed.
          grads: a tree like the parameters, multiplied by `state.loss_scale`; frozen leaves are ignored.

        Raises:
          ValueError: another structure or shape, named by the leaf's path.
          FloatingPointError: as for `train_step`, like RuntimeError.
        """
        self._check_ready()
        parts = self._parts(grads)
        buckets = [flatten(part, spec) for part, spec in zip(parts, self._specs)]
        gradients = reversed(list(enumerate(buckets)))
        state, metrics = self._update(state, gradients, np.float32(1 / float(state.loss_scale)))
        return replace(state, step=state.step + 1), metrics | {"loss": jnp.float32(jnp.nan)}

    def master(self, state: TrainState) -> PyTree:
        """The float32 parameters, as a tree; frozen leaves as they are."""
        return self._trees(state.master.p, state.params)

    def moments(self, state: TrainState) -> tuple[PyTree, PyTree]:
        """First and second moments, as trees like the parameters; frozen leaves are those themselves.

        Raises:
          TypeError: the optimizer is an Optax transformation, whose state is `state.opt_state`.
        """
        if state.opt_state is not None:
            raise TypeError("moments: those of an Optax transformation are in state.opt_state")
        return self._trees(state.master.m, state.params), self._trees(state.master.v, state.params)

    def _update(
        self, state: TrainState, gradients: Iterable[tuple[int, tuple[Array, ...]]], scale: Any
    ) -> tuple[TrainState, Metrics]:
        busy = self._worker.busy_s
        speculates = self._speculates()
        grads: list[Any] = [None] * len(self._places)
        jobs: dict[int, Future] = {}
        started = None
        scalars = scalars_of(state.count, self._hyper, scale) if speculates else None
        for segment, buckets in gradients:
            first = self._places.index((segment, 0)) if buckets else 0
            for b in reversed(range(first, first + len(buckets))):
                grads[b] = buckets[b - first]
                if speculates and b >= self._resident:
                    started = started or time.perf_counter()
                    jobs[b] = self._worker.submit(self._speculate, state.master, b, grads[b], scale, scalars)
        verdict = jax.block_until_ready(self._validate(grads, scale))
        waited_s = 0.0 if started is None else time.perf_counter() - started
        ahead = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
        adam_s = self._worker.busy_s - busy
        finite, clipped = bool(verdict.finite), bool(verdict.coef < 1)
        rolled_back = bool(ahead) and clipped
        undo_bytes = sum(leaf.nbytes for _, _, log in ahead.values() for leaf in jax.tree.leaves(log))
        if rolled_back:
            jobs = {
                b: self._worker.submit(self._undo, new, grads[b], state.count, scalars, log)
                for b, (new, _, log) in ahead.items()
            }
            old = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
            state = replace(state, master=_put(state.master, old))
        for b, (_, cast, log) in ahead.items():
            # Copies that were rolled back to are the state again.
            reusable = isinstance(log, Copies) == (self._config.undo == "copy") and not (
                rolled_back and isinstance(log, Copies)
            )
            self._spare[b] = (log if reusable else None, cast)
        if finite:
            state = self._apply(state, {} if rolled_back else ahead, grads, scale, verdict.coef)
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
        if state.scaler is not None and self._config.loss_scale is not None:
            state = replace(state, scaler=update_loss_scale(state.scaler, not finite, self._config.loss_scale))
        elif not finite and self._config.nonfinite == "raise":
            raise FloatingPointError(f"the gradients of update {int(state.count) + 1} are not finite")
        return state, metrics

    def _validate(self, grads: Sequence[Array], scale: Any) -> Verdict:
        return validate(grads, scale=scale, clip_norm=self._config.clip_norm, clip_eps=self._config.clip_eps)

    def _apply(
        self, state: TrainState, ahead: dict[int, Any], grads: Sequence[Array], scale: Any, coef: Any
    ) -> TrainState:
        """Makes the update count: takes what was speculated, and steps on the other buckets."""
        if self._tx is not None:
            job = self._worker.submit(self._optax_step, state.master.p, state.opt_state, tuple(grads), scale * coef)
            p, opt_state, casts = self._worker.result(job, "the Optax update")
            state = replace(state, master=replace(state.master, p=p), opt_state=opt_state)
        else:
            jobs = {
                b: self._worker.submit(self._step, state.master, b, grads[b], scale, coef)
                for b in range(len(grads))
                if b not in ahead
            }
            made = {b: self._worker.result(job, f"bucket {b}") for b, job in jobs.items()}
            self._spare |= {b: (None, cast) for b, (_, cast) in made.items()}
            new = {b: step[0] for b, step in (ahead | made).items()}
            casts = tuple((ahead | made)[b][1] for b in range(len(grads)))
            state = replace(state, master=_put(state.master, new))
        params = self._rebuild(jax.device_put(casts, self._device), state.params)
        # The next step may take the memory of the copies.
        jax.block_until_ready(params)
        return replace(state, params=params, master=replace(state.master, count=state.count + 1))

    def _speculate(self, master: SpeculativeState, b: int, g: Array, scale: Any, scalars: Array) -> Any:
        old, g = (master.p[b], master.m[b], master.v[b]), jax.device_put(g, self._host)
        spare = self._spare.pop(b, (None, None))
        settings = {"kind": self._config.undo, "backend": self._backend, "threads": self._threads}
        return speculate_bucket(
            old,
            g,
            master.count,
            self._hyper,
            scale,
            scalars,
            donate=True,
            emit_dtype=self._dtype,
            reuse=spare,
            **settings,
        )

    def _undo(self, new: Any, g: Array, count: Array, scalars: Array, log: Any) -> Any:
        settings = {"mode": self._hyper.mode, "backend": self._backend, "threads": self._threads}
        return undo_bucket(new, jax.device_put(g, self._host), count, scalars, log, donate=True, **settings)

    def _step(self, master: SpeculativeState, b: int, g: Array, scale: Any, coef: Any) -> Any:
        old = (master.p[b], master.m[b], master.v[b])
        g = jax.device_put(g, self._device if b < self._resident else self._host)
        _, cast = self._spare.pop(b, (None, None))
        settings = {"backend": self._backend, "emit_dtype": self._dtype, "threads": self._threads}
        return step_bucket(old, g, master.count, self._hyper, scale, coef, donate=True, reuse=cast, **settings)

    def _optax(self, p: Sequence[Array], opt_state: PyTree, grads: Sequence[Array], factor: Array) -> Any:
        tree = self._trees(p)
        scaled = self._trees([g * factor for g in grads])
        updates, opt_state = self._tx.update(scaled, opt_state, tree)
        new = self._buckets(optax.apply_updates(tree, updates))
        return new, opt_state, tuple(x.astype(self._dtype) for x in new)

    def _parts(self, params: PyTree) -> tuple[PyTree, ...]:
        if not isinstance(self._loss, Segmented):
            return (params,)
        wanted = len(self._loss.fns) + 1
        if not isinstance(params, tuple) or len(params) != wanted:
            got = f"a tuple of {len(params)}" if isinstance(params, tuple) else type(params).__name__
            raise ValueError(f"params: expected a tuple of {wanted}, one a piece and one for the head, got {got}")
        return params

    def _trees(self, buckets: Sequence[Array], like: PyTree | None = None, dtype: Any = jnp.float32) -> PyTree:
        """The tree that all buckets hold, in one dtype; frozen leaves come from `like`."""
        likes = [None] * len(self._specs) if like is None else self._parts(like)
        trees, first = [], 0
        for spec, part in zip(self._specs, likes):
            dtypes = tuple(jnp.dtype(dtype) if i in spec.order else found for i, found in enumerate(spec.dtypes))
            chosen = buckets[first : first + spec.n_buckets]
            trees.append(unflatten(chosen, replace(spec, dtypes=dtypes), part))
            first += spec.n_buckets
        return tuple(trees) if isinstance(self._loss, Segmented) else trees[0]

    def _live_params(self, casts: Sequence[Array], like: PyTree) -> PyTree:
        return self._trees(casts, like, self._dtype)

    def _buckets(self, tree: PyTree) -> tuple[Array, ...]:
        return sum((flatten(part, spec) for part, spec in zip(self._parts(tree), self._specs)), ())

    def _gathered(self, gradients: Iterable[tuple[int, tuple[Array, ...]]]) -> tuple[Array, ...]:
        return sum((buckets for _, buckets in sorted(gradients, key=lambda pair: pair[0])), ())

    def _by_segment(self, buckets: Sequence[Array]) -> Iterable[tuple[int, tuple[Array, ...]]]:
        found: list[list[Array]] = [[] for _ in self._specs]
        for (segment, _), bucket in zip(self._places, buckets):
            found[segment].append(bucket)
        return [(segment, tuple(found[segment])) for segment in reversed(range(len(found)))]

    def _speculates(self) -> bool:
        if self._config.undo == "off" or self._tx is not None:
            return False
        return {"always": True, "never": False, "auto": self._pace.pays()}[self._config.speculation]

    def _on_accelerator(self, buckets: int) -> int:
        """How many buckets, the first in forward order, keep their state on the accelerator."""
        if self._tx is not None:
            return 0
        if self._config.offload_ratio is not None:
            return math.floor((1 - self._config.offload_ratio) * buckets)
        return 0 if self._plan is None else min(buckets, self._plan.gpu_buckets)

    def _check_ready(self) -> None:
        if not self._specs:
            raise RuntimeError("the engine has no parameters yet: call init first")
        self._worker.check()


class _Pace:
    """Whether speculation has paid: what rolled-back steps cost against what the others hid."""

    def __init__(self):
        self._often, self._adam_s, self._hidden_s = 0.0, 0.0, math.inf

    def learn(self, undone: bool, adam_s: float, waited_s: float) -> None:
        """One update: whether a speculation was, or would have been, undone; seconds of Adam, and until the verdict."""
        self._often += 0.1 * (undone - self._often)
        if waited_s:
            self._adam_s, self._hidden_s = adam_s, min(adam_s, waited_s)

    def pays(self) -> bool:
        """An undone step costs its undoing, about as long as itself, and another step."""
        return self._often * 2 * self._adam_s < self._hidden_s


def _floating(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: bool(jnp.issubdtype(jnp.result_type(x), jnp.floating)), tree)


def _put(master: SpeculativeState, new: dict[int, Any]) -> SpeculativeState:
    """The buckets of `new` in their places."""
    p, m, v = (
        tuple(new[b][i] if b in new else x for b, x in enumerate(old))
        for i, old in enumerate((master.p, master.m, master.v))
    )
    return replace(master, p=p, m=m, v=v)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.tree.map(jnp.add, total, new)


def _metrics(**known: Any) -> Metrics:
    names = ("grad_norm", "clipped", "skipped", "rolled_back", "loss_scale", "undo_bytes", "host_ms")
    return dict.fromkeys(names, 0) | known
