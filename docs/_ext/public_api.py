"""The API reference: one page a public package, one entry a public name, and no build without a docstring.

A package is public if its `__init__` has `__all__`; `tests/test_imports.py` holds the same list to the same rule.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

ROOTS = ("jaxlab", "pallas_kernels")
_EXTRA_MODULES = (
    "jaxlab.cli",
    "jaxlab.core.compat",
    "jaxlab.core.deprecation",
    "jaxlab.core.distributed",
    "jaxlab.core.image_metrics",
    "jaxlab.core.jsonl",
    "jaxlab.core.tasks",
    "jaxlab.doctor",
    "jaxlab.instantedit.metrics",
    "jaxlab.models.clip",
    "jaxlab.models.lpips",
    "jaxlab.models.vit",
    "jaxlab.tour",
)
_INHERITED = frozenset(dir(object)) | {"from_bytes", "with_traceback", "add_note", "replace", "count", "index"}


def public_modules() -> list[ModuleType]:
    """Every package with an `__all__`, and the modules the contract names."""
    names = list(ROOTS)
    for root in ROOTS:
        package = importlib.import_module(root)
        names += [found.name for found in pkgutil.walk_packages(package.__path__, f"{root}.") if found.ispkg]
    names += [name for name in _EXTRA_MODULES if importlib.util.find_spec(name) is not None]
    modules = [importlib.import_module(name) for name in sorted(names)]
    return [module for module in modules if public_names(module)]


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or for a module without one what it defines itself without an underscore."""
    if hasattr(module, "__all__"):
        return sorted(name for name in module.__all__ if not inspect.ismodule(getattr(module, name)))
    if hasattr(module, "__path__"):
        return []
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and getattr(value, "__module__", None) == module.__name__
    )


def undocumented(module: ModuleType) -> list[str]:
    """Public names of a module, and public methods of its classes, that say nothing about themselves."""
    missing = []
    for name in public_names(module):
        value = getattr(module, name)
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            continue  # a constant is told by the comment or the text beside it
        doc = (value.__doc__ or "").strip()
        if not doc or (inspect.isclass(value) and doc.startswith(f"{value.__name__}(")):  # what dataclass makes up
            missing.append(f"{module.__name__}.{name}")
        if inspect.isclass(value) and value.__module__.partition(".")[0] in ROOTS:
            for method, function in vars(value).items():
                plain = inspect.unwrap(getattr(function, "__func__", function))
                own = inspect.isfunction(plain) and plain.__module__ == value.__module__
                if (
                    own
                    and not method.startswith("_")
                    and method not in _INHERITED
                    and not inspect.getdoc(getattr(value, method))
                ):
                    missing.append(f"{module.__name__}.{name}.{method}")
    if not (module.__doc__ or "").strip():
        missing.append(module.__name__)
    return missing


def _entry(module: ModuleType, name: str, told: set[type]) -> str:
    value = getattr(module, name)
    if inspect.isclass(value) and value in told:
        return f".. autoclass:: {module.__name__}.{name}\n   :no-index:\n"  # its members are on an earlier page
    if inspect.isclass(value):
        told.add(value)
        options = "   :members:\n   :member-order: bysource\n"
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        return f".. {kind}:: {module.__name__}.{name}\n{options}"
    if inspect.isroutine(value) or hasattr(value, "__wrapped__"):
        return f".. autofunction:: {module.__name__}.{name}\n"
    hidden = "   :no-value:\n" if len(repr(value)) > 200 else ""
    return f".. autodata:: {module.__name__}.{name}\n{hidden}"


def generate(folder: Path) -> None:
    """Writes one page a module into `folder`, and removes what is no longer public."""
    folder.mkdir(parents=True, exist_ok=True)
    pages, told = {}, set()
    for module in public_modules():
        title = module.__name__
        entries = "\n".join(_entry(module, name, told) for name in public_names(module))
        head = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n   :no-members:\n\n"
        pages[f"{title}.rst"] = f"{head}{entries}"
    for old in folder.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app):
    """Generates the pages when a build starts; refuses a build with an undocumented public name."""
    from sphinx.errors import ExtensionError

    def start(app):
        missing = [name for module in public_modules() for name in undocumented(module)]
        if missing:
            raise ExtensionError("public names without a docstring: " + ", ".join(missing))
        generate(Path(app.srcdir) / "api" / "generated")

    app.connect("builder-inited", start)
    return {"parallel_read_safe": True}
