"""An engine's state on disk: what one layout of buckets saved, any other restores."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxlab import core
from jaxlab.superoffload.engine import SuperOffload, TrainState
from jaxlab.superoffload.layout import Layout


class EngineCheckpointer(core.Checkpointer):
    """A `core.Checkpointer` of an engine's states, for buckets of another size and another number of ranks too.

    Saved are the buckets as they lie, padding included, and beside them how they were cut; step, count, loss scaler,
    frozen leaves, an Optax transformation's state, and within a window of `steps_per_update` batches what they
    accumulated. Live parameters are made of the master ones, in the dtype of the engine that restores.

        checkpointer = EngineCheckpointer(folder, engine)
        state = fit(engine.init(params), engine.train_step, batches, steps=1000, checkpointer=checkpointer)
    """

    def __init__(self, folder: str | os.PathLike, engine: SuperOffload, keep: int | None = 3):
        """As for `core.Checkpointer`; the engine's `init` must have been called before saving or restoring."""
        super().__init__(folder, keep)
        self._engine = engine

    def save(self, step: int | np.integer, state: TrainState, extra: Any = None) -> None:
        """Saves a state of the engine; arguments and errors as in `core.Checkpointer`."""
        layout = self._engine.layout
        within = bool(int(state.step) % self._engine.config.steps_per_update)
        master = {name: getattr(state.master, name) for name in "pmv"}
        saved = _beside(state, layout) | master | {"accumulated": state.accumulated if within else ()}
        told = {
            "layout": layout.told(),
            "ranks": layout.partition.ranks,
            "steps_per_update": self._engine.config.steps_per_update,
            "within": within,
        }
        super().save(step, saved, {"superoffload": told, "extra": extra})

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """The state of a step, by default the latest, cut as the engine cuts it.

        Args:
          like: a state of the engine, such as `init` gives; it stays as it is.
          step: which.

        Returns:
          The state, and the `extra` it was saved with.

        Raises:
          FileNotFoundError: there is no such step, or none at all.
          CheckpointError: the step is damaged or no engine's, of other parameters or another optimizer, or from within
            a window of another `steps_per_update`.
        """
        step = self.latest() if step is None else step
        extra = self.extra(step)
        where = f"checkpoint {self.folder}, step {step}"
        if not isinstance(extra, dict) or "superoffload" not in extra:
            raise core.CheckpointError(f"{where}: expected one of an EngineCheckpointer, got another")
        engine, told = self._engine, extra["superoffload"]
        layout, saved = engine.layout, told["layout"]
        _check_leaves(saved, layout, where)
        if told["within"] and told["steps_per_update"] != engine.config.steps_per_update:
            raise core.CheckpointError(
                f"{where}: within an update of {told['steps_per_update']} batches, expected steps_per_update to be "
                f"that, got {engine.config.steps_per_update}"
            )
        ranks = told["ranks"]
        flat = [sum(-(-n // ranks) * ranks for n in pieces) for segment in saved for pieces in segment["buckets"]]
        buckets = [jax.ShapeDtypeStruct((n,), jnp.float32, sharding=layout.partition.on_hosts(n)) for n in flat]
        wanted = {name: buckets if getattr(like.master, name) else () for name in "pmv"}
        wanted |= _beside(like, layout) | {"accumulated": buckets if told["within"] else ()}
        found, _ = super().restore(wanted, step)
        cut = layout.partition.on_all_hosts(lambda buckets: layout.cut_again(buckets, saved, ranks))

        def placed(buckets: Sequence[Array], like: Sequence[Array]) -> tuple[Array, ...]:
            made = cut(buckets) if buckets else ()
            return tuple(layout.partition.lay(x, place.sharding) for x, place in zip(made, like))

        p, m, v = (placed(found[name], getattr(like.master, name)) for name in "pmv")
        params = engine.live_params(p, _with_frozen(like.params, found["frozen"], layout))
        master = dataclasses.replace(like.master, p=p, m=m, v=v, count=found["count"])
        total = placed(found["accumulated"], like.accumulated) if told["within"] else like.accumulated
        rest = {name: found[name] for name in ("step", "scaler", "opt_state")}
        return TrainState(params=params, master=master, accumulated=total, **rest), extra["extra"]


def _beside(state: TrainState, layout: Layout) -> dict[str, Any]:
    """What is saved as it is, whatever the buckets."""
    rest = {name: getattr(state, name) for name in ("step", "scaler", "opt_state")}
    return rest | {"count": state.count, "frozen": _frozen(state.params, layout)}


def _frozen(params: PyTree, layout: Layout) -> list[Any]:
    leaves = [jax.tree.leaves(part) for part in layout.parts(params)]
    return [x for spec, part in zip(layout.specs, leaves) for i, x in enumerate(part) if i not in spec.order]


def _with_frozen(params: PyTree, frozen: Sequence[Any], layout: Layout) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    places, first = [], 0
    for spec in layout.specs:
        places += [first + i for i in range(len(spec.paths)) if i not in spec.order]
        first += len(spec.paths)
    for place, leaf in zip(places, frozen):
        leaves[place] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _check_leaves(saved: list[dict[str, Any]], layout: Layout, where: str) -> None:
    wanted = layout.told()
    if len(saved) != len(wanted):
        raise core.CheckpointError(f"{where}: saved in {len(saved)} segments, expected {len(wanted)}")
    for segments in zip(saved, wanted):
        old, new = (dict(segment["leaves"]) for segment in segments)  # in whatever order
        for path in [*new, *old]:
            if old.get(path) != new.get(path):
                got, expected = (
                    "no leaf" if shape is None else f"leaf {path} of shape {shape}"
                    for shape in (old.get(path), new.get(path))
                )
                raise core.CheckpointError(f"{where}: saved was {got}, expected {expected}")
