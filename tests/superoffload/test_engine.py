"""Training by the engine: the same bits however steps are speculated on, Optax's losses, and what goes wrong."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import superoffload as so
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.superoffload import engine as engine_module
from jaxlab.training import fit

HYPER = so.AdamHyper(optax.linear_schedule(5e-3, 1e-3, 20), 0.9, 0.95, weight_decay=0.1)
BUCKET = 4 * 700


def mlp(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["u"] - y) ** 2)


def mlp_params():
    rng = np.random.default_rng(0)
    made = {"w": rng.normal(size=(8, 16)), "b": np.zeros(16), "u": rng.normal(size=(16, 3))}
    return {name: jnp.asarray(0.5 * x, jnp.float32) for name, x in made.items()}


def mlp_batches(steps, odd=(), dtype=jnp.float32):
    rng = np.random.default_rng(1)
    for i in range(steps):
        x = rng.normal(size=(16, 8))
        x[0, 0] = np.inf if i in odd else x[0, 0]
        yield jnp.asarray(x, dtype), jnp.ones((16, 3), dtype)


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def train(loss, params, batches, optimizer=HYPER, mask=None, **settings):
    """The final state, and the metrics of every step as numbers."""
    config = so.SuperOffloadConfig(**({"bucket_bytes": BUCKET} | settings))
    with so.SuperOffload(loss, optimizer, config, decay_mask=mask) as engine:
        state, rows = engine.init(jax.tree.map(jnp.copy, params)), []
        for batch in batches:
            state, metrics = engine.train_step(state, batch)
            rows.append({name: float(value) for name, value in metrics.items()})
        return jax.tree.map(np.asarray, state), rows, jax.tree.map(np.asarray, engine.master(state))


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


@pytest.fixture(scope="module")
def decoder():
    """A tiny decoder and its loss; its embedding is tied, and lies once in the buckets."""
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Decoder(config)
    params = init_params(model, jax.random.key(0))

    def loss(params, batch):
        tokens, weight = batch
        logits = model.apply({"params": params}, tokens[:, :-1]).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])
        return jnp.mean(losses * weight)

    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 8, (4, 17)))

    def batches():
        for i in range(20):
            yield tokens, jnp.float32(np.inf if i == 7 else 1.0)

    return loss, params, batches


@pytest.mark.latest
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_a_decoder_trains_to_the_same_bits_with_and_without_speculation(decoder):
    loss, params, batches = decoder
    shared = {
        "bucket_bytes": 1 << 15,
        "clip_norm": 0.7,
        "compute_dtype": "float16",
        "loss_scale": so.LossScaleConfig(window=4, hysteresis=1),
    }
    want, rows, master = train(loss, params, batches(), speculation="never", **shared)
    assert int(want.count) == 20 - sum(row["skipped"] for row in rows) < 20
    assert 0 < sum(row["clipped"] for row in rows) < 20
    assert rows[8]["loss_scale"] == rows[7]["loss_scale"] / 2
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert not any(row["rolled_back"] or row["undo_bytes"] for row in rows)
    for undo in ("copy", "residual"):
        got, mine, theirs = train(loss, params, batches(), speculation="always", undo=undo, **shared)
        assert_same(got, want)
        assert_same(theirs, master)
        assert [row["rolled_back"] for row in mine] == [max(row["clipped"], row["skipped"]) for row in rows]
        assert all(row["undo_bytes"] for row in mine)
        for name in ("loss", "grad_norm", "loss_scale", "skipped", "clipped"):
            np.testing.assert_array_equal([row[name] for row in mine], [row[name] for row in rows])


@pytest.mark.parametrize(("backend", "mask"), [("xla", None), ("ffi", matrices)])
def test_follows_optax(backend, mask):
    settings = {"compute_dtype": "float32", "clip_norm": 0.5, "clip_eps": 0.0, "backend": backend, "mask": mask}
    state, rows, master = train(mlp, mlp_params(), mlp_batches(10), **settings)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(HYPER.lr, 0.9, 0.95, weight_decay=0.1, mask=mask))
    params, losses = mlp_params(), []
    opt = tx.init(params)
    step = jax.jit(jax.value_and_grad(mlp))
    for batch in mlp_batches(10):
        value, grads = step(params, batch)
        updates, opt = tx.update(grads, opt, params)
        params, losses = optax.apply_updates(params, updates), [*losses, float(value)]
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), master, params)
    assert_same(state.params, master)


def test_an_optax_transformation_is_an_optimizer():
    tx = optax.sgd(0.05, momentum=0.9)
    settings = {"compute_dtype": "float32", "clip_norm": None}
    state, rows, master = train(mlp, mlp_params(), mlp_batches(5, odd=(2,)), tx, **settings)
    assert (int(state.count), rows[2]["skipped"]) == (4, 1)
    params = mlp_params()
    opt = tx.init(params)
    for i, batch in enumerate(mlp_batches(5)):
        if i != 2:
            updates, opt = tx.update(jax.grad(mlp)(params, batch), opt, params)
            params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), master, params)


def test_pieces_give_what_the_whole_gives():
    fns = (lambda p, batch: jnp.tanh(batch[0] @ p["w"] + p["b"]), lambda p, x: jnp.tanh(x @ p))
    network = so.Segmented(fns, lambda p, x, batch: jnp.mean((x @ p - batch[1]) ** 2))
    params = mlp_params()
    parts = ({"w": params["w"], "b": params["b"]}, jnp.eye(16) * 0.5, params["u"])

    def whole(parts, batch):
        return network.head(parts[2], fns[1](parts[1], fns[0](parts[0], batch)), batch)

    settings = {"compute_dtype": "float32", "bucket_bytes": 4 * 100, "mask": matrices}
    got, rows, master = train(network, parts, mlp_batches(6, odd=(3,)), speculation="always", **settings)
    assert_same(got, train(network, parts, mlp_batches(6, odd=(3,)), speculation="never", **settings)[0])
    want = train(whole, parts, mlp_batches(6, odd=(3,)), **settings)
    np.testing.assert_allclose([r["loss"] for r in rows[:3]], [r["loss"] for r in want[1][:3]], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), master, want[2])
    assert rows[3]["skipped"] == 1


@pytest.mark.parametrize(
    "settings", [{"offload_ratio": 0.5}, {"speculation": "auto"}, {"undo": "off"}, {"split": "param"}]
)
def test_where_and_when_changes_nothing(settings):
    shared = {"clip_norm": 3.0, "bucket_bytes": 4 * 50, "mask": matrices} | (
        {"split": "param"} if "split" in settings else {}
    )
    want = train(mlp, mlp_params(), mlp_batches(4), speculation="never", **shared)
    got = train(mlp, mlp_params(), mlp_batches(4), **({"speculation": "always"} | shared | settings))
    assert_same(got[0], want[0])


@pytest.mark.parametrize("settings", [{"offload_ratio": 0.5}, {"split": "param", "undo": "residual"}])
def test_each_leaf_decays_as_it_is_told(settings):
    """By the bits of an engine in which all leaves do, or none: leaves of two kinds share no bucket."""
    params, grads = mlp_params(), jax.tree.map(jnp.cos, mlp_params())
    config = so.SuperOffloadConfig(bucket_bytes=4 * 100, clip_norm=None, speculation="always", **settings)
    found = []
    for decay, mask in ((0.1, None), (0.0, None), (0.1, {"w": False, "b": False, "u": True}), (0.1, matrices)):
        hyper = so.AdamHyper(1e-2, weight_decay=decay)
        with so.SuperOffload(mlp, hyper, config, decay_mask=mask) as engine:
            state = engine.init(params)
            for _ in range(2):
                state, _ = engine.apply_gradients(state, grads)
            found.append(jax.tree.map(np.array, (engine.master(state), *engine.moments(state))))
    all_do, none_does, *masked = found
    for got, kept in zip(masked, ("wb", "b")):
        for mine, whole, without in zip(got, all_do, none_does):
            assert_same(mine, {name: (without if name in kept else whole)[name] for name in mine})
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(all_do[0]), jax.tree.leaves(none_does[0])))


def test_accumulated_batches_make_one_update_by_their_mean():
    batches = list(mlp_batches(4))
    settings = {"compute_dtype": "float32", "steps_per_update": 2}
    state, rows, master = train(mlp, mlp_params(), batches, **settings)
    assert (int(state.step), int(state.count)) == (4, 2)
    assert [row["grad_norm"] > 0 for row in rows] == [False, True, False, True]
    joined = [jax.tree.map(lambda *x: jnp.concatenate(x), *batches[i : i + 2]) for i in (0, 2)]
    want = train(mlp, mlp_params(), joined, compute_dtype="float32")[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), master, want)


def test_gradients_from_elsewhere_and_frozen_leaves():
    params = mlp_params() | {"ids": jnp.arange(3)}
    config = so.SuperOffloadConfig(bucket_bytes=BUCKET, compute_dtype="float32")
    batch = next(mlp_batches(1))
    with so.SuperOffload(mlp, HYPER, config) as engine:
        state = engine.init(jax.tree.map(jnp.copy, params))
        grads = jax.grad(mlp)({name: params[name] for name in "wbu"}, batch)
        with pytest.raises(ValueError, match=r"missing \['u'\]"):
            engine.apply_gradients(state, {name: params[name] for name in ("w", "b", "ids")})
        state, metrics = engine.apply_gradients(state, grads | {"ids": params["ids"]})
        assert float(metrics["grad_norm"]) > 0
        m, _ = engine.moments(state)
        np.testing.assert_array_equal(m["ids"], params["ids"])
        np.testing.assert_allclose(m["u"], 0.1 * grads["u"] * min(1, 1 / float(metrics["grad_norm"])), rtol=1e-4)
    want = train(mlp, params, [batch], compute_dtype="float32")[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), engine.master(state), want)


def test_a_leaf_that_is_a_bucket_is_not_overwritten():
    """Neither the caller's array nor the live one is memory that a later step takes."""
    params = {"w": jnp.ones(128)}
    settings = {"bucket_bytes": 4 * 128, "compute_dtype": "float32"}
    with so.SuperOffload(lambda p, x: jnp.sum(p["w"] * x), HYPER, so.SuperOffloadConfig(**settings)) as engine:
        state, live = engine.init(params), []
        for _ in range(3):
            state, _ = engine.train_step(state, jnp.ones(128))
            live.append((state.params["w"], np.array(state.params["w"])))
    np.testing.assert_array_equal(params["w"], np.ones(128))
    for array, then in live:
        np.testing.assert_array_equal(array, then)


def test_fit_drives_the_engine():
    with so.SuperOffload(mlp, HYPER, so.SuperOffloadConfig(bucket_bytes=BUCKET)) as engine:
        state = fit(engine.init(mlp_params()), engine.train_step, mlp_batches(3), steps=3)
        assert int(state.step) == int(state.count) == 3
        assert state.params["w"].dtype == jnp.bfloat16


def test_gradients_that_are_not_finite():
    with so.SuperOffload(mlp, HYPER, so.SuperOffloadConfig(nonfinite="raise", undo="residual")) as engine:
        state = engine.init(mlp_params())
        with pytest.raises(FloatingPointError, match="update 1"):
            engine.train_step(state, next(mlp_batches(1, odd=(0,))))
    before = train(mlp, mlp_params(), [])[0]
    after, rows, _ = train(mlp, mlp_params(), mlp_batches(1, odd=(0,)), speculation="always")
    assert_same((after.master, after.params), (before.master, before.params))
    assert rows[0]["skipped"] == rows[0]["rolled_back"] == 1


def test_a_worker_that_dies(monkeypatch):
    def broken(*args, **settings):
        raise ArithmeticError("out of luck")

    with so.SuperOffload(mlp, HYPER, so.SuperOffloadConfig(bucket_bytes=4 * 50, speculation="always")) as engine:
        state = engine.init(mlp_params())
        monkeypatch.setattr(engine_module, "speculate_bucket", broken)
        with pytest.raises(RuntimeError, match=r"(?s)worker died at bucket \d.*ArithmeticError: out of luck"):
            engine.train_step(state, next(mlp_batches(1)))
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.train_step(state, next(mlp_batches(1)))


def test_a_worker_that_takes_too_long(monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(engine_module, "step_bucket", lambda *args, **settings: free.wait(30))
    config = so.SuperOffloadConfig(speculation="never", worker_timeout_s=0.2)
    with so.SuperOffload(mlp, HYPER, config) as engine:
        state = engine.init(mlp_params())
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no result for bucket 0 within 0\.2 s"):
            engine.train_step(state, next(mlp_batches(1)))
        assert time.monotonic() - start < 20
        free.set()


@pytest.mark.usefixtures("unchecked")
def test_misuse():
    config = so.SuperOffloadConfig()
    with pytest.raises(NotImplementedError, match="undo='residual'"):
        so.SuperOffload(mlp, optax.sgd(0.1), so.SuperOffloadConfig(undo="residual"))
    with pytest.raises(TypeError, match="optimizer: expected"):
        so.SuperOffload(mlp, 1e-3, config)
    with pytest.raises(ValueError, match="decay_mask: expected None"):
        so.SuperOffload(mlp, optax.sgd(0.1), config, decay_mask=matrices)
    engine = so.SuperOffload(mlp, HYPER, config, decay_mask={"w": True})
    with engine, pytest.raises(ValueError, match="decay_mask: expected a tree of bools"):
        engine.init(mlp_params())
    with so.SuperOffload(mlp, HYPER, config) as engine:
        with pytest.raises(RuntimeError, match="call init first"):
            engine.train_step(None, None)
        state = engine.init(mlp_params())
    with pytest.raises(RuntimeError, match="has been closed"):
        engine.train_step(state, next(mlp_batches(1)))
    pieces = so.SuperOffload(so.Segmented((mlp,), mlp), HYPER, config)
    with pieces, pytest.raises(ValueError, match="params: expected a tuple of 2"):
        pieces.init((1,))
    with so.SuperOffload(mlp, optax.sgd(0.1), config) as engine, pytest.raises(TypeError, match=r"state\.opt_state"):
        engine.moments(engine.init(mlp_params()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "settings",
    [
        {"bucket_bytes": 2},
        {"bucket_bytes": 10},
        {"split": "leaf"},
        {"clip_norm": 0},
        {"clip_eps": -1},
        {"speculation": "sometimes"},
        {"undo": "log"},
        {"backend": "numba"},
        {"compute_dtype": "int8"},
        {"steps_per_update": 0},
        {"offload_ratio": 1.5},
        {"nonfinite": "ignore"},
        {"cpu_cores_share": 0},
        {"cpu_cores_share": 1.1},
        {"worker_timeout_s": 0},
    ],
)
def test_bad_configs(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value!r}"):
        so.SuperOffloadConfig(**settings)
