import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.instantedit import PeRFlowSchedule
from jaxlab.instantedit.baselines import METHODS, EditProblem, count_samples, steps_within
from jaxlab.instantedit.network import Control, EditorNetwork
from tests.oracles import edit_baselines as oracle

RNG = np.random.default_rng(4)
MIX = RNG.normal(size=(3, 3)) * 0.4
SHAPE = (2, 4, 4, 3)
Z0 = RNG.normal(size=SHAPE)
NULL, SOURCE, TARGET = RNG.normal(size=(3, 2, 5, 3)) * 0.7
OPTIONS = {"renoise": {"iterations": 3, "averaged": 2}, "flow_edit": {"strength": 0.8, "draws": 2}}
KEY = 7


class Linear(EditorNetwork):
    """Its prediction is linear in latents, time and the mean state of a prompt, and adds what edges say."""

    def text(self, states):
        return states

    def eps(self, z, t, text, *, control=None):
        edges = 0.0
        if control is not None:
            edges = control.scale * jnp.tile(control.features, (len(z) // len(control.features), 1, 1, 1))
        return z @ jnp.float32(MIX) + t / 1000 + jnp.mean(text, axis=1)[:, None, None] + edges


def linear(z, t, prompt):
    return z @ MIX + t / 1000 + prompt.mean(axis=1)[:, None, None]


def jitted(name, **options):
    fast = {"xla_backend_optimization_level": 0}  # tiny programs, run once
    return jax.jit(functools.partial(METHODS[name], **options), compiler_options=fast)


def drawn(name, steps):
    """The noise that a method draws with the key."""
    lead = {"sdedit": (), "virtual_inversion": (steps,), "flow_edit": (steps - 1, 2)}[name]
    return np.asarray(jax.random.normal(jax.random.key(KEY), (*lead, *SHAPE)), np.float64)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.latest] * (n == "flow_edit")) for n in METHODS])
def test_methods_equal_their_papers_in_float64(name):
    steps, kind, cfg = 5, "diff_eps", 1.7
    random = {"sdedit", "virtual_inversion", "flow_edit"}
    options = OPTIONS.get(name, {})
    network = Linear({}, None, PeRFlowSchedule(4, kind))
    problem = EditProblem(*(jnp.float32(x) for x in (Z0, NULL[:1], SOURCE, TARGET)), cfg, rng=jax.random.key(KEY))
    got = jitted(name, num_steps=steps, **options)(network, problem)
    assert got.dtype == jnp.float32
    asked = {"z0": Z0, "null": NULL[:1], "source": SOURCE, "target": TARGET, "cfg": cfg}
    if name in random:
        # FlowEdit begins at 0.8: four of the five steps.
        options = {**options, "noise": drawn(name, steps)}
    expected = getattr(oracle, name)(oracle.Flow(4, kind), linear, asked, steps, **options)
    assert np.abs(expected - Z0).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


class Gaussian(EditorNetwork):
    """The true velocity where a prompt's clean latents are normal, of its own mean and a shared deviation of 0.6."""

    def text(self, states):
        return jnp.mean(states, axis=1)[:, None, None]

    def eps(self, z, t, text, *, control=None):
        at = self.schedule.marginal(t, z)
        variance = 0.36 * at.signal**2 + at.noise**2
        noise = at.noise * (z - at.signal * text) / variance
        clean = text + 0.36 * at.signal * (z - at.signal * text) / variance
        return at.signal_slope * clean + at.noise_slope * noise


def exact(schedule):
    """Up the source's flow and down the target's: what is left of the prompts' difference."""
    a0, a1 = (np.sqrt(schedule.alpha_bar(t)) for t in (0, 1000))
    spread0, spread1 = (np.sqrt(0.36 * a**2 + 1 - a**2) for a in (a0, a1))
    return Z0 + (a0 - a1 * spread0 / spread1) * (TARGET - SOURCE).mean(1)[:, None, None]


def test_solvers_find_the_exact_flow_and_those_of_second_order_faster():
    schedule = PeRFlowSchedule(4, "velocity")
    network = Gaussian({}, None, schedule)
    problem = EditProblem(*(jnp.float32(x) for x in (Z0, NULL[:1], SOURCE, TARGET)), None, rng=jax.random.key(KEY))

    def error(name, steps):
        return np.abs(jitted(name, num_steps=steps)(network, problem) - exact(schedule)).max()

    first = error("ddim_inversion", 24)
    assert 0.01 < first < 0.1
    assert 1.6 < first / error("ddim_inversion", 48) < 2.6
    assert error("rf_solver", 24) < first / 20
    assert error("fire_flow", 24) < first / 5
    for name in ("direct_inversion", "flow_edit", "renoise"):
        assert error(name, 24) < 2 * first, name


def test_equal_prompts_give_the_image_where_a_rule_promises_it():
    network = Linear({}, None, PeRFlowSchedule())
    same = jnp.float32(SOURCE)
    problem = EditProblem(jnp.float32(Z0), jnp.float32(NULL[:1]), same, same, None, rng=jax.random.key(KEY))
    for name in ("direct_inversion", "virtual_inversion", "flow_edit"):
        np.testing.assert_allclose(jitted(name)(network, problem), Z0, rtol=0, atol=5e-5)


SAMPLES = {
    "plain_inversion": (5 + 5, 5 + 10),
    "ddim_inversion": (5 + 5, 5 + 10),
    "direct_inversion": (5 + 10, 5 + 20),
    "virtual_inversion": (10, 15),
    "sdedit": (3, 6),
    "flow_edit": (10, 15),
    "rf_solver": (10 + 10, 10 + 20),
    "fire_flow": (6 + 6, 6 + 12),
    "renoise": (10 + 5, 10 + 10),
}


def test_samples_are_counted():
    schedule = PeRFlowSchedule()
    assert {
        name: tuple(count_samples(edit, schedule, num_steps=5, guided=guided) for guided in (False, True))
        for name, edit in METHODS.items()
    } == SAMPLES
    assert count_samples(METHODS["renoise"], schedule, num_steps=4, iterations=5) == 20 + 8
    assert count_samples(METHODS["flow_edit"], schedule, num_steps=4, draws=3) == 36
    assert [steps_within(METHODS[name], schedule, 24) for name in ("fire_flow", "rf_solver")] == [7, 4]
    with pytest.raises(ValueError, match=r"at least 24 samples, those of 4 steps, got 23"):
        steps_within(METHODS["rf_solver"], schedule, 23)


def test_edges_reach_every_branch():
    network = Linear({}, None, PeRFlowSchedule())
    arrays = [jnp.float32(x) for x in (Z0, NULL[:1], SOURCE[:1], TARGET[:1])]
    features = jnp.zeros(SHAPE).at[1].set(1.0)
    control = Control(features, 0.5)
    edit = jitted("plain_inversion")
    with_edges, without = (edit(network, EditProblem(*arrays, control=given)) for given in (control, None))
    np.testing.assert_allclose(with_edges[0], without[0], rtol=0, atol=1e-5)  # rows find their own edges
    assert np.abs(with_edges[1] - without[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sdedit", {"strength": 0.2}, r"strength: expected 0.25 to 1 .* got 0.2"),
        ("flow_edit", {"strength": 1.5}, "got 1.5"),
        ("flow_edit", {"draws": 0}, r"draws.*got 0"),
        ("renoise", {"averaged": 3}, "expected 1 to 2, got 3"),
        ("renoise", {"iterations": 0}, "averaged"),
        ("plain_inversion", {"num_steps": 0}, "num_steps"),
    ],
)
def test_bad_options(unchecked, name, options, told):
    with pytest.raises(ValueError, match=told):
        count_samples(METHODS[name], PeRFlowSchedule(), **options)


def test_bad_problems(unchecked):
    network = Linear({}, None, PeRFlowSchedule())
    arrays = [jnp.float32(x) for x in (Z0, NULL[:1], SOURCE, TARGET)]
    for name in ("sdedit", "virtual_inversion", "flow_edit"):
        with pytest.raises(ValueError, match="rng"):
            METHODS[name](network, EditProblem(*arrays))
    three = jnp.concatenate([arrays[2], arrays[2][:1]])
    with pytest.raises(ValueError, match="source: expected states of 1 or 2 prompts, got 3"):
        METHODS["ddim_inversion"](network, EditProblem(*arrays[:2], three, arrays[3]))
