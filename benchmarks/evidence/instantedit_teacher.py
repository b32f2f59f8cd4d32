"""The emoji task by the network that the small editor was distilled from; training it takes an hour of one core."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item, instantedit

SYSTEM = "instantedit"
STEPS = (4, 16)


def items() -> Iterator[Item]:
    """A row a number of steps, and what the distilled editor is worth against each."""
    from jaxlab import core
    from jaxlab.instantedit.small_editor import SmallEditorConfig

    settings = {"pairs": instantedit.PAIRS, **core.to_dict(SmallEditorConfig())}
    tables = (("teacher", instantedit.TITLE, _teacher), ("InstantEdit - teacher", instantedit.WORTH, _difference))
    for steps, (name, table, row) in itertools.product(STEPS, tables):
        yield Item(f"{name}, {steps} steps", table, settings, functools.partial(row, steps), seeds=(0,))


def _teacher(steps: int) -> dict[str, Any]:
    from jaxlab.instantedit import study

    return instantedit.row(f"teacher {steps} steps", study.samples(_setting(steps)), _editor(steps))


def _difference(steps: int) -> dict[str, Any]:
    ours = instantedit.editors()["InstantEdit"]
    return instantedit.difference("InstantEdit", ours, f"teacher {steps} steps", _editor(steps))


def _setting(steps: int) -> Any:
    from jaxlab.instantedit import study

    return dataclasses.replace(study.BASE, num_steps=steps)


@functools.cache
def _editor(steps: int) -> Any:
    """InstantEdit with the teacher, and as many windows as steps."""
    from jaxlab.instantedit import study
    from jaxlab.instantedit.small_editor import SmallEditor, SmallEditorConfig

    trained = SmallEditor(SmallEditorConfig(), instantedit.WORK)
    network = trained.teacher_network(steps)
    cases, method = instantedit.cases(), study.instant_edit(_setting(steps))
    return study.Batched(network, trained.tokenizer, cases, method, draws=False)
