"""The C++ step beside a strict float32 model and XLA; compiled on first use, kept, and done without where it fails."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.superoffload import fused_adamw, host_adam, host_kernel, undo
from tests.oracles import adam as oracle

HYPER = {"count": 6, "lr": 3e-3, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "scale": 0.25}
SIZES = (0, 1, 7, 511, 512, 513, 2**14 - 1, 2**14 + 1)


def bucket(n, seed=0):
    rng = np.random.default_rng(seed)
    p, m, g = (rng.normal(size=n).astype(np.float32) for _ in range(3))
    return p, 0.1 * m, np.square(g[::-1]) + np.float32(1e-3), g


@functools.cache
def jitted(backend, mode="adamw", emit="bfloat16"):
    return jax.jit(functools.partial(fused_adamw, backend=backend, mode=mode, emit_dtype=emit))


@pytest.mark.parametrize("mode", ["adamw", "adam"])
def test_same_bits_for_every_size_and_split(mode):
    arrays = bucket(SIZES[-1])
    scalars = np.asarray(undo.scalars(HYPER | {"mode": mode, "bias_correction": True}))[:9]
    wanted = oracle.strict(*arrays, scalars, mode=mode)
    for n in SIZES:
        for at in (0, SIZES[-1] - n):
            got = jitted("ffi", mode)(*(x[at : at + n] for x in arrays), **HYPER)
            for mine, want in zip(got, wanted):
                np.testing.assert_array_equal(mine, want[at : at + n])


@pytest.mark.parametrize("emit", ["bfloat16", "float16", "float32"])
@pytest.mark.latest
def test_same_bits_as_xla_of_state_and_copy(emit):
    p, m, v, g = bucket(3000)
    p[:8] = [65504, 65519, 65520, -1e6, 1e-6, 6e-8, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    g[:8], m[:8] = 0, 0
    got, want = (jitted(backend, "adamw", emit)(p, m, v, g, **HYPER) for backend in ("ffi", "xla"))
    for mine, theirs in zip(got, want):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(got[3], got[0].astype(emit))


def test_denormals_are_zero_in_both():
    p, m, v, g = (np.full(600, x, np.float32) for x in (1e-39, -1e-39, 1e-40, 1e-20))
    got, want = (jitted(backend)(p, m, v, g, **HYPER) for backend in ("ffi", "xla"))
    for mine, theirs in zip(got, want):
        np.testing.assert_array_equal(mine, theirs)


def test_sum_of_squares_in_the_same_pass():
    step = jax.jit(functools.partial(host_kernel.step, decoupled=True, squares=True))
    scalars = undo.scalars(HYPER | {"mode": "adamw", "bias_correction": True})
    for n in (0, 1, 40000):
        p, m, v, g = bucket(n)
        sums = [step((p, m, v), g, scalars)[2] for _ in range(3)]
        np.testing.assert_allclose(sums[0], np.sum(np.square(g, dtype=np.float64)), rtol=1e-6)
        assert sums[0] == sums[1] == sums[2]  # threads come and go, the order stays


def test_in_place_when_donated():
    step = jax.jit(functools.partial(fused_adamw, backend="ffi", emit_dtype=None), donate_argnums=(0, 1, 2))
    arrays = [jax.ShapeDtypeStruct((1 << 16,), jnp.float32)] * 4
    compiled = step.lower(*arrays, count=0, lr=1e-3).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 3 * 4 << 16
    assert memory.temp_size_in_bytes < 4096
    given = [jnp.ones(1 << 16) for _ in range(4)]
    where = [x.unsafe_buffer_pointer() for x in given[:3]]
    assert [x.unsafe_buffer_pointer() for x in step(*given, count=0, lr=1e-3)[:3]] == where
    assert given[0].is_deleted()


def test_called_by_itself_it_leaves_its_inputs_alone():
    given = [jnp.ones(10) for _ in range(4)]
    fused_adamw(*given, count=0, lr=1e-3, backend="ffi")
    for x in given:
        np.testing.assert_array_equal(x, 1)


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not compiled yet."""
    monkeypatch.setattr(host_kernel, "_state", {})
    host_adam._ffi_loads.cache_clear()
    yield
    host_adam._ffi_loads.cache_clear()


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arrays = [jnp.ones(4)] * 4
    with pytest.raises(RuntimeError, match=r"no-such-compiler.*backend='xla'"):
        fused_adamw(*arrays, count=0, lr=1e-3, backend="ffi")
    with pytest.warns(UserWarning, match="falls back to backend='xla'") as warned:
        got = [fused_adamw(*arrays, count=0, lr=1e-3) for _ in range(2)]
    assert len(warned) == 1
    np.testing.assert_array_equal(got[0][0], fused_adamw(*arrays, count=0, lr=1e-3, backend="xla")[0])


def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'line 1: no room' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match=r"(?s)could not compile host_kernel.cc.*xla.*no room"):
        host_kernel.load()


def test_the_library_is_kept_by_what_it_depends_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(host_kernel, "_cache", lambda: tmp_path / "new")
    monkeypatch.setattr(host_kernel, "_compile", lambda compiler, target: calls.append(target.write_text("made")))
    first = host_kernel._library()
    assert host_kernel._library() == first
    assert len(calls) == 1
    monkeypatch.setattr(host_kernel, "_processor", lambda: "another")
    assert host_kernel._library() != first
    assert len(calls) == 2
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".so"}


def test_nothing_is_compiled_at_import():
    import subprocess
    import sys

    code = "import jaxlab.superoffload.stv as s, sys; assert not s.host_adam.host_kernel._state"
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True)
