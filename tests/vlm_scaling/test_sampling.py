import dataclasses
import functools

import jax
import numpy as np
import pytest

from benchmarks import vlm_parity
from jaxlab.models.qwen2_5_vl import load
from jaxlab.vlm_scaling.sampling import Request, sample
from tests.models.checkpoints import vlm_golden

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(vlm_parity.folder_of(tmp_path_factory.mktemp("vlm") / "in", vlm_golden()))


def _requests():
    """The two rows of the parity batch, without their padding."""
    given, sizes = vlm_parity.inputs(), vlm_parity.GRID.prod(axis=1)
    ids, pixels = given["input_ids"], given["pixel_values"]
    rows = [row[mask != 0] for row, mask in zip(ids, given["attention_mask"])]
    cut = sizes[0] + sizes[1]
    return [
        Request("two images", rows[0], pixels[:cut], vlm_parity.GRID[:2]),
        Request("one", rows[1], pixels[cut:], vlm_parity.GRID[2:]),
    ]


@pytest.mark.latest
def test_greedy_samples_are_torchs_continuation(loaded):
    found = sample(*loaded, _requests(), temperature=0.0, max_new_tokens=12, key=KEY)
    assert [samples.id for samples in found] == ["two images", "one"]
    for samples, expected in zip(found, vlm_golden()["continuation"]):
        np.testing.assert_array_equal(samples.tokens[0], expected)
        assert samples.mask.all()
        assert samples.finish_reason == ["length"]


def test_a_sample_depends_on_its_request_and_index_alone(loaded):
    draw = functools.partial(sample, *loaded, max_new_tokens=12, temperature=1.5, key=KEY)
    first, second = _requests()
    together = draw([first, second], n=3)
    turned = draw([second, first], n=3)
    alone = draw([second, dataclasses.replace(first, id="another")], n=3)
    for samples, others in ((together[0], turned[1]), (together[1], turned[0]), (together[1], alone[0])):
        np.testing.assert_array_equal(samples.tokens, others.tokens)
        np.testing.assert_allclose(samples.logps, others.logps, atol=1e-4)
    assert not np.array_equal(together[0].tokens, alone[1].tokens)
    assert len({tuple(row) for row in together[0].tokens.tolist()}) == 3
    stop = int(together[0].tokens[0, 1])
    ended = draw([first, second], n=3, eos_ids=(stop,))[0]
    assert ended.finish_reason[0] == "stop"
    assert ended.mask[0].sum() <= 2
    assert not ended.tokens[0, 2:].any()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("temperature", {"temperature": -1.0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("expected 1 at temperature 0, where all samples are equal, got 2", {"temperature": 0.0, "n": 2}),
        ("n: expected at least 1, got 0", {"n": 0}),
        ("requests: expected at least one", {"requests": []}),
        ("each of the 15 tokens of the images, got 14", {"requests": [Request("a", [50] * 14, np.zeros((60, 1176)),
                                                                              vlm_parity.GRID[2:])]}),
        ("each of the 0 tokens", {"requests": [Request("a", [50])]}),
        ("pixel_values: expected beside", {"requests": [Request("a", [50] * 15, None, vlm_parity.GRID[2:])]}),
    ],
)  # fmt: skip
def test_bad_calls(loaded, said, changes):
    requests = changes.pop("requests", [Request("a", [1, 2])])
    with pytest.raises(ValueError, match=said):
        sample(*loaded, requests, **({"max_new_tokens": 2, "key": KEY} | changes))
