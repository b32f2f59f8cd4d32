import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.training import OptimizerConfig, decay_mask, learning_rate_schedule, optimizer


def test_adamw_against_numpy():
    """Two updates with clip and decay, written out in float64."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=1.0, b1=0.8, b2=0.9, eps=1e-6)
    params = {"layer": {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]])}, "norm": {"scale": np.array([1.0, 1.0])}}
    tx = optimizer(config)
    ours = {key: {name: jnp.asarray(x, jnp.float32) for name, x in leaf.items()} for key, leaf in params.items()}
    state = tx.init(ours)
    moments = dict.fromkeys(params, (0.0, 0.0))
    for t in (1, 2):
        grads = {"layer": {"kernel": np.full((2, 2), 0.7 * t)}, "norm": {"scale": np.array([2.0, -1.0])}}
        norm = np.sqrt(sum((g**2).sum() for leaf in grads.values() for g in leaf.values()))
        updates, state = tx.update(
            {k: {n: jnp.asarray(g, jnp.float32) for n, g in v.items()} for k, v in grads.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for key, name, decay in (("layer", "kernel", 0.5), ("norm", "scale", 0.0)):
            g = grads[key][name] * min(1.0, 1.0 / norm)
            m, v = moments[key]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            moments[key] = m, v
            step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) + decay * params[key][name]
            params[key][name] = params[key][name] - 0.1 * step
            np.testing.assert_allclose(ours[key][name], params[key][name], rtol=1e-5)


def test_decay_leaves_out_norms_biases_embeddings():
    params = {
        "embed": {"embedding": np.zeros((4, 2))},
        "blocks_0": {
            "attn_norm": {"scale": np.zeros((3, 2))},
            "attn": {"q": {"kernel": np.zeros((3, 2, 1, 2)), "bias": np.zeros((3, 1, 2))}},
        },
        "head": {"kernel": np.zeros((2, 4))},
        "gain": np.zeros(3),
    }
    mask = decay_mask(params)
    assert mask["head"]["kernel"]
    assert mask["blocks_0"]["attn"]["q"]["kernel"]
    rest = [
        mask["embed"]["embedding"],
        mask["blocks_0"]["attn_norm"]["scale"],
        mask["blocks_0"]["attn"]["q"]["bias"],
        mask["gain"],
    ]
    assert not any(rest)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 1 - 0.9 * 40 / 90, 0.1]),
        ("cosine", [0.0, 0.5, 1.0, 0.1 + 0.9 * (1 + np.cos(np.pi * 40 / 90)) / 2, 0.1]),
        ("wsd", [0.0, 0.5, 1.0, 1.0, 0.1]),
    ],
)
def test_schedules(schedule, expected):
    rate = learning_rate_schedule(
        OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, steps=100, decay_fraction=0.2)
    )
    np.testing.assert_allclose([rate(t) for t in (0, 5, 10, 50, 100)], expected, rtol=1e-5)
    if schedule == "wsd":
        np.testing.assert_allclose([rate(80), rate(90)], [1.0, 0.55], rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, "schedule"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"b2": 1.0}, "b2"),
        ({"eps": 0.0}, "eps"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"decay_fraction": 2.0}, "decay_fraction"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_schedule_needs_its_span():
    with pytest.raises(ValueError, match=r"steps.*cosine"):
        optimizer(OptimizerConfig(schedule="cosine"))
