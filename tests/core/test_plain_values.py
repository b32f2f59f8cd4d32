"""Values as JSON and back: exactly, and nothing else."""

import json

import numpy as np
import pytest

from jaxlab.core import plain_values


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2.5, "text", b"\0\xff", [], (), {}, {1: "a", (2, 3): [b"x"]}, {"__kind__": "dict"}),
        *({"a": (1, [2, {"b": {3}}])}, frozenset({"x"}), float("inf"), 10**30),
    ],
)
def test_values_come_back(value):
    back = plain_values.decode(json.loads(json.dumps(plain_values.encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [np.float32(1.5), np.arange(6.0).reshape(2, 3), np.array([], "<i4"), np.array("ab")])
def test_arrays_come_back(value):
    back = plain_values.decode(json.loads(json.dumps(plain_values.encode(value))))
    np.testing.assert_array_equal(back, value)
    assert (type(back), back.dtype, back.shape) == (type(value), value.dtype, value.shape)


def test_nothing_else_is_taken():
    for value in (object(), np.array([object()]), {"a": lambda: 0}, type("Mine", (dict,), {})()):
        with pytest.raises(TypeError, match="expected numbers, text, bytes, arrays"):
            plain_values.encode(value)
    for row in ({"__kind__": "x", "data": ""}, {"__kind__": "array", "dtype": "O", "shape": [], "data": ""}):
        with pytest.raises(ValueError, match="kind that is known"):
            plain_values.decode(row)
