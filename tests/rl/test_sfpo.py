"""Slow-fast updates: both forms against float64 loops, against one another, inside Optax, and when turned off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.rl import make_pass, sfpo, sfpo_update
from jaxlab.rl.losses import Mean
from jaxlab.rl.slow_fast import slow_fast
from tests.oracles import slow_fast as oracle

ROWS, DIM = 8, 3


def data(dtype=np.float32):
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((ROWS, DIM)).astype(dtype),
        "y": random.standard_normal(ROWS).astype(dtype),
        "mask": (np.arange(ROWS) % 3 > 0).astype(dtype),
    }


def loss(params, batch):
    residual = batch["x"] @ params["w"] - batch["y"]
    return 0.5 * jnp.mean(residual**2), {"error": jnp.mean(jnp.abs(residual))}


def start(dtype=jnp.float32):
    return {"w": jnp.asarray([0.3, -0.2, 0.9], dtype)}


def adamw(lr=3e-2):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.1))


def cycle(one_pass, params, state, batch, passes, **extra):
    """The transformation's way through a step: the same batch so many times."""
    metrics = None
    for _ in range(passes):
        params, state, metrics = one_pass(params, state, batch, **extra)
    return params, state, metrics


def same(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def bitwise(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.latest
@pytest.mark.parametrize(("inner_steps", "alpha"), [(1, 1.0), (3, 0.8), (2, 0.0)])
def test_sgd_on_a_quadratic(inner_steps, alpha):
    """Spec, section 2.4."""
    with jax.enable_x64(True):
        random = np.random.default_rng(1)
        root = random.standard_normal((DIM, DIM))
        hessian, error = root @ root.T, random.standard_normal(DIM)
        one_pass = make_pass(lambda e, _: (0.5 * e @ hessian @ e, {}), optax.sgd(0.05))
        got, _, _ = sfpo_update(
            one_pass, jnp.asarray(error), optax.sgd(0.05).init(error), {"rows": np.zeros(1)},
            inner_steps=inner_steps, alpha=alpha,
        )  # fmt: skip
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, oracle.quadratic_error(hessian, error, 0.05, inner_steps, alpha), rtol=1e-12)


@pytest.mark.parametrize("policy", ["carry", "reset_fast"])
def test_adamw_against_a_float64_loop(policy):
    """Three steps of K = 2, M = 2 with clipping and decay, the second of them turned off; both forms."""
    with jax.enable_x64(True):
        batch, params = data(np.float64), start(jnp.float64)
        options = {
            "mini_batches": 2,
            "lr": 3e-2,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "reset": policy == "reset_fast",
        }
        one_pass = make_pass(loss, adamw(), mini_batches=2)
        fused = jax.jit(
            lambda p, s, active: sfpo_update(
                one_pass, p, s, batch, inner_steps=2, alpha=0.7, active=active, state_policy=policy
            )
        )
        tx = sfpo(adamw(), 2, 0.7, 2, state_policy=policy)
        wrapped = jax.jit(make_pass(loss, tx, mini_batches=2))
        w, moments = np.array(params["w"]), (np.zeros(DIM), np.zeros(DIM), 0)
        ours, state = params, adamw().init(params)
        theirs, wrapped_state = params, tx.init(params)
        for active in (True, False, True):
            w, moments, mean = oracle.adamw_step(
                w, moments, batch["x"], batch["y"], inner_steps=2 if active else 0, alpha=0.7, **options
            )
            ours, state, metrics = fused(ours, state, active)
            passes = 3 if active else 1
            theirs, wrapped_state, last = cycle(wrapped, theirs, wrapped_state, batch, passes, active=active)
            np.testing.assert_allclose(ours["w"], w, rtol=1e-7)  # optax's moments have its eps in another place
            np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-7)
            same(theirs, ours, rtol=1e-14)
            same(last, metrics, rtol=1e-14)
            assert int(wrapped_state.count) == 0


def test_both_forms_are_the_same_arithmetic():
    """Bit for bit where operations run one by one; XLA may contract them differently in two programs."""
    batch, params = data(), start()
    inner = optax.sgd(0.1, momentum=0.9)
    tx = sfpo(inner, 2, 0.8, 2)
    with jax.disable_jit():
        one_pass = make_pass(loss, inner, mini_batches=2)
        want = sfpo_update(one_pass, params, inner.init(params), batch, inner_steps=2, alpha=0.8)
        got = cycle(make_pass(loss, tx, mini_batches=2), params, tx.init(params), batch, 3)
    bitwise((got[0], got[1].inner_state, got[2]), want)


def test_alpha_and_active_change_without_compiling_again():
    batch, params = data(), start()
    one_pass, tx = make_pass(loss, adamw(), mini_batches=2), sfpo(adamw(), 2, updates_per_pass=2)
    fused = jax.jit(lambda p, s, alpha, active: sfpo_update(
        one_pass, p, s, batch, inner_steps=2, alpha=alpha, active=active))  # fmt: skip
    wrapped = jax.jit(make_pass(loss, tx, mini_batches=2))
    ours, state = params, adamw().init(params)
    theirs, wrapped_state = params, tx.init(params)
    for alpha, active in ((0.8, True), (0.5, True), (0.5, False), (1.0, True)):
        ours, state, metrics = fused(ours, state, alpha, active)
        passes = 3 if active else 1
        theirs, wrapped_state, last = cycle(wrapped, theirs, wrapped_state, batch, passes, alpha=alpha, active=active)
        same((theirs, wrapped_state.inner_state, last), (ours, state, metrics), rtol=1e-5)
    assert fused._cache_size() == wrapped._cache_size() == 1


def test_alpha_one_and_zero_are_plain_passes():
    """Alpha 1 is K + 1 passes; off is one pass of a stateful optimiser, which alpha 0 is not."""
    batch, params = data(), start()
    one_pass = make_pass(loss, adamw())
    step = jax.jit(lambda alpha, active: sfpo_update(
        one_pass, params, adamw().init(params), batch, inner_steps=2, alpha=alpha, active=active))  # fmt: skip
    plain = jax.jit(one_pass)
    three = cycle(plain, params, adamw().init(params), batch, 3)
    once = cycle(plain, params, adamw().init(params), batch, 1)
    same(step(1.0, True), three, rtol=1e-6)
    same(step(0.8, False), once, rtol=1e-6)
    assert np.max(np.abs(step(0.0, True)[0]["w"] - once[0]["w"])) > 1e-4
    repeated = jax.jit(lambda passes: slow_fast(
        one_pass, params, adamw().init(params), batch, fast_passes=passes, alpha=0.8, active=False))  # fmt: skip
    same(repeated(2), three, rtol=1e-6)
    same(repeated(0), once, rtol=1e-6)


def test_active_changes_take_effect_with_the_next_cycle():
    batch, params = data(), start()
    tx = sfpo(optax.adam(1e-2), 2, 0.5)
    one_pass = jax.jit(make_pass(loss, tx))

    def run(flags):
        p, state, counts = params, tx.init(params), []
        for active in flags:
            p, state, _ = one_pass(p, state, batch, active=active)
            counts.append(int(state.count))
        return p, counts

    steady, counts = run([True] * 3 + [False] * 2)
    assert counts == [1, 2, 0, 0, 0]
    changed, counts = run([True, False, False, False, False])
    assert counts == [1, 2, 0, 0, 0]
    bitwise(changed, steady)


def test_a_cycle_starts_from_the_parameters_it_is_given():
    batch = data()
    tx = sfpo(optax.sgd(0.1), 1, 0.5)
    one_pass = jax.jit(make_pass(loss, tx))
    state = cycle(one_pass, start(), tx.init(start()), batch, 2)[1]
    elsewhere = {"w": jnp.asarray([5.0, 5.0, 5.0])}
    bitwise(cycle(one_pass, elsewhere, state, batch, 2)[0], cycle(one_pass, elsewhere, tx.init(elsewhere), batch, 2)[0])


def many():
    return {"w": start()["w"], "frozen": jnp.asarray([0.0, 1.5, -jnp.inf]), "bias": jnp.zeros(())}


def loss_of_many(params, batch):
    value, metrics = loss(params, batch)
    return value + params["bias"] ** 2 + 0.1 * params["bias"], metrics


LABELS = {"w": "trained", "frozen": "frozen", "bias": "other"}


@pytest.mark.parametrize("outside", [True, False])
def test_frozen_leaves_under_multi_transform(outside):
    """SFPO around groups, and groups around SFPO: both leave frozen leaves alone; the second keeps no copy of them."""

    def groups(wrap):
        return optax.multi_transform(
            {"trained": wrap(adamw()), "other": wrap(optax.sgd(0.1)), "frozen": optax.set_to_zero()}, LABELS
        )

    batch, params = data(), many()
    tx = sfpo(groups(lambda tx: tx), 2, 0.6) if outside else groups(lambda tx: sfpo(tx, 2, 0.6))
    got, state, _ = cycle(jax.jit(make_pass(loss_of_many, tx)), params, tx.init(params), batch, 3)
    plain = groups(lambda tx: tx)
    fused = jax.jit(functools.partial(sfpo_update, make_pass(loss_of_many, plain), inner_steps=2, alpha=0.6))
    want = fused(params, plain.init(params), batch)[0]
    same(got, want, rtol=1e-6)
    bitwise(got["frozen"], params["frozen"])
    copies = sum(leaf.shape == (DIM,) for leaf in jax.tree.leaves(state))
    assert copies == (2 + 2 if outside else 2 + 1)  # Adam's two moments of w, and the anchors


def test_inside_chain_and_masked():
    batch, params = data(), many()
    mask = {"w": True, "frozen": False, "bias": True}
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), {name: not used for name, used in mask.items()}),
        optax.clip_by_global_norm(1.0),
        optax.masked(sfpo(optax.adamw(3e-2, weight_decay=0.1), 2), mask),
    )
    inner = optax.chain(
        optax.masked(optax.set_to_zero(), {name: not used for name, used in mask.items()}),
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(3e-2, weight_decay=0.1), mask),
    )
    got = cycle(jax.jit(make_pass(loss_of_many, tx)), params, tx.init(params), batch, 3, alpha=0.6)[0]
    fused = jax.jit(functools.partial(sfpo_update, make_pass(loss_of_many, inner), inner_steps=2, alpha=0.6))
    same(got, fused(params, inner.init(params), batch)[0], rtol=1e-6)
    bitwise(got["frozen"], params["frozen"])


def test_a_learning_rate_for_each_step():
    """As the module's docstring says: injected, and set before each step; alpha can be injected too."""
    batch, params = data(), start()
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    step = jax.jit(functools.partial(sfpo_update, make_pass(loss, inner), inner_steps=2, alpha=0.5))
    got, state = params, inner.init(params)
    for lr in (0.1, 0.02):
        state = optax.tree.set(state, learning_rate=jnp.asarray(lr))
        got, state, _ = step(got, state, batch)
    want = params
    for lr in (0.1, 0.02):
        plain = optax.sgd(lr)
        want = sfpo_update(make_pass(loss, plain), want, plain.init(want), batch, inner_steps=2, alpha=0.5)[0]
    same(got, want, rtol=1e-6)
    assert step._cache_size() == 1

    injected = optax.inject_hyperparams(sfpo, static_args=("inner_steps", "updates_per_pass"))(inner, 2, alpha=0.9)
    one_pass, got, state = jax.jit(make_pass(loss, injected)), params, injected.init(params)
    for lr in (0.1, 0.02):
        state = optax.tree.set(state, learning_rate=jnp.asarray(lr), alpha=jnp.asarray(0.5))
        got, state, _ = cycle(one_pass, got, state, batch, 3)
    same(got, want, rtol=1e-6)


def test_schedules_and_extra_arguments_reach_the_inner_transformation():
    counted = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda grads, state, params, *, factor: (jax.tree.map(lambda g: -factor * g, grads), state + 1),
    )
    batch, params = data(), start()
    tx = sfpo(counted, 1, 1.0)
    got, state, _ = cycle(jax.jit(make_pass(loss, tx)), params, tx.init(params), batch, 2, factor=0.1)
    same(got, cycle(make_pass(loss, optax.sgd(0.1)), params, optax.sgd(0.1).init(params), batch, 2)[0], rtol=1e-6)
    assert float(state.inner_state) == 2


def test_bfloat16_parameters_are_moved_in_float32():
    """The point between is rounded once; both forms agree, the jump in bf16 updates would not land there."""
    batch = data()
    params = {"w": jnp.asarray([1.0, -3.0, 0.01], jnp.bfloat16)}
    inner, alpha = optax.sgd(0.5), 0.3
    tx = sfpo(inner, 2, alpha)
    plain = jax.jit(make_pass(loss, inner))
    fast = cycle(plain, params, inner.init(params), batch, 2)[0]
    slow64, fast64 = (np.asarray(tree["w"], np.float64) for tree in (params, fast))
    between = {"w": jnp.asarray(slow64 + alpha * (fast64 - slow64), jnp.bfloat16)}
    wrapped = jax.jit(make_pass(loss, tx))
    landed, state, _ = cycle(wrapped, params, tx.init(params), batch, 2)
    bitwise(landed, between)
    assert landed["w"].dtype == jnp.bfloat16
    fused = sfpo_update(make_pass(loss, inner), params, inner.init(params), batch, inner_steps=2, alpha=alpha)[0]
    bitwise(wrapped(landed, state, batch)[0], fused)


def test_far_jumps_land_to_an_ulp():
    """Optax adds, so that what lies far from the weight as it is cannot be reached exactly."""
    tx = sfpo(optax.sgd(1.0), 1, 0.1)
    params = jnp.asarray([1e-6, 3.0, -7.0], jnp.float32)
    updates, state = tx.update(jnp.asarray([-1.0, -4.0, -21.0]), tx.init(params), params)
    target = np.asarray(params, np.float64) + 0.1 * np.array([1.0, 4.0, 21.0])
    got = optax.apply_updates(params, updates)
    np.testing.assert_allclose(got, target, rtol=3e-7)
    assert int(state.count) == 1


def test_micro_batches_of_masked_means_are_exact():
    """Rows are masked unevenly: a mean of the micro-batches' means is another number, their sums are not."""
    batch, params = data(), start()

    def sums(params, batch):
        squared = (batch["x"] @ params["w"] - batch["y"]) ** 2
        weight = jnp.sum(batch["mask"])
        return Mean(jnp.sum(squared * batch["mask"]), weight), {
            "masked": Mean(jnp.sum(batch["y"] * batch["mask"]), weight)
        }

    def means(params, batch):
        return jax.tree.map(lambda mean: mean.value, sums(params, batch), is_leaf=lambda x: isinstance(x, Mean))

    def run(loss_fn, micro_batches):
        one_pass = make_pass(loss_fn, optax.sgd(0.1), mini_batches=2, micro_batches=micro_batches)
        return jax.jit(one_pass)(params, optax.sgd(0.1).init(params), batch)

    want = run(means, 1)
    same(run(sums, 1), want, rtol=1e-6)
    same(run(sums, 4), want, rtol=1e-6)
    assert np.max(np.abs(run(means, 4)[0]["w"] - want[0]["w"])) > 1e-3
    whole = run(loss, 1)  # without a mask equal weights are right
    same(run(loss, 4), whole, rtol=1e-5)


def test_mini_batches_are_contiguous_and_metrics_their_average():
    batch, params = data(), start()
    inner = optax.sgd(0.1)
    got, _, metrics = jax.jit(make_pass(loss, inner, mini_batches=4))(params, inner.init(params), batch)
    want, losses, norms = np.asarray(params["w"], np.float64), [], []
    for rows in np.split(np.arange(ROWS), 4):
        value, grad = oracle.least_squares(want, batch["x"][rows], batch["y"][rows])
        want = want - 0.1 * grad
        losses.append(value)
        norms.append(np.linalg.norm(grad))
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.mean(norms), rtol=1e-5)
    assert set(metrics) == {"loss", "grad_norm", "error", "skipped"}


def test_updates_that_are_not_finite_are_skipped_and_counted():
    """One mini-batch of two, in each of three passes; what is left is the step on the other."""
    batch, params = data(), start()
    spoiled = {**batch, "y": np.where(np.arange(ROWS) < ROWS // 2, np.nan, batch["y"]).astype(np.float32)}
    good = jax.tree.map(lambda leaf: leaf[ROWS // 2 :], batch)
    tx = adamw()

    def step(batch, mini_batches):
        one_pass = make_pass(loss, tx, mini_batches=mini_batches)
        return jax.jit(lambda batch: sfpo_update(one_pass, params, tx.init(params), batch, inner_steps=2))(batch)

    got, want = step(spoiled, 2), step(good, 1)
    assert int(got[2].pop("skipped")) == 3
    assert int(want[2].pop("skipped")) == 0
    same(got, want, rtol=1e-6)
    nothing = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), batch)
    left, state, metrics = step(nothing, 2)
    bitwise((left, state), (params, tx.init(params)))
    assert int(metrics["skipped"]) == 6


def test_memory_is_one_copy_of_the_parameters():
    """Bar of the spec, section 7: arguments and temporaries of the step over those of a single pass."""
    size = 512 * 512
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((4, 512), jnp.float32)}
    inner = adamw()
    state = jax.eval_shape(inner.init, params)
    one_pass = make_pass(lambda p, b: (jnp.mean((b["x"] @ p["w"]) ** 2), {}), inner, mini_batches=2)

    def bytes_of(function):
        compiled = jax.jit(function, donate_argnums=(0, 1)).lower(params, state, batch).compile()
        analysis = compiled.memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + outputs

    more = bytes_of(functools.partial(sfpo_update, one_pass, inner_steps=3, alpha=0.8)) - bytes_of(one_pass)
    assert more <= 1.02 * 4 * size


def test_state_shares_no_buffer_with_the_parameters():
    """Both can be donated, and the anchor lies where the parameters do."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.arange(4.0), where)}
    tx = sfpo(optax.adam(1e-2), 1, state_policy="reset_fast")
    state = tx.init(params)
    assert state.slow["w"].sharding == where
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update, donate_argnums=(1, 2))(grads, state, params)
    assert np.all(np.isfinite(updates["w"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_steps": 0}, "inner_steps: expected an integer of at least 1, got 0"),
        ({"inner_steps": 1.5}, "inner_steps: .* got 1.5"),
        ({"alpha": -0.1}, r"alpha: expected a value in \[0, 1\] .* got -0.1"),
        ({"alpha": 1.1}, "alpha: .* got 1.1"),
        ({"alpha": float("nan")}, "alpha: .* got nan"),
        ({"state_policy": "reset"}, "state_policy: expected one of carry, reset_fast, got 'reset'"),
    ],
)
def test_bad_inputs(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        sfpo(optax.sgd(0.1), **arguments)
    with pytest.raises(ValueError, match=message):
        sfpo_update(lambda *_: None, {}, {}, {}, **arguments)


def test_bad_inputs_of_the_transformation(unchecked):
    with pytest.raises(ValueError, match="updates_per_pass: expected at least 1, got 0"):
        sfpo(optax.sgd(0.1), updates_per_pass=0)
    tx, params = sfpo(optax.sgd(0.1)), start()
    with pytest.raises(ValueError, match="params: sfpo needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"alpha: .* got 2\.0"):
        tx.update(params, tx.init(params), params, alpha=2.0)
    sfpo(optax.sgd(0.1), alpha=1.5, allow_extrapolation=True)


def test_bad_inputs_of_a_pass():
    for name in ("mini_batches", "micro_batches"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            make_pass(loss, optax.sgd(0.1), **{name: 0})
    one_pass = make_pass(loss, optax.sgd(0.1), mini_batches=2, micro_batches=3)
    with pytest.raises(ValueError, match="expected divisors of the batch's 8 rows, got 2 mini-batches of 3"):
        one_pass(start(), optax.sgd(0.1).init(start()), data())
    for batch in ({"x": np.zeros(2), "y": np.zeros(4)}, {"x": np.zeros(2), "y": 1.0}, {}):
        with pytest.raises(ValueError, match="batch: expected leaves with the same number of rows"):
            one_pass(start(), optax.sgd(0.1).init(start()), batch)
