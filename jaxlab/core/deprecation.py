"""Names and arguments that will go: they warn until the version that removes them.

    @deprecated(since="0.3", removal="0.5", instead="jaxlab.core.load_config")
    def read_config(path): ...

    @renamed_argument("lr", "learning_rate", since="0.3", removal="0.5")
    def make_optimizer(learning_rate): ...

Versions are plain strings: `tests/core/test_deprecation.py` reads them from the source, and fails as soon as the
library's version reaches a removal.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(?:dev|a|b|rc)\d+)?")


def deprecated(*, since: str, removal: str, instead: str) -> Callable[[F], F]:
    """Makes a function, or a class, warn when it is called, and say so in its docstring.

    Args:
      since: version that deprecates it, "major.minor" or longer.
      removal: version that it is gone from.
      instead: what to use.

    Raises:
      ValueError: a version that is none, or a removal that does not come after `since`.
    """
    _check(since, removal)

    def mark(target: F) -> F:
        marked: Any = target
        name = f"{target.__module__}.{target.__qualname__}"
        message = f"{name} is deprecated since {since} and goes in {removal}; use {instead}"
        if isinstance(target, type):
            start = target.__init__

            @functools.wraps(start)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                warnings.warn(message, FutureWarning, stacklevel=2)
                start(self, *args, **kwargs)

            marked.__init__ = init
        else:

            @functools.wraps(target)
            def call(*args: Any, **kwargs: Any) -> Any:
                warnings.warn(message, FutureWarning, stacklevel=2)
                return target(*args, **kwargs)

            marked = call
        marked.__doc__ = _noted(target.__doc__, f"Deprecated since {since}, goes in {removal}: use `{instead}`.")
        return marked

    return mark


def renamed_argument(old: str, new: str, *, since: str, removal: str) -> Callable[[F], F]:
    """Lets a function take an argument under its old name too, with a warning.

    Args:
      old: the name that goes.
      new: the name that the function has.
      since: version that deprecates the old name.
      removal: version that it is gone from.

    Raises:
      ValueError: as `deprecated`; the function has no argument `new`, or has `old` as well.
      TypeError: (when called) both names are given.
    """
    _check(since, removal)

    def mark(function: F) -> F:
        arguments = inspect.signature(function).parameters
        if new not in arguments or old in arguments:
            raise ValueError(f"new, old: expected {new!r} and not {old!r} among the arguments {list(arguments)}")
        name = f"{function.__module__}.{function.__qualname__}"
        message = f"{name}: the argument {old!r} is now {new!r}; the old name goes in {removal}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name}: expected {new!r} alone, got {old!r} too")
                warnings.warn(message, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        marked: Any = call
        note = f"`{old}` is the old name of `{new}`, deprecated since {since}, and goes in {removal}."
        marked.__doc__ = _noted(function.__doc__, note)
        return marked

    return mark


def is_due(removal: str, version: str) -> bool:
    """Whether a library of `version`, a development version of it included, must be without what goes in `removal`.

    Raises:
      ValueError: a version that is none.
    """
    return _numbers(version) >= _numbers(removal)


def _check(since: str, removal: str) -> None:
    if _numbers(removal) <= _numbers(since):
        raise ValueError(f"removal: expected a version after {since}, got {removal}")


def _numbers(version: str) -> tuple[int, int, int]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ValueError(f"version: expected major.minor, or major.minor.patch, got {version!r}")
    major, minor, patch = (int(number or 0) for number in found.groups())
    return major, minor, patch


def _noted(doc: str | None, note: str) -> str:
    """A docstring with a note after its first line."""
    first, _, rest = inspect.cleandoc(doc or "").partition("\n")
    return "\n".join(part for part in (first, f"\n{note}", rest) if part)
