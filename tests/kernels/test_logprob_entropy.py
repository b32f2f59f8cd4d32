import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.logprob_entropy import api, logprob_entropy, triton, xla
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import compare
from tests.oracles import logprob_entropy as oracle

# N, d, V, and the size of a logit.
CASES = {
    "one tile": (7, 5, 11, 1),
    "ragged tiles": (70, 40, 300, 3),
    "whole tiles, peaked": (64, 16, 256, 8),
    "one row": (1, 1, 2, 1),
}
TEMPERATURE = 0.7


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 rows and 128 columns, and few programs, so that small problems have several of each."""
    for module in (xla, triton):
        monkeypatch.setattr(module, "_ROWS", 32)
        monkeypatch.setattr(module, "_TILE", 32 * 128)
    monkeypatch.setattr(triton, "_PROGRAMS", 4)


def _inputs(name, dtype=jnp.float32, weights=None):
    rng = np.random.default_rng(0)
    n, d, v, size = CASES[name]
    hidden, head = size * rng.normal(size=(n, d)), rng.normal(size=(d, v)) / np.sqrt(d)
    targets = rng.integers(0, v, n)
    targets[: n // 2] = np.arange(max(0, v - 128), v)[: n // 2]  # of the last tile, and of the one before where ragged
    args = jnp.asarray(hidden, dtype), jnp.asarray(head, weights or dtype), jnp.asarray(targets, jnp.int32)
    return args, tuple(jnp.asarray(x) for x in rng.normal(size=(3, n)).astype(np.float32))


@functools.partial(jax.jit, static_argnames="implementation")
def _run(args, cotangents, implementation=None, temperature=TEMPERATURE):
    hidden, head, targets = args

    def of(hidden, head, temperature):
        return tuple(logprob_entropy(hidden, head, targets, temperature=temperature, implementation=implementation))

    out, pullback = jax.vjp(of, hidden, head, jnp.asarray(temperature, jnp.promote_types(hidden.dtype, jnp.float32)))
    return *out, *pullback(tuple(x.astype(y.dtype) for x, y in zip(cotangents, out)))


def _exact(args, cotangents):
    hidden, head = (np.asarray(x, np.float64) for x in args[:2])
    rest = np.asarray(args[2]), TEMPERATURE
    cotangents = [np.asarray(x, np.float64) for x in cotangents]
    return *oracle.logprob_entropy(hidden, head, *rest), *oracle.gradients(hidden, head, *rest, *cotangents)


def _compare(got, want, values, gradients):
    compare(got[:3], want[:3], values, values)
    compare(got[3:], [np.asarray(x) for x in want[3:]], gradients, gradients)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_through_each(name, implementation):
    args, cotangents = _inputs(name)
    nothing = jnp.zeros_like(cotangents[0])
    each = [tuple(x if i == j else nothing for j, x in enumerate(cotangents)) for i in range(3)]
    for given in (*each, cotangents):
        _compare(_run(args, given, implementation), _exact(args, given), 5e-6, 1e-4)


@pytest.mark.latest
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "weights", "implementation"),
    [
        *(("ragged tiles", jnp.bfloat16, implementation) for implementation in ("reference", "xla", "interpret")),
        *(("one tile", jnp.float32, implementation) for implementation in ("xla", "interpret")),
    ],
)
def test_bfloat16_has_float32_sums(name, weights, implementation):
    args, cotangents = _inputs(name, jnp.bfloat16, weights)
    got = _run(args, cotangents, implementation)
    assert [x.dtype for x in got] == [jnp.float32] * 3 + [jnp.bfloat16, weights, jnp.float32]
    _compare(got, _exact(args, cotangents), 1e-5, 1e-2)


def test_float64():
    with jax.enable_x64(True):
        args, cotangents = _inputs("one tile", jnp.float64)
        _compare(_run(args, cotangents), _exact(args, cotangents), 1e-12, 1e-11)
        args, cotangents = _inputs("one tile")
        _compare(_run(args, cotangents, "interpret"), _exact(args, cotangents), 5e-6, 5e-5)
        with pytest.raises(NotImplementedError, match="got float64"):
            logprob_entropy(args[0], args[1].astype(jnp.float64), args[2], implementation="interpret")


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_targets_outside_the_vocabulary(implementation):
    (hidden, head, _), cotangents = _inputs("one tile")
    args = hidden, head, jnp.array([-1, 11, -100, 2**31 - 1, 0, 10, 3], jnp.int32)
    got, want = _run(args, cotangents, implementation), _exact(args, cotangents)
    assert np.isneginf(got[0][:4]).all()
    _compare((got[0][4:], *got[1:]), (want[0][4:], *want[1:]), 5e-6, 5e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_integers_of_any_width(dtype):
    """2**32 in 64 bits is no target, and a narrow type need not reach the vocabulary's end."""
    with jax.enable_x64(dtype == np.int64):
        targets = np.array([0, 100, 299 if dtype in (np.uint32, np.int64) else 101], dtype)
        targets = np.append(targets, np.array(2**32 if dtype == np.int64 else np.iinfo(dtype).max, dtype))
        hidden, head = np.ones((4, 2), np.float32), np.tile(np.linspace(0, 1, 300, dtype=np.float32), (2, 1))
        want, _, _ = oracle.logprob_entropy(hidden, head, targets.astype(object), 1.0)
        np.testing.assert_allclose(logprob_entropy(hidden, head, targets).logp, want, rtol=1e-5)


def test_no_rows():
    args = jnp.ones((0, 3)), jnp.ones((3, 4), jnp.bfloat16), jnp.ones(0, jnp.int32)
    out, pullback = jax.vjp(lambda *args: logprob_entropy(*args, targets=jnp.ones(0, jnp.int32)), *args[:2])
    assert [(x.shape, x.dtype) for x in out] == [((0,), jnp.float32)] * 3
    d_hidden, d_head = pullback(out)
    assert d_hidden.shape == (0, 3)
    assert not np.asarray(d_head, np.float32).any()


def test_other_temperatures_compile_nothing():
    args, cotangents = _inputs("one tile")
    first = logprob_entropy(*args, temperature=1.0)
    logprob_entropy(*args, temperature=jnp.float32(1.0))
    before = api._jitted._cache_size()
    for temperature in (0.5, 2.0):
        made = logprob_entropy(*args, temperature=temperature)
        np.testing.assert_allclose(made.lse, logprob_entropy(args[0] / temperature, *args[1:]).lse, rtol=1e-5)
        assert not np.allclose(made.entropy, first.entropy)
    assert api._jitted._cache_size() == before
    _run(args, cotangents, temperature=0.5)
    traced = _run._cache_size()
    _run(args, cotangents, temperature=2.0)
    assert _run._cache_size() == traced


@pytest.mark.latest
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices(check_vma):
    args, cotangents = _inputs("whole tiles, peaked")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("data"), P(), P("data")

    def of(hidden, head, temperature, op=logprob_entropy):
        def local(hidden, head, targets, temperature):
            return tuple(op(hidden, head, targets, temperature=temperature))

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(*specs, P()), out_specs=(P("data"),) * 3, check_vma=check_vma
        )
        return sharded(hidden, head, args[2], temperature)

    out, pullback = jax.jit(functools.partial(jax.vjp, of))(*args[:2], jnp.float32(TEMPERATURE))
    _compare((*out, *jax.jit(pullback)(cotangents)), _exact(args, cotangents), 5e-6, 5e-5)
    if check_vma:
        with pytest.raises(NotImplementedError, match="check_vma"):
            of(*args[:2], jnp.float32(1), functools.partial(logprob_entropy, implementation="interpret"))


@pytest.mark.usefixtures("small_tiles")
def test_arrays_that_xla_itself_lays_over_a_mesh():
    args, cotangents = _inputs("ragged tiles")
    args, cotangents = (args[0][:64], args[1], args[2][:64]), tuple(x[:64] for x in cotangents)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)
    place = [NamedSharding(mesh, spec) for spec in (P("data"), P(None, "tensor"), P("data"))]
    spread = [jax.device_put(x, where) for x, where in zip(args, place)]

    @jax.jit
    def of(hidden, head, targets, cotangents):
        @jax.checkpoint
        def values(hidden, head):
            return tuple(logprob_entropy(hidden, head, targets, temperature=TEMPERATURE))

        out, pullback = jax.vjp(values, hidden, head)
        return *out, *pullback(cotangents)

    _compare(of(*spread, cotangents), _exact(args, cotangents)[:-1], 5e-6, 5e-5)


HIDDEN, HEAD, TARGETS = jnp.ones((4, 3)), jnp.ones((3, 2)), jnp.zeros(4, jnp.int32)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((HIDDEN[0], HEAD, TARGETS), {}, ValueError, r"hidden: expected 2 axes \[N, d\], got shape \(3,\)"),
        ((HIDDEN, HEAD[0], TARGETS), {}, ValueError, r"head: expected 2 axes \[d, V\], got shape \(2,\)"),
        ((HIDDEN[:, :0], HEAD[:0], TARGETS), {}, ValueError, r"hidden: .* d at least 1, got shape \(4, 0\)"),
        ((HIDDEN, HEAD[:2], TARGETS), {}, ValueError, r"head: expected shape \[3, V\] .*\(4, 3\), got \(2, 2\)"),
        ((HIDDEN, HEAD[:, :0], TARGETS), {}, ValueError, r"head: expected .* V at least 1 .*\(3, 0\)"),
        ((HIDDEN, HEAD, TARGETS[:3]), {}, ValueError, r"targets: expected shape \(4,\), got \(3,\)"),
        ((HIDDEN, HEAD, TARGETS[:, None]), {}, ValueError, r"targets: expected shape \(4,\), got \(4, 1\)"),
        ((HIDDEN, HEAD, HIDDEN[:, 0]), {}, TypeError, "targets: expected integers, got float32"),
        ((HIDDEN, HEAD, TARGETS > 0), {}, TypeError, "targets: expected integers, got bool"),
        ((TARGETS[:, None], HEAD[:1], TARGETS), {}, TypeError, "hidden: expected a floating dtype, got int32"),
        ((HIDDEN, HEAD.astype(int), TARGETS), {}, TypeError, "head: expected a floating dtype, got int32"),
        ((HIDDEN, HEAD, TARGETS), {"temperature": 0}, ValueError, "temperature: expected a positive .* got 0"),
        ((HIDDEN, HEAD, TARGETS), {"temperature": jnp.float32(-1)}, ValueError, "temperature: .* got -1"),
        ((HIDDEN, HEAD, TARGETS), {"temperature": float("nan")}, ValueError, "temperature: .* got nan"),
        ((HIDDEN, HEAD, TARGETS), {"temperature": float("inf")}, ValueError, "temperature: .* got inf"),
        ((HIDDEN, HEAD, TARGETS), {"temperature": jnp.ones(4)}, ValueError, r"temperature: .* got shape \(4,\)"),
        ((HIDDEN, HEAD, TARGETS), {"implementation": "cuda"}, ValueError, "unknown implementation 'cuda'.*reference"),
        ((HIDDEN, HEAD, TARGETS), {"implementation": "triton"}, NotImplementedError, "logprob_entropy.*'cpu'.*xla"),
    ],
)  # fmt: skip
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        logprob_entropy(*args, **settings)


def _abstract(n, d, v, dtype):
    array = jax.ShapeDtypeStruct
    args = array((n, d), dtype), array((d, v), dtype), array((n,), jnp.int32)
    return args, (array((n,), jnp.float32),) * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_on_a_cpu(dtype):
    """A quarter of the logits alone; the naive form holds them four times over for both gradients."""
    args, cotangents = _abstract(1024, 576, 49152, dtype)
    compiled = _run.lower(args, cotangents).compile()
    bits = 2 * 576 * 49152 if dtype == jnp.bfloat16 else 0  # the head's gradient as integers, and as numbers
    assert compiled.memory_analysis().temp_size_in_bytes <= 1024 * 49152 * 4 // 4 + bits


def test_a_small_problem_is_one_tile():
    for n, d, v in ((64, 128, 2**14), (1024, 576, 2048), (8, 2048, 1024)):
        rows, columns = xla.tile(jnp.zeros((n, d)), jnp.zeros((d, v)), xla._ROWS, xla._TILE)
        assert rows >= n
        assert columns >= v


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_a_vocabulary_of_one(implementation):
    args = jnp.full((3, 2), 5.0), jnp.ones((2, 1)), jnp.zeros(3, jnp.int32)
    got = _run(args, (jnp.ones(3), jnp.ones(3), jnp.zeros(3)), implementation)
    for each, want in zip(got, (0, 0, 10 / TEMPERATURE, 0, 0, 0), strict=True):
        np.testing.assert_allclose(each, want, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_for_gpus_that_are_not_there(platform, implementation):
    args, cotangents = _inputs("one tile", jnp.bfloat16)
    text = _run.trace(args, cotangents, implementation).lower(lowering_platforms=(platform,)).as_text()
    for kernel in ("logprob_entropy", "logprob_entropy_slopes"):
        assert f'"{kernel}"' in text


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "gradients"),
    [
        ((1024, 576, 49152), jnp.bfloat16, 0.6, 40),
        ((2048, 1536, 151936), jnp.bfloat16, 0.6, 56),
        ((1024, 576, 49152), jnp.float32, 0.3, 36),
    ],
)
def test_compiled_for_h100(shape, dtype, forward, gradients):
    """Bars in MiB: four numbers a row and share; a tile of 16 MiB, the head's columns beside it and their gradient."""
    from jaxlab.core import plan

    args, cotangents = _abstract(*shape, dtype)

    def backward(args, cotangents):
        return _run(args, cotangents)[3:5]

    compiled = functools.partial(plan.compile, target=plan.target("h100"))
    made = (
        compiled(logprob_entropy, *args, labels=["input"] * 3),
        compiled(backward, args, cotangents, labels=["input"] * 2),
    )
    for each, most in zip(made, (forward, gradients)):
        assert each.bytes["temporaries"] <= most * 2**20
    kernels = [kernel for each in made for kernel in each.kernels]
    assert [kernel.name for kernel in kernels] == ["logprob_entropy", "logprob_entropy", "logprob_entropy_slopes"]
    for kernel in kernels:
        assert any(name.startswith("wgmma.mma") for name in kernel.ptx_instructions), kernel.name
        assert kernel.ptx_instructions["cp.async.cg.shared.global"], kernel.name
        assert kernel.spill_bytes == 0, kernel.name
