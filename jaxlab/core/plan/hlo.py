"""Reads collectives out of compiled HLO: what moves, over which mesh axes, how often."""

import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One kind of communication in a program.

    `bytes` is the size of the full buffer on each device, once: the gathered array of an all-gather, the array before
    a reduce-scatter, the array of any other. Of a ragged-all-to-all it is an upper bound: the smaller one of the rows'
    buffers at both ends. A program that runs it moves `bytes` `count` times; loops whose length XLA knows are
    multiplied in, others count once.
    """

    op: str
    axes: tuple[str, ...]
    bytes: int
    count: int


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: str
    attributes: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-$]+) \(.*\) -> .* \{$")
_ASSIGNED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-$]+) = (.*)$")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-$]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_GROUPS_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS_LIST = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\)[^)]*)?)\))? \{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def collectives(hlo: str, mesh: jax.sharding.Mesh) -> tuple[Collective, ...]:
    """The collectives of one device's program, equal ones counted together, the largest traffic first.

    Args:
      hlo: the text of the compiled module.
      mesh: the mesh it was compiled over; partition i of the program is `mesh.devices.flat[i]`.
    """
    entry, computations = _parse(hlo)
    found: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    for name, times in _executions(entry, computations).items():
        types = {instruction.name: instruction.type for instruction in computations[name]}
        for instruction in computations[name]:
            op = instruction.opcode.removesuffix("-start")
            if op in COLLECTIVES:
                groups = _groups(instruction.attributes, mesh.size)
                found[op, _axes(groups, mesh), _size(op, instruction, types, groups)] += times
    ordered = sorted(found.items(), key=lambda item: (-item[0][2] * item[1], item[0]))
    return tuple(Collective(op, axes, size, count) for (op, axes, size), count in ordered)


def _parse(hlo: str) -> tuple[str, dict[str, list[_Instruction]]]:
    entry, computations, current = "", {}, None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (assigned := _ASSIGNED.match(line)):
            instruction = _instruction(assigned[1], assigned[2])
            if instruction is not None:
                current.append(instruction)
    return entry, computations


def _instruction(name: str, text: str) -> _Instruction | None:
    """Splits `type opcode(operands), attributes`; a tuple type has brackets of its own."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        return None
    close = _closing(text, opcode.end() - 1)
    return _Instruction(name, text[:end], opcode[1], text[opcode.end() : close], text[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def _executions(entry: str, computations: dict[str, list[_Instruction]]) -> dict[str, int]:
    """How often each computation runs in one run of the program; each branch of a conditional counts as taken."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for instruction in computations[name]:
            if instruction.opcode in ("async-update", "async-done"):
                continue
            known = _TRIPS.search(instruction.attributes) if instruction.opcode == "while" else None
            inner = factor * (int(known[1]) if known else 1)
            called = [match[2] for match in _CALLED.finditer(instruction.attributes)]
            for listed in _CALLED_LIST.finditer(instruction.attributes):
                called += [part.strip().lstrip("%") for part in listed[1].split(",")]
            for callee in called:
                if callee in computations:
                    visit(callee, inner)

    visit(entry, 1)
    return times


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of partition numbers that exchange data with each other, from any of the forms XLA prints."""
    if pairs := _PAIRS.search(attributes):
        return _listed(pairs[1])
    if iota := _GROUPS_IOTA.search(attributes):
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1])).tolist()
    if over_mesh := _GROUPS_MESH.search(attributes):
        return _mesh_groups(*over_mesh.groups())
    if (listed := _GROUPS_LIST.search(attributes)) and listed[1]:
        return _listed(listed[1])
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _listed(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return numbers.transpose(_ints(permutation)) if permutation else numbers


def _mesh_groups(sizes: str, order: str | None, grouped: str) -> list[list[int]]:
    """The form `mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a','b':(2)4}`: XLA's own mesh, by names of its axes.

    The optional order says which partition stands where in the mesh. `'b':(2)4` is a part of axis b: of its 8 places,
    seen as 2 x 4 x 1, the 4.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    count = math.prod(axes.values())
    iota = _IOTA.fullmatch(order) if order else None
    numbers = _iota(*iota.groups()) if iota else np.array(_ints(order)) if order else np.arange(count)
    parts = [
        (name, int(before or 1), int(before or 1) * int(size or axes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
    ]
    dims, chosen = [], []
    for axis, size in axes.items():
        cuts = sorted({1, size, *(cut for name, *ends in parts if name == axis for cut in ends)})
        for low, high in itertools.pairwise(cuts):
            if any(name == axis and start <= low and high <= end for name, start, end in parts):
                chosen.append(len(dims))
            dims.append(high // low)
    moved = np.moveaxis(numbers.reshape(dims), chosen, range(-len(chosen), 0))
    return moved.reshape(-1, math.prod(dims[i] for i in chosen)).tolist()


def _axes(groups: list[list[int]], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
        varies |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, moved in zip(mesh.axis_names, varies) if moved)


def _size(op: str, instruction: _Instruction, types: dict[str, str], groups: list[list[int]]) -> int:
    operands = re.findall(r"%([\w.\-$]+)", instruction.operands)
    sizes = [_bytes(types[name]) for name in operands]
    if op == "ragged-all-to-all":
        return min(sizes[:2])  # what is sent, and the buffer it is received into
    return sum(sizes) * (len(groups[0]) if op == "all-gather" else 1)


def _bytes(type_text: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(type_text):
        count = math.prod(int(size.strip("<= ")) for size in dims.split(",") if size)
        total += (_bits(dtype) * count + 7) // 8
    return total


def _bits(dtype: str) -> int:
    """Bits of an element: f32, bf16, f8e4m3fn, s4 and the like tell it themselves."""
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 8 if dtype == "pred" else 0


def triton_kernels(hlo: str) -> set[str]:
    """The names of the Pallas-Triton kernels a module calls."""
    calls = (line for line in hlo.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line)
    return {match[1] for line in calls if (match := re.search(r'\bname = "([^"]+)"', line))}


def mosaic_calls(hlo: str) -> int:
    """How many calls of Pallas-Mosaic GPU kernels a module holds."""
    return hlo.count('custom_call_target="mosaic_gpu')


def constant_bytes(hlo: str) -> int:
    """Bytes of the arrays (not single numbers) written into the program."""
    return sum(_bytes(match[1]) for match in re.finditer(r" = (\w+\[\d[\d,]*\]\S*) constant\(", hlo))
