"""Speculation equals the synchronous step bit for bit, and a step that is taken back leaves no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import superoffload as so
from jaxlab.superoffload.bucket_step import Copies
from jaxlab.superoffload.host_kernel import Residual
from tests.oracles import adam as oracle

SIZES = (700, 333)
HYPER = so.AdamHyper(lambda count: 1e-2 / (count + 1), 0.9, 0.95, weight_decay=0.1)
MODES = pytest.mark.parametrize("backend", ["xla", "ffi"])


def state_at(count=3, seed=0, sizes=SIZES):
    """A state as after some steps, so that moments are not zero."""
    rng = np.random.default_rng(seed)
    p, m, v = ([rng.normal(size=n).astype(np.float32) for n in sizes] for _ in range(3))
    arrays = [tuple(map(jnp.asarray, x)) for x in (p, [0.3 * x for x in m], [np.square(x) + 0.1 for x in v])]
    return so.SpeculativeState(*arrays, jnp.int32(count))


def gradients(seed=1, size=1.0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(size * rng.normal(size=n), jnp.float32) for n in sizes)


def bits(state):
    return [np.asarray(x).view(np.int32) for x in jax.tree.leaves(state)]


def assert_same_bits(got, want):
    assert got.pending == want.pending
    for a, b in zip(bits(got), bits(want), strict=True):
        np.testing.assert_array_equal(a, b)


def copy(state):
    return jax.tree.map(jnp.copy, state)


@MODES
@pytest.mark.parametrize("undo", ["copy", "residual"])
@pytest.mark.parametrize("mode", ["adamw", "adam"])
@pytest.mark.latest
def test_commit_and_rollback(backend, undo, mode):
    hyper = so.AdamHyper(HYPER.lr, 0.9, 0.95, weight_decay=0.1, mode=mode)
    state = so.init_state(list(state_at(0).p), so.make_buckets(list(state_at(0).p), bucket_bytes=2000, pad_to=1))
    spare = None
    for t, donate in enumerate((False, False, True, True)):
        g = gradients(t, sizes=[p.size for p in state.p])
        want = so.replay(state, g, hyper, scale=0.5, backend=backend)
        how = {"scale": 0.5, "undo": undo, "backend": backend, "donate": donate, "capacity": 0.1}
        ahead, log = so.speculate(copy(state), g, hyper, **how, reuse=spare)
        assert {type(x) for x in log.buckets} == {Copies if undo == "copy" else Residual}
        assert ahead.pending
        assert int(ahead.count) == t
        assert_same_bits(so.commit(ahead), want)
        assert_same_bits(so.rollback(copy(ahead), log, donate=donate), state)
        back = so.rollback(ahead, log, donate=donate)
        assert_same_bits(so.replay(back, g, hyper, scale=0.5, backend=backend, donate=donate), want)
        state, spare = want, None if donate else log
    assert int(state.count) == 4


@MODES
def test_clipping_multiplies_the_same_compiled_step(backend):
    state, g = state_at(), gradients(size=3.0)
    verdict = so.validate(g, scale=0.25, clip_norm=1.0)
    ahead, log = so.speculate(state, g, HYPER, scale=0.25, undo="residual", backend=backend)
    replayed = so.replay(so.rollback(ahead, log), g, HYPER, scale=0.25, coef=verdict.coef, backend=backend)
    assert_same_bits(replayed, so.replay(state, g, HYPER, scale=0.25, coef=verdict.coef, backend=backend))
    factor = 0.25 * oracle.clipped(g, scale=0.25, clip_norm=1.0)[1]
    for b in range(2):
        old = state.p[b], state.m[b], state.v[b]
        want = oracle.step(*old, g[b], t=4, lr=1e-2 / 4, b2=0.95, weight_decay=0.1, scale=factor)
        for got, exact in zip((replayed.p[b], replayed.m[b], replayed.v[b]), want):
            np.testing.assert_allclose(got, exact, rtol=2e-5, atol=1e-6)


@MODES
def test_a_bucket_of_gradients_that_are_not_finite_is_copied(backend):
    state, g = state_at(), list(gradients())
    g[0] = jnp.full(SIZES[0], jnp.nan)
    g[1] = g[1].at[5].set(jnp.inf).at[7].set(-jnp.inf)
    for donate in (False, True):
        ahead, log = so.speculate(copy(state), g, HYPER, undo="residual", backend=backend, donate=donate)
        assert [type(x) for x in log.buckets] == [Copies, Residual]
        assert log.exact.tolist() == [True, True]
        assert_same_bits(so.commit(copy(ahead)), so.replay(state, g, HYPER, backend=backend))
        assert_same_bits(so.rollback(ahead, log, donate=donate), state)


@MODES
def test_a_gradient_far_larger_than_before(backend):
    sizes = (20000,)  # blocks done and blocks left alone, in one bucket
    state, g = state_at(sizes=sizes), gradients(size=300.0, sizes=sizes)
    for donate in (False, True):
        ahead, log = so.speculate(copy(state), g, HYPER, undo="residual", backend=backend, donate=donate)
        assert isinstance(log.buckets[0], Copies)
        assert_same_bits(so.commit(copy(ahead)), so.replay(state, g, HYPER, backend=backend))
        assert_same_bits(so.rollback(ahead, log), state)
    ahead, log = so.speculate(state, g, HYPER, undo="residual", backend=backend, capacity=1.0)
    assert isinstance(log.buckets[0], Residual)
    assert_same_bits(so.rollback(ahead, log), state)


@MODES
def test_under_jit_a_log_says_whether_it_is_exact(backend):
    hyper = so.AdamHyper(1e-2)
    go = jax.jit(functools.partial(so.speculate, undo="residual", backend=backend))
    back, step = jax.jit(so.rollback), jax.jit(functools.partial(so.replay, backend=backend))
    state = state_at()
    ahead, log = go(state, gradients(), hyper)
    assert log.exact.tolist() == [True, True]
    assert_same_bits(back(ahead, log), state)
    assert_same_bits(so.rollback(ahead, log), state)
    assert_same_bits(so.commit(ahead), step(state, gradients(), hyper))
    assert_same_bits(so.commit(ahead), so.replay(state, gradients(), hyper, backend=backend))
    big = (gradients()[0], gradients(size=1e4)[1])
    ahead, log = go(state, big, hyper)
    assert log.exact.tolist() == [True, False]
    assert_same_bits(so.commit(ahead), step(state, big, hyper))  # the step itself is complete
    with pytest.raises(ValueError, match="no room for the exceptions of bucket 1"):
        so.rollback(ahead, log)


def test_both_backends_write_logs_that_either_can_read():
    state, g = state_at(), gradients()
    for one, other in (("xla", "ffi"), ("ffi", "xla")):
        ahead, log = so.speculate(state, g, HYPER, undo="residual", backend=one)
        assert_same_bits(so.rollback(ahead, log.replace(backend=other)), state)


ANYTHING = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1e-39, -1e-45, 3e38, -3e38, 1e30, 1e-30, np.inf, -np.inf, np.nan]),
    st.floats(-1, 1, width=32),
)


@MODES
@given(
    values=st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING), min_size=1, max_size=40), seed=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_in_state_and_gradients_comes_back(backend, values, seed):
    state, (g,) = state_at(seed=seed, sizes=(64,)), gradients(seed, sizes=(64,))
    odd = [np.array(column, np.float32) for column in zip(*values)]

    def put(x, new):
        x = np.array(x)
        x[: len(new)] = new
        return jnp.asarray(x)

    state = so.SpeculativeState(
        (put(state.p[0], odd[0]),), (put(state.m[0], odd[1]),), (put(state.v[0], odd[2]),), state.count
    )
    g = (put(g, odd[3]),)
    ahead, log = so.speculate(state, g, HYPER, undo="residual", backend=backend, capacity=0.3)
    assert_same_bits(so.rollback(ahead, log), state)
    assert_same_bits(so.commit(ahead), so.replay(state, g, HYPER, backend=backend))


def test_bytes_of_a_log():
    state = state_at(sizes=(20000,))
    for undo, low, high in (("copy", 12, 12), ("residual", 3, 3.3)):
        _, log = so.speculate(state, gradients(sizes=(20000,)), HYPER, undo=undo)
        assert isinstance(log.nbytes, int)
        assert low <= log.nbytes / 20000 <= high


@pytest.mark.parametrize("clip_eps", [1e-6, 0.0])
@pytest.mark.latest
def test_verdict(clip_eps):
    g = (*gradients(), jnp.asarray(gradients()[0], jnp.bfloat16))
    norm, coef = oracle.clipped(g, scale=0.5, clip_norm=2.0, eps=clip_eps)
    verdict = so.validate(g, scale=0.5, clip_norm=2.0, clip_eps=clip_eps)
    assert [x.dtype for x in verdict] == [jnp.float32, jnp.bool_, jnp.float32]
    np.testing.assert_allclose(verdict.norm, norm, rtol=1e-6)
    np.testing.assert_allclose(verdict.coef, coef, rtol=1e-6)
    assert so.validate(g, clip_norm=1e9).coef == so.validate(g).coef == 1


def test_verdict_on_odd_gradients():
    for odd in (jnp.nan, jnp.inf):
        verdict = so.validate((jnp.ones(3), jnp.array([1.0, odd])), clip_norm=1.0)
        assert not verdict.finite
        assert verdict.coef == 0
    huge = so.validate((jnp.full(4, 1e30),), clip_norm=1.0)  # squares that float32 does not hold
    assert huge.finite
    np.testing.assert_allclose(huge.norm, 2e30, rtol=1e-6)
    np.testing.assert_allclose(huge.coef, 5e-31, rtol=1e-6)
    assert not so.validate((jnp.full(4, 3e38),)).finite  # a norm that it does not hold


@pytest.mark.usefixtures("unchecked")
def test_misuse():
    state, g = state_at(), gradients()
    ahead, log = so.speculate(state, g, HYPER)
    with pytest.raises(RuntimeError, match="speculate: a speculation is pending"):
        so.speculate(ahead, g, HYPER)
    with pytest.raises(RuntimeError, match="replay: a speculation is pending"):
        so.replay(ahead, g, HYPER)
    with pytest.raises(RuntimeError, match="commit: no speculation is pending"):
        so.commit(state)
    with pytest.raises(RuntimeError, match="commit: no speculation is pending"):
        so.commit(so.commit(ahead))
    back = so.rollback(ahead, log)
    with pytest.raises(RuntimeError, match="rollback: no speculation is pending"):
        so.rollback(back, log)
    later, _ = so.speculate(so.commit(ahead), g, HYPER)
    with pytest.raises(ValueError, match="log: expected that of step 5, got that of step 4"):
        so.rollback(later, log)
    with pytest.raises(ValueError, match="log: expected one of this state's buckets"):
        so.rollback(so.speculate(state_at(sizes=(4,)), gradients(sizes=(4,)), HYPER)[0], log)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grads": gradients()[:1]}, ValueError, "grads: expected 2 buckets, got 1"),
        ({"grads": gradients()[::-1]}, ValueError, r"grads: bucket 0 must have shape \(700,\), got \(333,\)"),
        ({"grads": tuple(g.astype(int) for g in gradients())}, TypeError, "grads: bucket 0 must be floating"),
        ({"undo": "off"}, ValueError, "undo: expected one of.*'copy', 'residual'.*'off'"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"capacity": 0}, ValueError, "capacity"),
        ({"hyper": object()}, TypeError, "hyper must be an AdamHyper"),
        ({"hyper": object(), "undo": "residual"}, NotImplementedError, "undo='residual'.*got object"),
    ],
)
def test_bad_speculations(change, error, match):
    grads, hyper = change.pop("grads", gradients()), change.pop("hyper", HYPER)
    with pytest.raises(error, match=match):
        so.speculate(state_at(), grads, hyper, **change)


@pytest.mark.parametrize(("settings", "match"), [({"clip_norm": 0}, "clip_norm"), ({"clip_eps": -1.0}, "clip_eps")])
def test_bad_clips(settings, match):
    with pytest.raises(ValueError, match=match):
        so.validate(gradients(), **settings)
