"""A plan as text."""

from collections.abc import Sequence
from typing import Any

from jaxlab.core.plan.hlo import Collective


def render(plan: Any) -> str:
    """A `Plan` as fixed-width text: verdict, bytes, collectives, kernels, notes."""
    target = plan.target
    axes = " x ".join(f"{name} {size}" for name, size in target.mesh.shape.items())
    count = target.mesh.size
    total, memory = plan.bytes["total"], target.memory_bytes
    limit = target.memory_factor * memory
    terms = sorted(((size, kind) for kind, size in plan.bytes.items() if kind not in ("total", "host")), reverse=True)
    largest = ", ".join(f"{kind} {size_text(size)}" for size, kind in terms[:3] if size)
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{target.gpu} {target.topology}: {count} device{'s' * (count > 1)}, {axes}",
        f"{verdict}: {size_text(total)} of {size_text(limit)} a device "
        f"({target.memory_factor:.0%} of {size_text(memory)}); largest: {largest or 'nothing'}",
        "",
        *_columns([("a device", "bytes"), *((kind, size_text(size)) for kind, size in plan.bytes.items())]),
    ]
    if plan.collectives:
        lines += ["", *_columns([("collective", "over", "times", "each", "in all"), *_traffic(plan.collectives)])]
    if plan.kernels:
        rows = [("kernel", "registers", "spills", "tensor cores", "instructions")]
        for item in plan.kernels:
            known = item.registers is not None
            rows.append(
                (
                    item.name,
                    str(item.registers) if known else "no ptxas",
                    f"{item.spill_bytes} B" if known else "-",
                    "yes" if item.tensor_core else "no",
                    str(sum(item.ptx_instructions.values())),
                )
            )
        lines += ["", *_columns(rows)]
    lines += [f"\nNote: {note}" for note in plan.notes]
    return "\n".join(lines)


def size_text(size: int | float) -> str:
    """Bytes in the unit that reads best: B, KiB, MiB or GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _traffic(collectives: Sequence[Collective]) -> list[tuple[str, ...]]:
    """A row for each collective that matters; those that make up the last thousandth of the bytes share one."""
    whole = sum(item.bytes * item.count for item in collectives)
    rows, told = [], 0
    for i, item in enumerate(collectives):
        left = whole - told
        if left < whole / 1000 and i < len(collectives) - 1:
            times = sum(rest.count for rest in collectives[i:])
            rows.append((f"{len(collectives) - i} smaller", "", str(times), "", size_text(left)))
            break
        told += item.bytes * item.count
        over = ", ".join(item.axes) or "-"
        rows.append((item.op, over, str(item.count), size_text(item.bytes), size_text(item.bytes * item.count)))
    return rows


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the rest to the right, a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]
