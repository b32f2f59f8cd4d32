"""Tasks on lanes: a discrete-event run, and the schedule it gives as numbers, JSON, text and a picture."""

import dataclasses
import heapq
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

_DRAWN = ("forward", "backward", "adam", "send", "return", "undo", "verdict", "cast", "weights")
LANES = ("gpu", "d2h", "h2d", "host", "validator")

Intervals = list[tuple[str, float, float]]


class Task(NamedTuple):
    """Work for one lane.

    Attributes:
        label: "kind number".
        lane: one of `LANES`.
        seconds: it takes.
        after: places in the list of tasks that must have ended.
    """

    label: str
    lane: str
    seconds: float
    after: tuple[int, ...] = ()


def run(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Start and end of every task: a lane works on one at a time, first ready first served, ties in the list's order.

    Raises:
        ValueError: a task after a later one, or negative time.
    """
    followers: list[list[int]] = [[] for _ in tasks]
    for i, task in enumerate(tasks):
        if task.seconds < 0:
            raise ValueError(f"tasks[{i}] {task.label}: expected seconds of at least 0, got {task.seconds}")
        for before in task.after:
            if not 0 <= before < i:
                raise ValueError(f"tasks[{i}] {task.label}: expected to come after earlier tasks, got {before}")
            followers[before].append(i)
    waiting = [len(task.after) for task in tasks]
    spans = [(0.0, 0.0)] * len(tasks)
    ready: dict[str, list[tuple[float, int]]] = {task.lane: [] for task in tasks}
    busy: dict[str, bool] = dict.fromkeys(ready, False)
    for i, task in enumerate(tasks):
        if not waiting[i]:
            ready[task.lane].append((0.0, i))
    events: list[tuple[float, int]] = []  # ends of running tasks

    def start(lane: str, now: float) -> None:
        if ready[lane] and not busy[lane]:
            _, i = heapq.heappop(ready[lane])
            busy[lane] = True
            spans[i] = now, now + tasks[i].seconds
            heapq.heappush(events, (spans[i][1], i))

    for lane in ready:
        start(lane, 0.0)
    while events:
        now = events[0][0]
        touched = []
        while events and events[0][0] == now:
            _, i = heapq.heappop(events)
            busy[tasks[i].lane] = False
            touched.append(tasks[i].lane)
            for j in followers[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready[tasks[j].lane], (now, j))
                    touched.append(tasks[j].lane)
        for lane in dict.fromkeys(touched):
            start(lane, now)
    return spans


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A training step: in the steady state as `simulate` models it, or as `TimedSuperOffload` measured it.

    Attributes:
        step_time: seconds from the start of one forward pass to that of the next.
        tflops: model TFLOP/s; recomputation does not count.
        gpu_idle: share of the step in which the GPU computes nothing.
        lanes: lane -> (label, start, end) in seconds from the start of the forward pass. What belongs to the step may
            end after the next one has begun.
        source: "modelled" or "measured"; pictures say it.
    """

    step_time: float
    tflops: float
    gpu_idle: float
    lanes: dict[str, Intervals]
    source: str = "modelled"

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    def to_ascii(self, width: int = 72) -> str:
        """A chart, one row a lane: the first letter of what kept it busy longest in each column's time, "." if nothing.

        Raises:
            ValueError: a width below 1.
        """
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        until = max([self.step_time, *(end for lane in self.lanes.values() for _, _, end in lane)])
        margin = max(map(len, self.lanes))
        lines = [
            f"step {1e3 * self.step_time:.1f} ms, {self.tflops:.1f} TFLOP/s, GPU idle {self.gpu_idle:.1%} "
            f"({self.source})"
        ]
        for lane, intervals in self.lanes.items():
            columns: list[dict[str, float]] = [{} for _ in range(width)]
            for label, start, end in intervals:
                first, last = (min(width - 1, int(at / until * width)) for at in (start, end))
                for i in range(first, last + 1):
                    inside = min(end, (i + 1) * until / width) - max(start, i * until / width)
                    if inside > 0:
                        columns[i][label[0]] = columns[i].get(label[0], 0.0) + inside
            marks = [max(busy, key=lambda letter, busy=busy: busy[letter]) if busy else "." for busy in columns]
            lines.append(f"{lane:>{margin}} |{''.join(marks)}|")
        kinds = dict.fromkeys(_kind(label) for lane in self.lanes.values() for label, _, _ in lane)
        lines.append(f"{'':>{margin}}  " + ", ".join(f"{kind[0]} {kind}" for kind in kinds))
        return "\n".join(lines)

    def figure(self) -> Any:
        """The chart as a matplotlib figure in the house's style."""
        from jaxlab.core.figures import COLOURS, figure

        colours = dict(zip(_DRAWN, (*COLOURS, "#3aa6b9", "#c25b8f")))
        drawn, axes = figure(height=2.6)
        kinds = list(dict.fromkeys(_kind(label) for lane in self.lanes.values() for label, _, _ in lane))
        rows = list(reversed(self.lanes))
        for kind in kinds:
            for row, lane in enumerate(rows):
                bars = [(1e3 * start, 1e3 * (end - start)) for start, end in _joined(self.lanes[lane], kind)]
                if bars:
                    axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=colours[kind], linewidth=0)
            axes.broken_barh([], (0, 0), facecolors=colours[kind], label=kind)
        axes.axvline(1e3 * self.step_time, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(f"ms ({self.source})")
        told = f"{1e3 * self.step_time:.0f} ms a step" + (f", {self.tflops:.0f} TFLOP/s" if self.tflops >= 1 else "")
        axes.set_title(told, loc="left", fontsize=9)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
        return drawn


def _kind(label: str) -> str:
    return label.split()[0]


def _joined(intervals: Intervals, kind: str) -> list[tuple[float, float]]:
    """The intervals of a kind in order, touching ones as one."""
    joined: list[tuple[float, float]] = []
    for label, start, end in sorted(intervals, key=lambda interval: interval[1]):
        if _kind(label) == kind:
            if joined and start <= joined[-1][1] + 1e-9:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
    return joined
