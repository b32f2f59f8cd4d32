"""Deprecated names and arguments: what they say, and that none outlives its version."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import jaxlab
from jaxlab.core.deprecation import deprecated, is_due, renamed_argument

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"since": "0.3", "removal": "0.5"}


@deprecated(**VERSIONS, instead="jaxlab.core.new")
def old(a, *, b=1):
    """Adds.

    Args:
      a: a number.
    """
    return a + b


@renamed_argument("lr", "learning_rate", **VERSIONS)
def step(x, learning_rate=1.0):
    """Goes on."""
    return x * learning_rate


def test_a_deprecated_function_still_works_and_says_what_to_use():
    with pytest.warns(FutureWarning, match=r"old is deprecated since 0\.3 and goes in 0\.5; use jaxlab\.core\.new$"):
        assert old(1, b=2) == 3
    assert old.__name__ == "old"
    lines = old.__doc__.splitlines()
    assert lines[0] == "Adds."
    assert lines[2] == "Deprecated since 0.3, goes in 0.5: use `jaxlab.core.new`."
    assert "Args:" in lines


def test_a_deprecated_class_warns_when_it_is_made():
    class Plain:
        def __init__(self, size):
            self.size = size

    marked = deprecated(**VERSIONS, instead="list")(Plain)
    with pytest.warns(FutureWarning, match="Plain is deprecated"):
        assert marked(3).size == 3
    assert isinstance(marked, type)


def test_an_argument_under_its_old_name():
    with pytest.warns(
        FutureWarning, match=r"step: the argument 'lr' is now 'learning_rate'; the old name goes in 0\.5"
    ):
        assert step(2, lr=3.0) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(2, learning_rate=3.0) == step(2, 3.0) == 6
    with pytest.raises(TypeError, match="expected 'learning_rate' alone, got 'lr' too"):
        step(2, lr=1.0, learning_rate=1.0)


def test_the_warning_points_at_the_caller():
    script = """
from jaxlab.core.deprecation import deprecated, renamed_argument
@deprecated(since="0.3", removal="0.5", instead="x")
def old(): ...
@renamed_argument("a", "b", since="0.3", removal="0.5")
def new(b): ...
old()
new(a=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [line.split(" ")[0] for line in done.stderr.splitlines() if "Warning" in line] == [
        "<string>:7:",
        "<string>:8:",
    ]


@pytest.mark.parametrize(
    ("version", "due"),
    [("0.4.9", False), ("0.5.0.dev0", True), ("0.5", True), ("0.5.1", True), ("0.10.0", True), ("1.0rc1", True)],
)
def test_when_a_removal_is_due(version, due):
    assert is_due("0.5", version) is due


def test_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match=r"removal: expected a version after 0\.5, got 0\.3"):
        deprecated(since="0.5", removal="0.3", instead="x")
    with pytest.raises(ValueError, match=r"version: expected major\.minor"):
        deprecated(since="next", removal="0.3", instead="x")
    with pytest.raises(ValueError, match="expected 'rate' and not 'lr'"):
        renamed_argument("lr", "rate", **VERSIONS)(lambda learning_rate: None)


def overdue(source: str, version: str) -> list[str]:
    """The deprecations of a file whose version has come; those whose versions are no plain strings, too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in ("deprecated", "renamed_argument"):
            continue
        removal = next((keyword.value for keyword in node.keywords if keyword.arg == "removal"), None)
        if not (isinstance(removal, ast.Constant) and isinstance(removal.value, str)):
            found.append(f"line {node.lineno}: removal is no plain string")
        elif is_due(removal.value, version):
            found.append(f"line {node.lineno}: removal in {removal.value}, this is {version}")
    return found


def test_nothing_outlives_its_removal():
    late = [
        f"{file.relative_to(ROOT)}, {problem}"
        for package in ("jaxlab", "pallas_kernels")
        for file in sorted((ROOT / package).rglob("*.py"))
        for problem in overdue(file.read_text(), jaxlab.__version__)
    ]
    assert not late, "\n".join(late)


def test_what_outlives_its_removal_is_found():
    source = '@core.deprecation.deprecated(since="0.1", removal="0.3", instead="b")\ndef a(): ...\n'
    assert overdue(source, "0.2.7") == []
    assert overdue(source, "0.3.0.dev0") == ["line 1: removal in 0.3, this is 0.3.0.dev0"]
    assert overdue("@renamed_argument('a', 'b', since=X, removal=Y)\ndef f(b): ...\n", "0.1") == [
        "line 1: removal is no plain string"
    ]
