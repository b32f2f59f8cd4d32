"""Traces: arrivals and lengths, files, rates, bad inputs; and the truth that the simulator takes from a profile."""

import numpy as np
import pytest

from jaxlab import core
from jaxlab.voltanallm.sim import Profile, ProfiledLatency, SimModels, Trace, read_lengths, sharegpt, traces


def test_gaps_are_gamma_and_pairs_stay_together():
    prompt, output = np.array([10, 20, 30]), np.array([1, 2, 3])
    for burstiness in (1.0, 0.25):
        trace = Trace.from_lengths(prompt, output, rate=20, num_requests=20_000, burstiness=burstiness, seed=1)
        gaps = np.diff(trace.arrival_s)
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
        np.testing.assert_array_equal(trace.prompt_tokens, 10 * trace.output_tokens)
        assert np.bincount(trace.output_tokens)[1:].min() > 6000
    slow, fast = (Trace.from_lengths(prompt, output, rate=rate, num_requests=50, seed=2) for rate in (5, 50))
    np.testing.assert_allclose(slow.arrival_s, 10 * fast.arrival_s)
    np.testing.assert_array_equal(slow.prompt_tokens, fast.prompt_tokens)
    other = Trace.from_lengths(prompt, output, rate=5, num_requests=50, seed=3)
    assert not np.array_equal(other.arrival_s, slow.arrival_s)


def test_time_is_compressed():
    trace = Trace([2.0, 3.0, 6.0], [5, 6, 7], [1, 2, 3])
    assert trace.rate == 0.5
    assert trace.at_rate(2.0).arrival_s.tolist() == [0.5, 0.75, 1.5]
    part = trace.part(1, 3)
    assert (part.arrival_s.tolist(), part.prompt_tokens.tolist(), len(part)) == ([0.0, 3.0], [6, 7], 2)
    with pytest.raises(ValueError, match="all come at once"):
        Trace([1.0, 1.0], [1, 1], [1, 1]).at_rate(1.0)


def test_files(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at_s,num_prefill_tokens,num_decode_tokens\n1.5,10,3\n2.0,20,0\n2.5,30,1\n")
    with pytest.warns(UserWarning, match="1 of 3 requests have no output"):
        trace = Trace.azure(path)
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist()) == ([0.0, 1.0], [10, 30])
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    )
    assert Trace.azure(path).arrival_s.tolist() == pytest.approx([0, 0.052], abs=1e-5)
    path.write_text("num_prefill_tokens,num_decode_tokens\n100,40\n300,80\n9000,60\n")
    lengths = read_lengths(path, max_prompt=500, mean_output=30)
    assert (lengths.prompt.tolist(), lengths.output.tolist()) == ([100, 300], [20, 40])
    with pytest.raises(ValueError, match="expected a column arrived_at_s or TIMESTAMP"):
        Trace.azure(path)
    with pytest.raises(ValueError, match="no prompt is left"):
        read_lengths(path, max_prompt=50)
    path.write_text("num_prefill_tokens,num_decode_tokens\n100,40\n300,many\n")
    with pytest.raises(ValueError, match="line 3: expected a number as num_decode_tokens, got 'many'"):
        read_lengths(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0, 1], [1, 1], [1]), "one length"),
        (([], [], []), "at least 1"),
        (([-1, 1], [1, 1], [1, 1]), r"arrival_s: expected finite, not negative, got -1\.0 for request 0"),
        (([0, float("nan")], [1, 1], [1, 1]), "arrival_s: expected finite"),
        (([2, 1], [1, 1], [1, 1]), r"arrival_s: expected ascending, got 1\.0 for request 1"),
        (([0, 1], [1, 0], [1, 1]), "prompt_tokens: expected at least 1, got 0"),
        (([0, 1], [1, 1], [0, 1]), "output_tokens: expected at least 1, got 0 for request 0"),
        (([0, 1], [1, 1.5], [1, 1]), "prompt_tokens: expected whole numbers"),
    ],
)
def test_bad_traces(columns, message):
    with pytest.raises(ValueError, match=message):
        Trace(*map(np.array, columns))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate"),
        ({"burstiness": -1}, "burstiness"),
        ({"num_requests": 0}, "num_requests"),
        ({"output": [1]}, "as many lengths"),
    ],
)
def test_bad_arrivals(options, message):
    with pytest.raises(ValueError, match=message):
        Trace.from_lengths(**({"prompt": [1, 2], "output": [1, 2], "rate": 1.0, "num_requests": 2} | options))


def test_real_files():
    try:
        paths = [core.data_path(name, download=False) for name in (traces.AZURE_CONVERSATION, traces.SHAREGPT)]
    except core.DataUnavailable as error:
        pytest.skip(str(error))
    conversation = Trace.azure(paths[0])
    assert len(conversation) == 14176
    assert conversation.rate == pytest.approx(5.9, abs=0.1)
    lengths = sharegpt(download=False)
    assert not lengths.synthetic
    assert lengths.prompt.mean() == pytest.approx(250, abs=2)
    assert lengths.output.mean() == pytest.approx(200, abs=1)


def test_what_is_made_up_says_so(monkeypatch):
    def absent(*_, **__):
        raise core.DataUnavailable("nowhere")

    monkeypatch.setattr(core, "data_path", absent)
    lengths = sharegpt()
    assert lengths.synthetic
    assert lengths.prompt.mean() == pytest.approx(250, rel=0.2)
    assert lengths.output.mean() == pytest.approx(200, rel=0.01)
    profile = Profile.a100_llama()
    assert profile.synthetic
    decode = ProfiledLatency("decode", profile)
    assert decode.predict(1410, 129, 0) > 1.1 * decode.predict(1410, 128, 0)


@pytest.fixture(scope="module")
def profile():
    profile = Profile.a100_llama()
    if profile.synthetic:
        pytest.skip("the measured profile is not here")
    return profile


def test_the_staircase_is_the_measured_one(profile):
    assert profile.at(np.array([128, 129, 136]), profile.linear_ms) == pytest.approx([0.377, 0.5295, 0.5295])
    assert profile.at(np.array([1, 1025.0]), profile.linear_ms)[0] == profile.linear_ms[0]
    assert profile.at(np.array([65536.0]), profile.linear_ms) == pytest.approx(2 * profile.linear_ms[-1], rel=0.02)


def test_what_depends_on_the_clock(profile):
    decode, prefill = (ProfiledLatency(phase, profile) for phase in ("decode", "prefill"))
    alone = decode.predict([705, 1410], 1, 1000)
    assert alone[0] == pytest.approx(alone[1])  # nothing but reads
    full = decode.predict([705, 1410], 512, 0)
    layer = profile.at(np.array([512]), profile.linear_ms)[0] - profile.linear_ms[0]
    head = 128256 * 4096 / 218_103_808
    assert full[0] - full[1] == pytest.approx((32 + head) * layer)
    grown = decode.predict(1410, 8, 100_000) - decode.predict(1410, 8, 0)
    assert grown == pytest.approx(100_000 * 131_072 / (2 * 218_103_808 / profile.linear_ms[0]))
    long = prefill.predict([705, 1410], 8, 8192)
    assert 1.85 < long[0] / long[1] < 1.95  # norms and activations are reads, too
    for phase, truth in (("decode", decode), ("prefill", prefill)):
        fast = truth.at(1005)
        for batch, tokens in ((1, 1), (7, 4000), (129, 30_000), (700, 200_000)):
            assert fast(batch, tokens) == pytest.approx(truth.predict(1005, batch, tokens), rel=1e-12), phase
    assert decode.predict(1005, 0, 0) == 0.0
    with pytest.raises(ValueError, match=r"expected a clock of 210\.\.1410"):
        decode.predict(1000, 1, 1)


@pytest.mark.latest
def test_tables_are_fitted_and_err(profile):
    models = SimModels.preset("llama-3.1-8b-a100")
    assert SimModels.preset("llama-3.1-8b-a100") is models
    batch = np.array([1, 30, 100, 128, 129, 200, 300, 500])
    predicted, true = (model.predict(1200, batch, 300 * batch) for model in (models.decode_table, models.decode))
    error = np.abs(predicted / true - 1)
    assert 0.001 < error.mean() < 0.05
    tokens = np.array([2500, 6000, 12_000])
    np.testing.assert_allclose(
        models.prefill_table.predict(1410, 1, tokens), models.prefill.predict(1410, tokens // 250, tokens), rtol=0.05
    )
