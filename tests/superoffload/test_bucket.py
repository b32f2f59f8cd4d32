import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.superoffload import BucketSpec, flatten, make_buckets, unflatten


def tree():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(7, 9)), jnp.float32),
        "b": [jnp.asarray(rng.normal(size=(50,)), jnp.bfloat16), jnp.float32(3.5), jnp.zeros((0, 4))],
        "c": jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float16),
    }


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("split", ["flat", "param"])
@pytest.mark.parametrize("bucket_bytes", [4, 40, 200, 1 << 20])
@pytest.mark.latest
def test_round_trip(split, bucket_bytes):
    params = tree()
    spec = make_buckets(params, bucket_bytes=bucket_bytes, split=split, pad_to=8)
    buckets = flatten(params, spec)
    assert [b.shape for b in buckets] == [(size,) for size in spec.sizes]
    assert all(b.dtype == jnp.float32 for b in buckets)
    assert (spec.n_buckets, spec.numel) == (len(spec.sizes), 63 + 50 + 1 + 24)
    assert_same(unflatten(buckets, spec), params)
    assert hash(spec) == hash(make_buckets(params, bucket_bytes=bucket_bytes, split=split, pad_to=8))


def test_flat_buckets_are_equal_slices_and_the_last_is_padded_with_zeros():
    spec = make_buckets({"x": jnp.ones(300)}, bucket_bytes=4 * 128)
    assert (spec.sizes, spec.groups) == ((128, 128, 128), None)
    last = flatten({"x": jnp.ones(300)}, spec)[-1]
    np.testing.assert_array_equal(last, np.r_[np.ones(44), np.zeros(84)])
    assert make_buckets({"x": jnp.ones(300)}).sizes == (384,)
    assert make_buckets({"x": jnp.ones(150)}, bucket_bytes=400).sizes == (
        100,
        100,
    )  # never beyond the size of the others
    assert make_buckets({}).sizes == ()


def test_param_buckets_follow_deepspeeds_rule():
    params = [jnp.ones(n) for n in (10, 20, 30, 40, 50)]
    spec = make_buckets(params, bucket_bytes=4 * 60, split="param")
    assert (spec.groups, spec.sizes) == (((0, 1, 2), (3, 4)), (60, 90))
    assert make_buckets(params, bucket_bytes=4, split="param").groups == tuple((i,) for i in range(5))
    assert make_buckets(params, split="param").sizes == (150,)


def test_order_is_that_of_the_forward_pass():
    params = {"head": jnp.full(2, 3.0), "layers": jnp.full(2, 2.0), "stem": jnp.full(2, 1.0)}
    spec = make_buckets(params, split="param", order=(2, 1, 0))
    np.testing.assert_array_equal(flatten(params, spec)[0], [1, 1, 2, 2, 3, 3])
    assert_same(unflatten(flatten(params, spec), spec), params)


def test_frozen_leaves_take_no_space_and_come_from_like():
    params = {"ids": jnp.arange(3), "w": jnp.ones(4), "fixed": jnp.full(2, 7.0)}
    frozen = {"ids": False, "w": True, "fixed": False}
    spec = make_buckets(params, trainable=frozen, order=(2,), pad_to=1)  # leaves are sorted: fixed, ids, w
    assert spec.numel == sum(spec.sizes) == 4
    changed = unflatten([jnp.zeros(4)], spec, like=params)
    assert_same(changed, params | {"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="like"):
        unflatten([jnp.zeros(4)], spec)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    words=st.integers(1, 40),
    pad_to=st.integers(1, 16),
    split=st.sampled_from(["flat", "param"]),
    apart=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=15, deadline=None)
def test_every_element_lies_in_exactly_one_place(sizes, words, pad_to, split, apart):
    """In order, those of leaves that lie apart behind the others, and in other buckets."""
    sizes = sizes[: 2 if words < 4 else None]  # few buckets
    ends = np.cumsum([0, *sizes])
    params = [np.arange(a, b, dtype=np.float32) + 1 for a, b in itertools.pairwise(ends)]
    apart = apart[: len(sizes)]
    spec = make_buckets(params, bucket_bytes=4 * words, split=split, pad_to=pad_to, apart=apart)
    buckets = [np.asarray(bucket) for bucket in flatten(params, spec)]
    filled = [bucket[: np.count_nonzero(bucket)] for bucket in buckets]
    for kind in (False, True):
        held = [x for x, alone in zip(filled, spec.holds_apart, strict=True) if alone is kind]
        want = [leaf for leaf, alone in zip(params, apart) if alone is kind]
        np.testing.assert_array_equal(np.concatenate([[], *held]), np.concatenate([[], *want]))
    assert sum(x.size for x in filled) == spec.numel == ends[-1]
    assert_same(unflatten(flatten(params, spec), spec), params)


def test_within_jit_the_spec_is_static():
    params = tree()
    spec = make_buckets(params, bucket_bytes=200)
    back = jax.jit(lambda p: unflatten(flatten(p, spec), spec))(params)
    assert_same(back, params)
    assert isinstance(spec, BucketSpec)


X = {"w": jnp.ones(4)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("params", "given", "error", "match"),
    [
        (X, {"bucket_bytes": 3}, ValueError, "bucket_bytes: expected a multiple of 4.*3"),
        (X, {"bucket_bytes": 0}, ValueError, "bucket_bytes"),
        (X, {"bucket_bytes": 6}, ValueError, "bucket_bytes"),
        (X, {"split": "leaf"}, ValueError, "split: expected one of.*'flat', 'param'.*'leaf'"),
        (X, {"pad_to": 0}, ValueError, "pad_to"),
        (X, {"order": (0, 0)}, ValueError, "order"),
        (X, {"trainable": {"v": True}}, ValueError, "trainable"),
        (X, {"apart": {"v": True}}, ValueError, "apart: expected a tree of bools"),
        ({"w": jnp.ones(4, int)}, {}, TypeError, r"leaf \['w'\].*int32"),
        ({"w": jnp.ones(4, complex)}, {}, TypeError, r"leaf \['w'\].*complex64"),
        ({"w": np.ones(4)}, {"trainable": True}, TypeError, "float64"),
    ],
)
def test_bad_plans(params, given, error, match):
    with pytest.raises(error, match=match):
        make_buckets(params, **given)


@pytest.mark.usefixtures("unchecked")
def test_trees_that_do_not_match():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    spec = make_buckets(params)
    with pytest.raises(ValueError, match=r"missing \['b'\]; unexpected \['c'\]"):
        flatten({"a": params["a"], "c": params["b"]}, spec)
    with pytest.raises(ValueError, match=r"leaf \['a'\]: expected shape \(2, 3\), got \(3, 2\)"):
        flatten({"a": params["a"].T, "b": params["b"]}, spec)
    with pytest.raises(TypeError, match=r"leaf \['b'\].*int32"):
        flatten({"a": params["a"], "b": jnp.ones(4, int)}, spec)
    with pytest.raises(ValueError, match=r"buckets: expected sizes \(128,\)"):
        unflatten([jnp.ones(4)], spec)
