"""Typed configuration: frozen dataclasses, filled from YAML and dotted overrides, strict about names and types.

OmegaConf reads the YAML (numbers such as 1e-3, `${other.key}` interpolation, `???` for "must be given"); the types are
checked here, because configs of this library use unions that OmegaConf's own schemas cannot express.
"""

import dataclasses
import difflib
import enum
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from jaxlab.core.folders import replace_file
from jaxlab.core.untrusted import read_yaml

T = TypeVar("T")

_RECIPE_KEY = "system"
_NONE = type(None)


def load_config(cls: type[T], path: str | os.PathLike | None = None, overrides: Iterable[str] = ()) -> T:
    """Builds a config from its defaults, then a YAML file, then overrides.

    Args:
      cls: a dataclass. Fields may be nested dataclasses, unions, `Literal`, enums, `Path`, tuples, lists, dicts.
      path: a YAML file of (some of) its fields. The extra top-level key `system`, which names the recipe to the
        command line, is ignored where `cls` has no such field.
      overrides: `"a.b=value"`, the value in YAML; it replaces what was there. `a.0` is the first element of a tuple.

    Raises:
      ValueError: an unknown key (the message names the nearest known one), a missing one, or a wrong value.
      TypeError: a value of the wrong type; the message names key, got, and expected.
      FileNotFoundError: no such file.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: expected a dataclass, got {cls!r}")
    tree = {} if path is None else _read(Path(path))
    if _RECIPE_KEY not in _fields(cls):
        tree.pop(_RECIPE_KEY, None)
    texts: dict[str, str] = {}
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {override!r}: expected 'a.b=value'")
        _set(tree, cls, dataclasses.MISSING, key.split("."), _parse(text), key)
        texts = {other: kept for other, kept in texts.items() if not other.startswith(key + ".")} | {key: text}
    return _build(cls, _resolve(tree), "", texts)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, numbers and text, which YAML and JSON can hold and `load_config` reads back."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: expected a dataclass instance, got {config!r}")
    return {name: _plain(getattr(config, name), name) for name in _fields(type(config))}


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Writes a config as YAML that `load_config` reads back, by one rename."""
    from omegaconf import OmegaConf

    replace_file(path, OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config)))))


def _read(path: Path) -> dict[Any, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        read_yaml(path)  # within bounds; OmegaConf's own loader reads some numbers otherwise
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(tree, dict):
        raise TypeError(f"{path}: expected a mapping of keys to values, got {tree!r}")
    return tree


def _parse(text: str) -> Any:
    """What follows the `=`; what is no YAML is text."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not text:
        return ""
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return parsed["value"]
    except YAMLError:
        return text


def _resolve(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Follows `${...}`, after the overrides, so that what is interpolated sees them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"key {error.full_key!r}: {error.msg}") from error
    return resolved


def _set(node: Any, annotation: Any, default: Any, parts: Sequence[str], value: Any, key: str) -> None:
    """Puts `value` at `parts` below `node`; what the file left out on the way starts from its default."""
    part, rest = parts[0], parts[1:]
    cls = _dataclass_in(annotation)
    if cls is not None:
        fields = _fields(cls)
        if part not in fields:
            raise _unknown(part, fields, "".join(above + "." for above in key.split(".")[: -len(parts)]))
        base = default if isinstance(default, cls) else None
        below, default = _hints(cls)[part], getattr(base, part) if base is not None else _default(fields[part])
    else:
        below, default = Any, dataclasses.MISSING
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ValueError(f"key {key!r}: expected an index below {len(node)}, got {part!r}")
        part = int(part)
    if not rest:
        node[part] = value
        return
    if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
        plain = None if _dataclass_in(below) is not None else default
        start = _plain(plain, key) if isinstance(plain, Mapping | tuple | list) else {}
        if _dataclass_in(below) is None and not isinstance(start, dict | list):
            raise TypeError(f"key {key!r}: {part!r} has no keys below it")
        node[part] = start
    if not isinstance(node[part], dict | list):
        raise TypeError(f"key {key!r}: {part!r} has no keys below it, it is {node[part]!r}")
    _set(node[part], below, default, rest, value, key)


def _build(cls: type, tree: Mapping[Any, Any], prefix: str, texts: Mapping[str, str], base: Any = None) -> Any:
    """An instance of `cls` from plain values; fields not given are those of `base`, or the class's defaults."""
    fields, hints, values = _fields(cls), _hints(cls), {}
    for key in tree:
        if key not in fields:
            raise _unknown(key, fields, prefix)
    for name, field in fields.items():
        default = getattr(base, name) if base is not None else _default(field)
        if name in tree:
            values[name] = _convert(tree[name], hints[name], prefix + name, texts, default)
        elif default is dataclasses.MISSING:
            raise ValueError(f"key {prefix + name!r} is missing: expected {_name(hints[name])}")
        elif base is not None:
            values[name] = default
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        error.add_note(f"while building {cls.__name__}" + (f" for key {prefix[:-1]!r}" if prefix else ""))
        raise


class _Mismatch(Exception):
    """The value does not have the type."""


def _convert(value: Any, annotation: Any, key: str, texts: Mapping[str, str], default: Any = None) -> Any:
    try:
        return _fit(value, annotation, key, texts, default)
    except _Mismatch:
        if key in texts:  # `name=12` and `name=null` mean the text where only text fits
            try:
                return _fit(texts[key], annotation, key, {}, default)
            except _Mismatch:
                pass
        raise TypeError(
            f"key {key!r}: got {value!r} of type {type(value).__name__}, expected {_name(annotation)}"
        ) from None


def _fit(value: Any, annotation: Any, key: str, texts: Mapping[str, str], default: Any) -> Any:
    """`value` as the annotated type, or `_Mismatch`; errors inside a container or dataclass are told as such."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is object or isinstance(annotation, TypeVar):
        return value
    if origin is typing.Annotated:
        return _fit(value, arguments[0], key, texts, default)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, arguments, key, texts, default)
    if origin is typing.Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
        if not any(type(value) is type(choice) for choice in arguments):
            raise _Mismatch
        raise ValueError(f"key {key!r}: got {value!r}, expected one of {', '.join(map(repr, arguments))}")
    if annotation is None or annotation is _NONE:
        if value is None:
            return None
        raise _Mismatch
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise _Mismatch
        return _build(annotation, value, key + ".", texts, default if type(default) is annotation else None)
    kind = origin or annotation
    if kind in (tuple, list, Sequence, Iterable, set, frozenset):
        return _fit_sequence(value, kind, arguments, key, texts)
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch
        of_key, of_value = arguments or (Any, Any)
        return {
            _convert(name, of_key, f"{key}.{name}", {}): _convert(item, of_value, f"{key}.{name}", texts)
            for name, item in value.items()
        }
    return _fit_scalar(value, kind, key)


def _fit_union(value: Any, members: Sequence[Any], key: str, texts: Mapping[str, str], default: Any) -> Any:
    """The member that takes the value as it is, else the first that takes it converted (1 as 1.0)."""
    fitting, complaint = [], None
    for member in members:
        try:
            fitting.append(_fit(value, member, key, texts, default))
        except _Mismatch:
            continue
        except (ValueError, TypeError) as error:
            complaint = complaint or error
    for fit in fitting:
        if type(fit) is type(value):
            return fit
    if fitting:
        return fitting[0]
    raise complaint or _Mismatch


def _fit_sequence(value: Any, kind: Any, arguments: Sequence[Any], key: str, texts: Mapping[str, str]) -> Any:
    if not isinstance(value, list | tuple):
        raise _Mismatch
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments) and arguments != ((),):
            raise TypeError(f"key {key!r}: got {len(value)} values {value!r}, expected {len(arguments)}")
        of_items: Sequence[Any] = arguments
    else:
        of_items = [arguments[0] if arguments else Any] * len(value)
    items = [_convert(item, of, f"{key}.{index}", texts) for index, (item, of) in enumerate(zip(value, of_items))]
    return tuple(items) if kind in (Sequence, Iterable) else kind(items)


def _fit_scalar(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(kind, type):
        raise TypeError(f"key {key!r}: a config cannot hold the type {_name(kind)}")
    if issubclass(kind, enum.Enum):
        if isinstance(value, kind):
            return value
        if not isinstance(value, str):
            raise _Mismatch
        if value not in kind.__members__:
            raise ValueError(f"key {key!r}: got {value!r}, expected one of {', '.join(map(repr, kind.__members__))}")
        return kind[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (kind is os.PathLike or issubclass(kind, PurePath)) and isinstance(value, str):
        return Path(value)
    if isinstance(value, bool) and kind is not bool:  # a bool is an int to Python, but never in a config
        raise _Mismatch
    if not isinstance(value, kind):
        raise _Mismatch
    return value


def _plain(value: Any, key: str) -> Any:
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name), f"{key}.{name}") for name in _fields(type(value))}
    if isinstance(value, Mapping):
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item, f"{key}.{index}") for index, item in enumerate(value)]
    raise TypeError(f"key {key!r}: a config cannot hold {value!r} of type {type(value).__name__}")


def _escape(value: Any) -> Any:
    """Text that looks like an interpolation, written so that it is read back as text."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass an override's next key belongs to: the annotation itself, or the first one of a union."""
    for member in typing.get_args(annotation) or (annotation,):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def _unknown(key: Any, fields: Iterable[str], prefix: str) -> ValueError:
    near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
    hint = f"; did you mean {prefix + near[0]!r}?" if near else ""
    return ValueError(f"unknown key {prefix + str(key)!r}{hint} (known keys: {', '.join(fields)})")


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
