"""Fixtures of the tests that have a server; what they import is an extra, so they import it."""

import pytest


@pytest.fixture(scope="session")
def engine():
    from tests.voltanallm import servers

    return servers.toy_engine()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from tests.voltanallm import servers

    return servers.chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    from tests.voltanallm import servers

    with servers.live(engine, tokenizer=tokenizer) as (app, client):
        yield app, client


@pytest.fixture
def client(server):
    return server[1]


@pytest.fixture
def official(client, monkeypatch):
    """OpenAI's own client."""
    import openai

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official:
        yield official


@pytest.fixture
def free_pages(engine):
    """For tests that shall leave the pool as it was."""
    from tests.voltanallm import servers

    yield
    servers.until(lambda: engine.free_pages == servers.SIZES.num_pages - 1)
