import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.core import Checkpointer
from jaxlab.megafold import objective, train
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.data import synthetic_batch
from jaxlab.megafold.diffusion import precondition
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.objective import LossSettings
from jaxlab.megafold.train import TrainSettings, create_train_state, train_step

KEY = jax.random.key(0)
SIZES = {"max_tokens": 32, "max_atoms": 160, "max_msa_rows": 8, "diffusion_samples": 3}
CONFIG = dataclasses.replace(AF3Config.tiny(), **SIZES, recycles=3)
FAST = TrainSettings(
    learning_rate=0.01, warmup_steps=4, clip_norm=0.1, ema_decay=0.9,
    loss=LossSettings(bond=1.0, pae=1.0, rollout_steps=3),
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}
PARTS = {"mse", "smooth_lddt", "bond", "distogram", "plddt", "pae", "pde", "resolved"}


class Stub(nn.Module):
    """A network of AlphaFold3's methods and 500 weights, for what does not depend on the network."""

    config: AF3Config

    def setup(self):
        self.embed, self.update, self.pairs = nn.Dense(8), nn.Dense(3), nn.Dense(64)
        self.heads = {name: nn.Dense(bins) for name, bins in (("plddt", 50), ("pae", 64), ("pde", 64), ("resolved", 2))}

    def __call__(self, batch, x, sigma):
        trunk = self.trunk(batch, recycles=1)
        denoised = self.denoise(batch, trunk, x, sigma)
        return denoised, self.distogram(trunk), self.confidence(batch, trunk, denoised[:, 0])

    def trunk(self, batch, *, recycles):
        s = self.embed(jax.nn.one_hot(batch["restype"], 32)) * recycles
        if self.has_rng("dropout"):
            s += 0.01 * jax.random.normal(self.make_rng("dropout"), s.shape)
        return s

    def denoise(self, batch, trunk, x, sigma):
        c_skip, c_out, c_in, _ = (c[..., None, None] for c in precondition(sigma))
        s = jax.vmap(lambda s, token: s[token])(trunk, batch["atom_token"])[:, None]
        inputs = jnp.concatenate([x * c_in, jnp.broadcast_to(s, (*x.shape[:-1], 8))], axis=-1)
        return jnp.where(batch["atom_mask"][:, None, :, None], c_skip * x + c_out * self.update(inputs), 0.0)

    def distogram(self, trunk):
        return self.pairs(trunk[:, :, None] + trunk[:, None])

    def confidence(self, batch, trunk, x_pred):
        pair, atom = trunk[:, :, None] + trunk[:, None], x_pred / 16
        return {name: head(pair if name in ("pae", "pde") else atom) for name, head in self.heads.items()}


@pytest.fixture(scope="module")
def forgotten():
    """Programs compiled with the stub are not for others."""
    yield
    train._train_step.clear_cache()


@pytest.fixture
def stub(monkeypatch, forgotten):
    """Puts the stub in the network's place."""

    def initial_params(config, key):
        empty = {name: np.zeros(like.shape, like.dtype) for name, like in abstract_batch(config).items()}
        x, sigma = jnp.zeros((1, 1, config.max_atoms, 3)), jnp.ones((1, 1))
        return jax.jit(Stub(config).init, compiler_options=QUICK)(key, empty, x, sigma)["params"]

    monkeypatch.setattr(objective, "AlphaFold3", Stub)
    monkeypatch.setattr(train, "initial_params", initial_params)


@pytest.fixture(scope="module")
def batch():
    return synthetic_batch(CONFIG, KEY)


def loss_of(settings):
    return functools.partial(objective.objective, config=CONFIG, settings=settings)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_learning_rate_warms_up_and_falls_in_steps():
    steps = np.array([0, 499, 999, 49_999, 50_000, 149_999, 150_000])
    got = [train.learning_rate(TrainSettings(), jnp.int32(step)) for step in steps]
    want = 1.8e-3 * np.minimum((steps + 1) / 1000, 1) * 0.95 ** (steps // 50_000)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert train.learning_rate(TrainSettings(warmup_steps=0, learning_rate=1.0), 0) == 1


@pytest.mark.latest
@pytest.mark.usefixtures("stub")
def test_a_resumed_run_equals_an_uninterrupted_one(batch, tmp_path):
    checkpointer = Checkpointer(tmp_path)
    state, metrics = create_train_state(CONFIG, KEY, batch, settings=FAST), []
    for step in range(6):
        if step == 3:
            checkpointer.save(step, state)
        state, values = train_step(state, batch, jax.random.fold_in(KEY, step))
        metrics.append(values)
    resumed, _ = checkpointer.restore(create_train_state(CONFIG, jax.random.key(9), batch, settings=FAST))
    assert resumed.step == 3
    for step in range(3, 6):
        resumed, values = train_step(resumed, batch, jax.random.fold_in(KEY, step))
        assert_same_bits(values, metrics[step])
    assert_same_bits(resumed, state)
    again = train_step(state, batch, KEY)
    assert_same_bits(train_step(state, batch, KEY), again)  # the state is still there, and decides
    assert again[1]["loss"] != train_step(state, batch, jax.random.key(1))[1]["loss"]


@pytest.mark.usefixtures("stub")
def test_an_update_is_adam_behind_a_clip_and_an_average(batch):
    state = create_train_state(CONFIG, KEY, batch, settings=FAST)
    gradient = jax.jit(
        jax.grad(functools.partial(objective.objective, config=CONFIG, settings=FAST.loss), has_aux=True)
    )
    mu = nu = jax.tree.map(np.zeros_like, state.params)
    params = ema = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        grads = gradient(state.params, batch, key)[0]
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        state, metrics = train_step(state, batch, key)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        rate = 0.01 * (step + 1) / 4
        np.testing.assert_allclose(metrics["lr"], rate, rtol=1e-6)
        assert norm > 0.1
        grads = jax.tree.map(lambda g, norm=norm: np.asarray(g, np.float64) * 0.1 / norm, grads)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
        nu = jax.tree.map(lambda n, g: 0.95 * n + 0.05 * g**2, nu, grads)
        t = step + 1

        def updated(p, m, n, rate=rate, t=t):
            return p - rate * (m / (1 - 0.9**t)) / (np.sqrt(n / (1 - 0.95**t)) + 1e-8)

        params = jax.tree.map(updated, params, mu, nu)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, params)
    assert state.step == 3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), state.params, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), state.ema_params, ema)


@pytest.mark.usefixtures("stub")
def test_the_loss_is_the_weighted_sum_and_padding_is_none_of_it(batch):
    """A second structure without a resolved atom changes nothing; the parts add up as the weights say."""
    params = create_train_state(CONFIG, KEY, batch).params
    settings = LossSettings(diffusion=3, bond=0.5, distogram=0.1, confidence=0.2, pae=0.7, rollout_steps=2)
    run = jax.jit(loss_of(settings), compiler_options=QUICK)
    total, parts = run(params, batch, KEY)
    assert set(parts) == PARTS
    diffusion = parts["mse"] + 0.5 * parts["bond"] + parts["smooth_lddt"]
    confidence = parts["plddt"] + parts["pde"] + parts["resolved"] + 0.7 * parts["pae"]
    np.testing.assert_allclose(total, 3 * diffusion + 0.1 * parts["distogram"] + 0.2 * confidence, rtol=1e-5)
    empty = batch | {"resolved": np.zeros_like(batch["resolved"])}
    both = {name: np.concatenate([batch[name], empty[name]]) for name in batch}
    with_empty = run(params, both, KEY)[1]
    for name in ("mse", "smooth_lddt", "bond", "distogram"):  # the rollout's noise depends on the size of the batch
        np.testing.assert_allclose(with_empty[name], parts[name], rtol=1e-3, err_msg=name)
    assert set(jax.eval_shape(loss_of(LossSettings(confidence=0)), params, batch, KEY)[1]) == PARTS - {
        "plddt",
        "pae",
        "pde",
        "resolved",
    }


@pytest.mark.usefixtures("stub")
def test_confidence_trains_its_heads_alone(batch):
    params = create_train_state(CONFIG, KEY, batch).params
    settings = LossSettings(diffusion=0, distogram=0, confidence=1, pae=1, rollout_steps=2)
    grads, _ = jax.jit(
        jax.grad(functools.partial(objective.objective, config=CONFIG, settings=settings), has_aux=True)
    )(params, batch, KEY)
    moved = {name: any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree)) for name, tree in grads.items()}
    assert moved == {name: name.startswith("heads") for name in params}


def test_the_network_learns(batch):
    """The real one, plain and quickly compiled: the loss falls, all weights but the recycling's have gradients."""
    config = dataclasses.replace(
        CONFIG, c_s=32, c_z=16, c_m=8, c_token=32, pairformer_blocks=1, msa_blocks=0, template_blocks=0, token_blocks=1,
        recycles=1, remat=False, kernels=Kernels(*["reference"] * 4),
    )  # fmt: skip
    settings = TrainSettings(
        learning_rate=3e-3, warmup_steps=1, loss=LossSettings(confidence=0.1, pae=1.0, rollout_steps=2)
    )
    step = jax.jit(train_step, compiler_options=QUICK, donate_argnums=0)
    state, first = step(create_train_state(config, KEY, batch, settings=settings), batch, KEY)
    for _ in range(10):
        state, last = step(state, batch, KEY)
    assert set(last) == PARTS | {"loss", "grad_norm", "lr"}
    assert last["loss"] < 0.9 * first["loss"]
    for name in ("mse", "distogram", "plddt", "resolved"):
        assert last[name] < first[name], name
    moments = state.opt_state[1][0].nu
    still = {
        jax.tree_util.keystr(path[:2])
        for path, leaf in jax.tree_util.tree_flatten_with_path(moments)[0]
        if not np.asarray(leaf).any()
    }
    assert still == {f"['trunk_cycle']['{name}']" for name in ("ln_s", "ln_z", "w_s", "w_z")}


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs(batch):
    with pytest.raises(ValueError, match=r"batch: expected all features, got none named 'coords' \(1 are missing\)"):
        create_train_state(CONFIG, KEY, {name: value for name, value in batch.items() if name != "coords"})
    short = batch | {"resolved": batch["resolved"][:, :-1]}
    with pytest.raises(ValueError, match=r"batch\['resolved'\]: expected shape \[1, 160\], got \[1, 159\]"):
        create_train_state(CONFIG, KEY, short)
    with pytest.raises(ValueError, match=r"batch\['token_mask'\]: expected shape .*, got \[32\]"):
        create_train_state(CONFIG, KEY, {name: value[0] for name, value in batch.items()})
    for settings in ({"learning_rate": -1.0}, {"clip_norm": 0.0}, {"b1": 1.0}, {"decay_every": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected a value"):
            TrainSettings(**settings)
    for settings in ({"bond": -1.0}, {"rollout_steps": 0}, {"loss_weighting": "karras"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
            LossSettings(**settings)
