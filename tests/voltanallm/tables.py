"""Small tables and states that the tests share."""

import dataclasses

from jaxlab.voltanallm import LatencyTable, PowerModel
from jaxlab.voltanallm.predictor import Plane

CLOCKS = (1005, 1095, 1200, 1305, 1410)
ENDS = (64, 128, 192, 256)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The attributes of the engine's metrics."""

    timestamp: float = 0.0
    running: int = 1
    total: int = 1
    tokens: int = 100
    waiting: int = 0
    queue_wait_s: tuple[float, ...] = ()


def decode_planes():
    """A staircase: segments of 64 requests, each a step of 4 ms above the one before at 1410 MHz."""
    return [
        Plane(f, 3e-5, 10 + 4 * step * 1410 / f, 0.05 * 1410 / f, end - 63, end, 0.9)
        for f in CLOCKS
        for step, end in enumerate(ENDS)
    ]


def decode_table():
    return LatencyTable("decode", decode_planes())


def prefill_table(clocks=CLOCKS):
    return LatencyTable("prefill", [Plane(f, 0.06 * 1410 / f, 8.0, r2=0.99) for f in clocks])


def energy_table():
    return PowerModel().energy_table(decode_table())


def as_dict(table):
    """The oracle's form of a table."""
    rows = {}
    for plane in table.planes:
        rows.setdefault(plane.freq, []).append((plane.start, plane.end, plane.batch, plane.tokens, plane.intercept))
    return rows
