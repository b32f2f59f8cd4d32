import pytest


@pytest.fixture
def folder(tmp_path, unchecked, monkeypatch):
    """Where files are written; what transformers would read is not ours, and takes seconds to import."""

    def others(folder, **options):
        raise NotImplementedError

    monkeypatch.setattr("jaxlab.models.tokenizer._by_transformers", others)
    return tmp_path
