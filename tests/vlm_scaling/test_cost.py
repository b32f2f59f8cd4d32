"""Tokens by kind, FLOPs against token by token, and that importing the package loads nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.models.cost import forward_flops
from jaxlab.models.decoder import DecoderConfig
from jaxlab.vlm_scaling import Meter, Question, Sample, Tokens, cost

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_tokens_add_up():
    assert Tokens(1, 2, 3, 4, 5) + Tokens(10) == Tokens(11, 2, 3, 4, 5)
    assert Tokens(1, 2, 3, 4, 5).total == 15
    meter, question = Meter(), Question("q", "abcdefghi", "1")
    assert meter.sampling(question, [Sample("", 3), Sample("", 4)]) == Tokens(prompt=3, generated=7)
    assert meter.sampling(question, []) == Tokens()
    assert meter.verifying(question, [Sample("", 3)], answer_only=True) == Tokens(verify_prompt=3, verify_generated=1)


def test_flops_are_those_of_every_token():
    def decode(start, count):
        return sum(forward_flops(CONFIG, at + 1, start=at).total for at in range(start, start + count))

    read = forward_flops(CONFIG, 10).total
    assert cost.sampling_flops(CONFIG, 10, [3, 5]) == pytest.approx(read + decode(10, 3) + decode(10, 5))
    assert cost.sampling_flops(CONFIG, 10, [3, 5], prefix_cache=False) == pytest.approx(
        2 * read + decode(10, 3) + decode(10, 5)
    )
    assert cost.verifying_flops(CONFIG, 10, [4], verdict=3) == pytest.approx(read + decode(10, 6))
    assert cost.sampling_flops(CONFIG, 10, []) == 0
    for call in (
        lambda: cost.sampling_flops(CONFIG, 0, [1]),
        lambda: cost.sampling_flops(CONFIG, 3, [-1]),
        lambda: cost.verifying_flops(CONFIG, 3, [1], verdict=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_importing_the_package_loads_nothing():
    heavy = "[name for name in ('numpy', 'jax', 'flax', 'sympy', 'PIL', 'httpx') if name in sys.modules]"
    code = f"import sys, jaxlab.vlm_scaling as package; print({heavy}); package.Study"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
