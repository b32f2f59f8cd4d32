"""The load generator against a live server, and against none."""

import socket

import numpy as np
import pytest

from jaxlab.voltanallm.load import Answer, LoadResult, replay
from jaxlab.voltanallm.sim import Trace
from tests.voltanallm import servers


def test_every_request_is_answered_in_its_time(engine, free_pages):
    trace = Trace([0.0, 0.0, 0.3, 0.5], [3, 9, 5, 4], [6, 1, 4, 8])
    with servers.live(engine) as (_, client):
        result = replay(f"{client.base_url}/v1", trace, model=servers.MODEL, vocab_size=64)
        assert result.failed == 0
        assert [answer.index for answer in result.answers] == [0, 1, 2, 3]
        assert [len(answer.piece_s) for answer in result.answers] == [6, 1, 4, 8]
        assert all(answer.sent_s >= wanted for answer, wanted in zip(result.answers, trace.arrival_s))
        assert all(np.diff(answer.piece_s).min(initial=0) >= 0 for answer in result.answers)
        assert (result.ttft_ms() > 0).all()
        assert np.isnan(result.itl_ms()[1])
        assert result.attainment(1e6, 1e6) == (1.0, 1.0)
        assert result.attainment(1e-6, 1e-6) == (0.0, 0.0)
        refused = replay(f"{client.base_url}/v1", trace, model="other", vocab_size=64)
    assert refused.failed == 4
    assert "404" in refused.answers[0].error
    assert refused.attainment(1e6, 1e6)[0] == 0.0


def test_a_server_that_is_not_there_is_told_as_such():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = replay(f"http://127.0.0.1:{port}/v1", Trace([0.0], [3], [4]), model="m", vocab_size=8)
    assert result.failed == 1
    assert result.answers[0].error
    assert result.gaps_ms().size == 0


def test_a_result_is_read_back(tmp_path):
    answers = (Answer(0, 0.1, 3, 2, (0.2, 0.3)), Answer(1, 0.2, 4, 2, (), "refused"))
    LoadResult(answers, 0.3).save(tmp_path / "answers.jsonl")
    LoadResult(answers, 0.3).save(tmp_path / "answers.jsonl")  # over what was there
    read = LoadResult.load(tmp_path / "answers.jsonl")
    assert read == LoadResult(answers, 0.3)
    np.testing.assert_allclose(read.ttft_ms(), [100.0, np.inf])
    assert read.attainment(150, 150) == (0.5, 0.5)
    with pytest.raises(FileNotFoundError):
        LoadResult.load(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="answers of a load test"):
        LoadResult.load(tmp_path / "other.jsonl")


def test_a_vocabulary_has_ids():
    with pytest.raises(ValueError, match="vocab_size"):
        replay("http://127.0.0.1:1/v1", Trace([0.0], [3], [4]), model="m", vocab_size=0)
