"""The pipeline's contract: results, identity, what is compiled and evaluated again, and bad input."""

import numpy as np
import pytest

from jaxlab.instantedit import InstantEditPipeline, Inversion
from jaxlab.instantedit import edit as programs
from jaxlab.instantedit import inversion as up
from tests.instantedit import toys

SOURCE, TARGET = "a photo of a cat", "a photo of a red dog"
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline():
    return toys.pipeline()


@pytest.fixture(scope="module")
def inversion(pipeline):
    return pipeline.invert(PIXELS, mode="official")


def compiled():
    jitted = (up.invert_program, programs.source_program, programs.edit_program, programs.decode_program)
    return sum(each._cache_size() for each in jitted)


@pytest.mark.latest
def test_an_edit(pipeline, inversion):
    assert inversion.trajectory.shape == (5, 8, 12, 4)
    assert (inversion.edges.shape, inversion.edges.dtype) == ((64, 96), bool)
    assert inversion.edges.any()
    assert (inversion.num_steps, inversion.mode, inversion.control_scale) == (4, "official", 0.4)
    result = pipeline.edit(inversion, SOURCE, TARGET, blend_word="dog", return_trace=True)
    assert (result.image.shape, result.image.dtype) == ((64, 96, 3), np.uint8)
    assert (result.latents.shape, result.masks.shape) == ((8, 12, 4), (3, 8, 12))
    assert result.masks.any()
    assert (np.flatnonzero(result.alpha_e).tolist(), result.alpha_e.shape) == ([6], (77,))
    trace = result.trace
    assert (trace.latents.shape, trace.guided_first.shape) == ((4, 8, 12, 4), (8, 12, 4))
    assert trace.attention.shape == (2, 2, 6, 77)
    np.testing.assert_allclose(trace.attention.sum(-1), 1, atol=1e-5)
    shown = np.clip(np.asarray(pipeline.network.decode(result.latents[None])[0]) / 2 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(result.image, shown, atol=0.51)
    clean, last = np.asarray(inversion.trajectory[0]), trace.latents[-1]
    np.testing.assert_array_equal(result.latents, np.where(result.masks[-1][..., None], last, clean))
    official = pipeline.edit(inversion, SOURCE, TARGET, blend_word="dog", compat="official", return_trace=True)
    np.testing.assert_array_equal(official.latents, official.trace.latents[-1])
    assert pipeline.edit(inversion, SOURCE, TARGET).trace is None


def test_an_image_goes_through_at_once(pipeline):
    whole = pipeline.edit(PIXELS, SOURCE, TARGET, num_steps=5, seed=3)
    apart = pipeline.edit(pipeline.invert(PIXELS, num_steps=5, seed=3), SOURCE, TARGET)
    np.testing.assert_array_equal(whole.latents, apart.latents)
    assert set(whole.timings) == {"inversion", "source", "edit", "decode"}
    assert set(apart.timings) == {"source", "edit", "decode"}
    other = pipeline.invert(PIXELS, num_steps=5, seed=4)
    assert np.abs(other.trajectory[0] - pipeline.invert(PIXELS, num_steps=5).trajectory[0]).max() > 0.01
    with pytest.warns(UserWarning, match="5 is no multiple of the 4 windows"):
        pipeline.edit(PIXELS, SOURCE, TARGET, num_steps=5, compat="official")


@pytest.mark.parametrize("compat", ["clean", "official"])
@pytest.mark.parametrize("mode", ["exact", "official"])
def test_equal_prompts_give_the_encoded_image(pipeline, mode, compat):
    inversion = pipeline.invert(PIXELS, mode=mode)
    result = pipeline.edit(inversion, SOURCE, SOURCE, blend_word="cat", compat=compat, cfg=7, dpg=5)
    np.testing.assert_array_equal(result.latents, inversion.trajectory[0])


def test_numbers_prompts_and_weights_compile_nothing(pipeline, inversion):
    pipeline.edit(inversion, SOURCE, TARGET, blend_word="dog")
    before = compiled()
    pipeline.edit(inversion, SOURCE, TARGET, blend_word="dog", cfg=2, dpg=0.5, mask_threshold=0.7, control_scale=1)
    pipeline.edit(inversion, "the big hat", "the red hat on a cat", compat="official")
    pipeline.invert(PIXELS, mode="official", control_scale=0)
    toys.pipeline(seed=1).edit(toys.pipeline(seed=1).invert(PIXELS, mode="official"), SOURCE, TARGET)
    assert compiled() == before


def test_what_the_source_decides_is_evaluated_once(pipeline):
    inversion = pipeline.invert(PIXELS)
    first, second = (pipeline.edit(inversion, SOURCE, TARGET) for _ in range(2))
    assert ["source" in each.timings for each in (first, second)] == [True, False]
    np.testing.assert_array_equal(first.latents, second.latents)
    assert "source" in pipeline.edit(inversion, SOURCE, TARGET, control_scale=0.5).timings
    assert "source" in pipeline.edit(inversion, "the cat", TARGET).timings
    assert "source" not in pipeline.edit(inversion, "the cat", "the dog").timings


def test_many_targets_of_one_image(pipeline, inversion):
    targets, blends = [TARGET, SOURCE, "a big hat"], ["dog", None, "hat"]
    many = pipeline.edit_many(inversion, SOURCE, targets, blend_words=blends, dpg=2.0)
    for result, target, blend in zip(many, targets, blends):
        alone = pipeline.edit(inversion, SOURCE, target, blend_word=blend, dpg=2.0)
        np.testing.assert_allclose(result.latents, alone.latents, atol=1e-4)
        np.testing.assert_array_equal(result.alpha_e, alone.alpha_e)
        assert (result.masks != alone.masks).mean() < 0.02
    np.testing.assert_array_equal(many[1].latents, inversion.trajectory[0])
    with pytest.raises(ValueError, match="blend_words: expected one for each of 3 target prompts, got 1"):
        pipeline.edit_many(inversion, SOURCE, targets, blend_words=["dog"])
    with pytest.raises(ValueError, match="target_prompts: expected at least one"):
        pipeline.edit_many(inversion, SOURCE, [])


def test_scales_and_edges_act(pipeline, inversion):
    near = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-3  # noqa: E731
    plain = pipeline.edit(inversion, SOURCE, TARGET)
    for change in ({"cfg": 2.0}, {"dpg": 1.0}, {"control_scale": 0.8}):
        assert not near(plain.latents, pipeline.edit(inversion, SOURCE, TARGET, **change).latents)
    none = np.zeros((64, 96), bool)
    assert not near(inversion.trajectory, pipeline.invert(PIXELS, mode="official", edges=none).trajectory)
    assert not near(inversion.trajectory, pipeline.invert(PIXELS, mode="official", control_scale=0.8).trajectory)
    assert not near(inversion.trajectory, pipeline.invert(PIXELS, mode="exact").trajectory)
    again = pipeline.invert_latents(inversion.trajectory[0], inversion.edges, mode="official")
    np.testing.assert_array_equal(again.trajectory, inversion.trajectory)


def test_without_a_controlnet():
    whole = toys.pipeline()
    bare = InstantEditPipeline(whole.network.replace(controlnet=None), whole.tokenizer)
    inversion = bare.invert(PIXELS)
    assert inversion.hint_features is None
    assert np.isfinite(bare.edit(inversion, SOURCE, TARGET).latents).all()
    with pytest.raises(ValueError, match="expected hint_features"):
        whole.edit(inversion, SOURCE, TARGET)
    with pytest.raises(ValueError, match="network: expected one with a text encoder"):
        InstantEditPipeline(whole.network.replace(text_encoder=None), whole.tokenizer)


def test_bad_input(pipeline, inversion, unchecked):
    def refused(match, call, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)

    edit, invert = pipeline.edit, pipeline.invert
    refused("60x96", invert, PIXELS[:60])
    refused("not finite", invert, np.full((64, 64, 3), np.nan))
    refused("num_steps: expected at least 1, got 0", invert, PIXELS, num_steps=0)
    refused("mode: expected one of", invert, PIXELS, mode="fast")
    refused("control_scale: expected a number of at least 0, got -1", invert, PIXELS, control_scale=-1)
    refused(r"edges: expected bool \[64, 96\], got bool \[64, 64\]", invert, PIXELS, edges=np.ones((64, 64), bool))
    refused("edges: expected bool", invert, PIXELS, edges=np.ones((64, 96)))
    latents, endless = np.ones((8, 12)), np.full((8, 12, 4), np.inf)
    refused(r"z0: expected \[h, w, C\], got \(8, 12\)", pipeline.invert_latents, latents, inversion.edges)
    refused("z0: some values are not finite", pipeline.invert_latents, endless, inversion.edges)
    refused("edges: expected bool", pipeline.invert_latents, np.ones((8, 12, 4)), np.ones((64, 64), bool))
    refused("num_steps: expected 4, those of the inversion, got 8", edit, inversion, SOURCE, TARGET, num_steps=8)
    refused("target_prompt: expected text", edit, inversion, SOURCE, " ")
    refused("mask_threshold", edit, inversion, SOURCE, TARGET, mask_threshold=-0.1)
    refused("control_scale", edit, inversion, SOURCE, TARGET, control_scale=-0.1)
    refused("cfg: expected a finite number", edit, inversion, SOURCE, TARGET, cfg=float("nan"))
    refused("compat: expected one of", edit, inversion, SOURCE, TARGET, compat="fast")
    absent = "blend_word: 'hat' is not in the target prompt, whose tokens are a, photo, of, a, red, dog"
    refused(absent, edit, inversion, SOURCE, TARGET, blend_word="hat")
    refused("target_prompt: expected text, got .None", edit, inversion, SOURCE, None)
    refused("source_prompt: expected text, got None", edit, inversion, None, TARGET)
    refused("blend_word: expected text or None, got .3", edit, inversion, SOURCE, TARGET, blend_word=3)
    refused("target_prompts: expected a list of prompts, got 'a dog'", pipeline.edit_many, inversion, SOURCE, "a dog")
    refused("seed: expected a whole number or None, got 'a'", invert, PIXELS, seed="a")
    wide = np.ones((128, 192), bool)
    refused(r"edges: expected bool \[64, 96\]", pipeline.invert_latents, np.ones((8, 12, 4)), wide)
    with pytest.warns(UserWarning, match="blend_word: hat of 'hat dog' is in neither prompt and left out"):
        assert np.flatnonzero(edit(inversion, SOURCE, TARGET, blend_word="hat dog").alpha_e).tolist() == [6]
    with pytest.warns(UserWarning, match="no mask is made"):
        assert not edit(inversion, SOURCE, TARGET, blend_word="hat", compat="official").masks.any()
    with pytest.warns(UserWarning, match="source_prompt: it is empty"):
        assert np.isfinite(edit(inversion, "", TARGET).latents).all()
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        edit(inversion, SOURCE, "a cat " * 60)
    with pytest.warns(UserWarning, match="2 is fewer than the 4 windows"):
        assert invert(PIXELS, num_steps=2).num_steps == 4
    short = Inversion(inversion.trajectory[:3], inversion.edges, inversion.hint_features, 2, "exact", 0.4)
    refused("inversion: expected at least 4 steps, one a window, got 2", edit, short, SOURCE, TARGET)
    narrow = Inversion(inversion.trajectory[:, :, :9], inversion.edges, inversion.hint_features[:, :9], 4, "exact", 0.4)
    refused("z: expected height and width to be multiples of 4, got 8 x 9", edit, narrow, SOURCE, TARGET)


def test_images_of_other_kinds(pipeline):
    want = pipeline.invert(PIXELS).trajectory
    floats = pipeline.invert((PIXELS / 255).astype(np.float32)).trajectory
    np.testing.assert_allclose(floats, want, atol=1e-5)
    from PIL import Image

    picture = Image.fromarray(PIXELS)
    np.testing.assert_array_equal(pipeline.invert(picture).trajectory, want)
    grey = pipeline.invert(picture.convert("L")).trajectory[0]
    np.testing.assert_allclose(grey[..., 0], grey[..., 1], atol=1e-6)
    with pytest.warns(UserWarning, match="put on white"):
        np.testing.assert_array_equal(pipeline.invert(picture.convert("RGBA")).trajectory, want)
