"""The floors of the house: who may import whom, how long an import takes, and public names documented."""

import ast
import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# (floor, place within it): an import may go to a lower floor, or to the left on the same one.
FLOORS = {
    "pallas_kernels": (-1, 0),
    "jaxlab.core": (0, 0),
    "jaxlab.layers": (1, 0),
    "jaxlab.xmoe": (1, 1),
    "jaxlab.models": (2, 0),
    "jaxlab.training": (3, 0),
    "jaxlab.inference": (3, 1),
    "jaxlab.rl": (3, 2),
}
# Modules that stand above the floor of their folder, wherever that is: stories, and what a person starts.
ABOVE = {"recipe": (4, 0), "commands": (5, 0), "trainable": (5, 0)}
TOP = ("cli", "doctor", "pipeline", "recipes", "terminal", "tour", "_platform", "_tour_page", "__main__")
# What joins systems may import several of them, but nothing of them that is not public.
JOINS = ("jaxlab.pipeline",)


def files():
    return sorted([*(ROOT / "jaxlab").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> tuple[int, int]:
    parts = module.split(".")
    if parts[1:] and parts[1] in TOP:
        return (5, 0)
    if parts[-1] in ABOVE:
        return ABOVE[parts[-1]]
    for length in (2, 1):
        if ".".join(parts[:length]) in FLOORS:
            return FLOORS[".".join(parts[:length])]
    if module == "jaxlab":
        return (-1, 0)  # the version, and nothing else
    return (4, 0)


def imported(file: Path, module: str) -> list[str]:
    """Modules of ours that a file imports, at its top or inside its functions."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            origin = base if node.level else node.module
            found += [
                f"{origin}.{alias.name}"
                if (ROOT / origin.replace(".", "/") / f"{alias.name}.py").exists()
                or (ROOT / origin.replace(".", "/") / alias.name / "__init__.py").exists()
                else origin
                for alias in node.names
            ]
    return [name for name in found if name.split(".")[0] in ("jaxlab", "pallas_kernels")]


def system_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_imports_only_go_down():
    wrong = []
    for file in files():
        module = name_of(file)
        for other in imported(file, module):
            same = system_of(module) == system_of(other)
            if floor_of(other) > floor_of(module) or (floor_of(module) == (4, 0) == floor_of(other) and not same):
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_init_imports_what_stands_above_it():
    for file in files():
        if file.name == "__init__.py":
            assert not [name for name in imported(file, name_of(file)) if name.split(".")[-1] in ABOVE], file


def test_library_never_imports_torch():
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("torch", "torchvision")], file


PACKAGES = ("jaxlab", *(name_of(file) for file in sorted((ROOT / "jaxlab").glob("*/__init__.py"))))

# One process imports JAX, then forks a child for each package: no backend has started, so that is safe. CPU seconds,
# not the clock's: the machine may be busy. The smallest of three, the first one reads the files.
_TIMER = """
import json, os, sys, time
import jax
def seconds(package):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        started = time.process_time()
        __import__(package)
        os.write(writing, json.dumps([time.process_time() - started]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)[0]
print(json.dumps({name: min(seconds(name) for _ in range(3)) for name in sys.argv[1:]}))
"""


def test_imports_are_light():
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TIMER, *PACKAGES], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    slow = {name: round(value, 2) for name, value in json.loads(out.stdout).items() if value > 0.3}
    assert not slow, f"seconds over `import jax`: {slow}, expected at most 0.3"


@pytest.fixture(scope="module")
def public_api():
    spec = importlib.util.spec_from_file_location("public_api", ROOT / "docs" / "_ext" / "public_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_joins_systems_uses_public_names_only(public_api):
    """Names of a package's `__all__`, or of a module that is documented as public."""
    public = {module.__name__: set(public_api.public_names(module)) for module in public_api.public_modules()}
    packages = {name for name in public if hasattr(sys.modules[name], "__all__")}
    modules = {f"{name}.{child}" for name in packages for child in sys.modules[name].__all__}  # public as a whole
    wrong, seen = [], 0
    for file in files():
        name = name_of(file)
        if system_of(name) not in JOINS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("jaxlab") and node.level == 0:
                own = system_of(str(node.module)) in (*JOINS, "jaxlab.core")  # floor 0 is everybody's
                for alias in node.names:
                    known = public.get(str(node.module), set())
                    fine = alias.name in known or f"{node.module}.{alias.name}" in modules | packages
                    wrong += [] if own or fine else [f"{name}: {alias.name} of {node.module}"]
                    seen += not own
    assert not wrong, "\n".join(wrong)
    assert seen > 20


@pytest.mark.latest
def test_every_public_name_is_documented(public_api):
    modules = public_api.public_modules()
    assert {"jaxlab.core", "jaxlab.models", "jaxlab.inference", "jaxlab.training"} <= {m.__name__ for m in modules}
    assert [name for module in modules for name in public_api.undocumented(module)] == []


def test_the_check_finds_what_is_undocumented(public_api):
    @dataclasses.dataclass
    class Bare:
        x: int

    def told():
        """Says something."""

    def untold(): ...

    module = types.ModuleType("jaxlab.made_up", "Says what it is.")
    vars(module).update(Bare=Bare, told=told, untold=untold)
    module.__all__ = ["Bare", "told", "untold"]
    assert public_api.undocumented(module) == ["jaxlab.made_up.Bare", "jaxlab.made_up.untold"]
