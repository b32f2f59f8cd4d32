"""Reads a kernel's resources out of its PTX: instruction counts, and through `ptxas` registers and spills."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TENSOR_CORE = ("wgmma.mma_async", "mma.sync", "wmma.mma", "tcgen05.mma")

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_LABEL_OR_DIRECTIVE = re.compile(r"^\s*(?://|\.|\{|\}|\)|[\w$]+:|$)")
_OPCODE = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)")


@dataclass(frozen=True)
class Kernel:
    """A Pallas-Triton kernel as compiled: `registers` a thread, `spill_bytes` stored and loaded by a thread.

    Both are None without `ptxas`. `ptx_instructions` counts opcodes with their modifiers ("ld.global.v4.b32"), as they
    stand in the text: loops are not multiplied.
    """

    name: str
    registers: int | None
    spill_bytes: int | None
    tensor_core: bool
    ptx_instructions: dict[str, int]


def kernels(texts: Iterable[str], names: Iterable[str]) -> tuple[Kernel, ...]:
    """The kernels of some PTX modules that carry one of `names`; several variants of one kernel share its name.

    Args:
      texts: PTX modules.
      names: the names of the Pallas kernels; other entries are XLA's own fusions. XLA writes `_` for characters PTX
        does not take, and appends `__1`, `__2` to later variants.
    """
    wanted = {re.sub(r"\W", "_", name): name for name in names}
    found = []
    for text in texts:
        for entry in _ENTRY.findall(text):
            plain = entry if entry in wanted else re.sub(r"_+\d+$", "", entry)
            if plain in wanted:
                found.append((wanted[plain], entry, text))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        used = list(pool.map(lambda item: _resources(item[2]).get(item[1], (None, None)), found))
    result = []
    for (name, entry, text), (registers, spills) in zip(found, used):
        counts = _instructions(text, entry)
        tensor_core = any(opcode.startswith(TENSOR_CORE) for opcode in counts)
        result.append(Kernel(name, registers, spills, tensor_core, counts))
    return tuple(sorted(result, key=lambda kernel: (kernel.name, -sum(kernel.ptx_instructions.values()))))


def find_ptxas() -> str | None:
    """The path of `ptxas`: from package nvidia-cuda-nvcc, $CUDA_HOME or the search path; None if there is none."""
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [*site.glob("cu*/bin/ptxas"), *site.glob("cuda_nvcc/bin/ptxas")]
    if home := os.environ.get("CUDA_HOME"):
        places.append(Path(home) / "bin" / "ptxas")
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    return shutil.which("ptxas")


def _instructions(text: str, entry: str) -> dict[str, int]:
    """Opcode -> times it stands in the entry's body, the most frequent first."""
    head = rf"\.entry\s+{re.escape(entry)}\s*\("
    body = re.split(r"\n\{", re.split(head, text, maxsplit=1)[1], maxsplit=1)[1]
    counts: Counter[str] = Counter()
    for line in body[: body.find("\n}")].splitlines():
        if not _LABEL_OR_DIRECTIVE.match(line) and (opcode := _OPCODE.match(line)):
            counts[opcode[1]] += 1
    return dict(counts.most_common())


@functools.lru_cache(maxsize=256)
def _resources(text: str) -> dict[str, tuple[int, int]]:
    """Entry -> (registers, bytes of spill stores and loads), by assembling the module; {} where that cannot be done."""
    ptxas, architecture = find_ptxas(), re.search(r"\.target\s+(\w+)", text)
    if ptxas is None or architecture is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        command = [ptxas, "-v", f"-arch={architecture[1]}", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}
    result, entry, spills = {}, None, 0
    for line in done.stderr.splitlines():
        if named := re.search(r"Compiling entry function '([\w$]+)'", line):
            entry, spills = named[1], 0
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(spilled[1]) + int(spilled[2])
        elif entry and (used := re.search(r"Used (\d+) registers", line)):
            result[entry] = (int(used[1]), spills)
    return result
