import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.instantedit import PeRFlowSchedule, study
from jaxlab.instantedit import emoji as task
from jaxlab.instantedit.baselines import plain_inversion
from jaxlab.instantedit.baselines.flow import EditProblem
from jaxlab.instantedit.evaluation import evaluate
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.small_editor import caption_tokenizer


class Unet(nn.Module):
    """A noise that depends on latents, time and words; its one map looks at each word alike."""

    def __call__(self, z, time, text, *residuals, capture=None):
        push = jnp.tanh(text[0].mean((1, 2, 3)) * 9)[:, None, None, None]
        eps = jnp.sin(z + push) * (0.5 + time / 2000)[:, None, None, None]
        if capture is None:
            return eps
        places = jnp.arange(capture) / capture
        return eps, jnp.broadcast_to(places[None, None, :, None], (1, len(z), capture, text[0].shape[1])) / 77

    def text_keys_values(self, text):
        return (text[:, :, None],)


class Words(nn.Module):
    def __call__(self, ids):
        return jnp.sin(ids[..., None] * jnp.arange(1.0, 4.0))


@pytest.fixture(scope="module")
def cases():
    pairs, sources, targets = task.packaged_pairs()
    pictures = dict(zip(pairs, zip(sources, targets)))
    return study.cases_of(pairs[:5], pictures.__getitem__)


@pytest.fixture(scope="module")
def tokenizer(cases):
    return caption_tokenizer([case.source_prompt for case in cases] + [case.target_prompt for case in cases])


NETWORK = EditorNetwork({"unet": {}, "text_encoder": {}}, Unet(), PeRFlowSchedule(), text_encoder=Words())


def batched(cases, tokenizer, method, draws=False):
    editor = study.Batched(NETWORK, tokenizer, cases, method, draws=draws)
    return lambda seed=0: np.stack([editor(case, seed) for case in cases])


def test_cases_say_where_their_targets_differ(cases):
    assert len({case.id for case in cases}) == 5
    for case in cases:
        changed = np.abs(case.source_image().astype(int) - case.target_image()).max(-1)
        np.testing.assert_array_equal(case.edit_mask(), changed >= 8)
        assert 0.05 < case.edit_mask().mean() < 0.95


def test_without_its_parts_it_is_the_plain_inversion(cases, tokenizer):
    plain = study.Setting(cfg=1.0, dpg=0.0, mask=False, control=0.0, injection=False)
    inputs = study.inputs_of(NETWORK, tokenizer, cases)
    ours = jax.jit(study.instant_edit(plain))(NETWORK, inputs, jax.random.key(0))
    prompts = inputs.prompts
    problem = EditProblem(inputs.z0, prompts.null, prompts.source, prompts.target, cfg=None)
    theirs = plain_inversion(NETWORK, problem, num_steps=4)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    kept = jax.jit(study.instant_edit(dataclasses.replace(plain, injection=True)))(NETWORK, inputs, jax.random.key(0))
    assert float(jnp.abs(kept - inputs.z0).mean()) < 0.5 * float(jnp.abs(ours - inputs.z0).mean())


def test_masked_way_down_ends_on_the_source(cases, tokenizer):
    setting = dataclasses.replace(study.BASE, injection=False, control=0.0)
    made = batched(cases, tokenizer, study.instant_edit(setting))()
    whole = batched(cases, tokenizer, study.instant_edit(dataclasses.replace(setting, mask=False)))()
    sources = np.stack([case.source_image() for case in cases])
    np.testing.assert_array_equal(made[:, :12], sources[:, :12])  # where the map is below 0.4
    assert (whole[:, :12] != sources[:, :12]).any()
    assert (made[:, 16:] != sources[:, 16:]).any()


def test_equal_prompts_change_nothing(cases, tokenizer):
    same = [dataclasses.replace(case, target_prompt=case.source_prompt, blend_word=None) for case in cases]
    made = batched(same, tokenizer, study.instant_edit(study.BASE))()
    np.testing.assert_array_equal(made, [case.source_image() for case in cases])


def test_batches_and_seeds(cases, tokenizer, monkeypatch):
    method = study.instant_edit(dataclasses.replace(study.BASE, mask=False))
    whole = batched(cases, tokenizer, method)
    monkeypatch.setattr(study, "_BATCH", 3)
    np.testing.assert_array_equal(batched(cases, tokenizer, method)(), whole())
    np.testing.assert_array_equal(whole(1), whole(0))
    drawn = batched(cases, tokenizer, study.baseline("sdedit", 4, cfg=1.1), draws=True)
    assert (drawn(1) != drawn(0)).any()


def test_baselines_take_no_more_samples():
    schedule = PeRFlowSchedule()
    names = list(study.methods(schedule))
    assert study.samples(study.BASE) == 19
    assert study.method_samples(schedule, "8 steps") == 39
    baselines = [name for name in names if "cfg" in name]
    assert len(baselines) == 18
    assert all(10 < study.method_samples(schedule, name) <= study.BUDGET for name in baselines)
    assert {name.partition(" ")[0] for name in names} >= set(study.DRAWING)


def test_methods_are_editors(cases, tokenizer):
    some = {"InstantEdit": study.instant_edit(study.BASE)}
    found = evaluate(cases, study.editors(NETWORK, tokenizer, cases, chosen=some), seeds=(0,))
    assert found.editors == ("copy", "InstantEdit")
    assert found.mean("copy", "mse").mean == 0
    assert found.difference("InstantEdit", "copy", "psnr_to_target").mean != 0
