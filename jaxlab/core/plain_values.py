"""Python values as JSON that gives them back exactly, types included, and never runs code when read."""

import base64
from typing import Any

import numpy as np

_KIND = "__kind__"


def encode(value: Any) -> Any:
    """A JSON value.

    Args:
      value: None, bool, int, float, text, bytes, NumPy arrays and scalars of numbers, and lists, tuples, sets,
        frozensets and dicts of such.

    Raises:
      TypeError: anything else, also an instance of a subclass of these.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is dict:
        if all(type(key) is str for key in value) and _KIND not in value:
            return {key: encode(item) for key, item in value.items()}
        return {_KIND: "dict", "items": [[encode(key), encode(item)] for key, item in value.items()]}
    if type(value) in (tuple, set, frozenset):
        return {_KIND: type(value).__name__, "items": [encode(item) for item in value]}
    if type(value) is bytes:
        return {_KIND: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSUmM":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        shape = list(value.shape) if isinstance(value, np.ndarray) else None
        return {_KIND: "array", "dtype": value.dtype.str, "shape": shape, "data": data}
    raise TypeError(f"expected numbers, text, bytes, arrays and collections of them, got {type(value).__qualname__}")


def decode(value: Any) -> Any:
    """The inverse of `encode`.

    Raises:
      ValueError, TypeError, KeyError: what no `encode` made.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value["items"]}
    if kind in ("tuple", "set", "frozenset"):
        make = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make(decode(item) for item in value["items"])
    data = base64.b64decode(value["data"], validate=True)
    if kind == "bytes":
        return data
    if kind == "array" and np.dtype(value["dtype"]).kind in "biufcSUmM":
        array = np.frombuffer(data, value["dtype"]).copy()
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    raise ValueError(f"expected a value of a kind that is known, got {kind!r}")
