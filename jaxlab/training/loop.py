"""The loop: steps, log, checkpoints, evaluation, and going on where a killed run stopped."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxlab import core


def fit(
    state: Any,
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    batches: Iterable[Any],
    *,
    steps: int,
    checkpointer: core.Checkpointer | None = None,
    every: int = 100,
    logger: core.MetricsLogger | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
) -> Any:
    """Runs until `state.step` is `steps`; with a checkpointer it resumes by itself from the latest checkpoint.

    Args:
        state: A pytree with `step`, donated to `step`.
        step: (state, batch) -> (state, metrics), metrics a dict of scalars.
        batches: Gives one batch a step. With `state()` and `restore(dict)` its position is saved beside the state;
            without, a resumed run passes over the batches already used.
        steps: Value of `state.step` to stop at.
        checkpointer: Saves every `every` steps and at the end.
        every: Steps between checkpoints, and between evaluations unless `evaluate_every` says otherwise.
        logger: Gets every step's metrics, with `tokens_per_s` where batches have `tokens`.
        evaluate: state -> dict of numbers for the logger; also called at the end.
        evaluate_every: Steps between evaluations; 0 evaluates at the end only.

    Returns:
        The final state.

    Raises:
        ValueError: The batches end before the last step, or `every` < 1.
        CheckpointError: The latest checkpoint does not fit `state`.
    """
    if every < 1:
        raise ValueError(f"every: expected a value >= 1, got {every}")
    evaluate_every = every if evaluate_every is None else evaluate_every
    if checkpointer is not None and checkpointer.latest() is not None:
        state, extra = checkpointer.restore(state)
        if hasattr(batches, "restore"):
            batches.restore(extra["batches"])
        else:
            batches = itertools.islice(batches, int(state.step), None)
    source = iter(batches)
    first = int(state.step)
    clock = time.perf_counter()
    unlogged: tuple[int, dict[str, Any], int] | None = None

    def log() -> None:
        """Waits for the step in flight and logs it: one step late, so that the device always has its next one."""
        nonlocal unlogged, clock
        if unlogged is None:
            return
        index, metrics, tokens = unlogged
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        if tokens:
            values["tokens_per_s"] = tokens / (now - clock)
        clock, unlogged = now, None
        if logger is not None:
            logger.log(index, values)

    for index in core.progress(range(first + 1, steps + 1), "training"):
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError(
                f"batches: expected {steps - first} for steps {first + 1} to {steps}, got {index - first - 1}"
            ) from None
        state, metrics = step(state, batch)
        log()
        unlogged = (index, metrics, batch.tokens.size if hasattr(batch, "tokens") else 0)
        last = index == steps
        saves = last or index % every == 0
        evaluates = last or (evaluate_every and index % evaluate_every == 0)
        if (checkpointer is not None and saves) or (evaluate is not None and evaluates):
            log()
            if evaluate is not None and evaluates:
                values = evaluate(state)
                if logger is not None:
                    logger.log(index, {name: float(value) for name, value in values.items()})
            if checkpointer is not None and saves:
                position = batches.state() if hasattr(batches, "state") else None
                checkpointer.save(index, state, {"batches": position})
            clock = time.perf_counter()
    log()
    return jax.block_until_ready(state)
