"""The cache: what is a hit, what is a miss, what damage does, who may share it; and reading ahead of the trainer."""

import json
import os
import threading
import time

import jax
import numpy as np
import pytest

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import CacheCorruptionError, FeatureCache, Prefetch, crop, featurize, make_batch, read_mmcif
from jaxlab.megafold.data import cache as cache_module
from tests.megafold.data_files import af3, assert_same, ras, structure

pytest.importorskip("gemmi")

SMALL = "mmcif/5y2e.cif"


@pytest.fixture
def small(tmp_path):
    """A structure of one's own with an alignment and a template, that may be changed."""
    af3("ccd")
    path = tmp_path / "small.cif"
    path.write_bytes(af3(SMALL).read_bytes())
    query = structure("5y2e.cif").sequence("A")
    (tmp_path / "small.a3m").write_text(f">q\n{query}\n>r\n{query[:20]}aaa{query[20:].replace('L', '-')}\n")
    (tmp_path / "template.cif").write_bytes(path.read_bytes())
    return {
        "path": path,
        "msas": {"A": tmp_path / "small.a3m"},
        "templates": {"A": [tmp_path / "template.cif"]},
        "options": {"max_msa_rows": 64},
    }


def fresh(given):
    return featurize(read_mmcif(given["path"]), **{name: given[name] for name in given if name != "path"})


def files(cache):
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


@pytest.mark.latest
def test_a_miss_and_a_hit(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache" / "deep")
    built = cache.get(**small)
    assert (cache.stats.hits, cache.stats.misses) == (0, 1)
    assert cache.stats.build_seconds > 0
    written = cache.stats.bytes
    assert written == sum(path.stat().st_size for path in files(cache))
    read = cache.get(**small)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.bytes) == (1, 1, 2 * written)
    assert_same(built, fresh(small))
    assert_same(read, built)
    assert all(value.flags.aligned and value.flags.writeable for value in read.values())
    assert list(read) == list(cache_module.FEATURES)
    manifest, data = files(cache)
    with np.load(data, allow_pickle=False) as arrays:  # an ordinary archive for whoever wants to look
        np.testing.assert_array_equal(arrays["coords"], built["coords"])
        assert arrays["restype"].dtype == np.int8
    assert json.loads(manifest.read_text())["key"] == cache.key(**small) == manifest.stem


def test_the_largest_real_sample(tmp_path):
    cache = FeatureCache(tmp_path)
    given = {"path": af3("mmcif/721p-assembly1.cif"), "msas": {"A": af3("msa/721p-assembly1A_protein.a3m")}}
    assert_same(cache.get(**given), ras())
    start = time.perf_counter()
    assert_same(cache.get(**given), ras())
    assert time.perf_counter() - start < cache.stats.build_seconds
    assert cache.stats.hits == 1


def test_every_input_counts(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    keys = [cache.key(**small)]
    assert cache.key(**small) == keys[0]
    assert cache.key(**{**small, "options": {}}) == cache.key(**{**small, "options": {"max_msa_rows": 16384}})
    for changed in (
        {"options": {"max_msa_rows": 63}},
        {"options": {"max_templates": 1}},
        {"options": {"ccd": tmp_path}},
        {"msas": None},
        {"templates": None},
        {"templates": {"A": small["templates"]["A"] * 2}},
    ):
        keys.append(cache.key(**{**small, **changed}))
    for path in (small["path"], small["msas"]["A"], small["templates"]["A"][0]):
        text = path.read_text()
        path.write_text(text.replace("A", "a", 1) if path.suffix == ".cif" else text.replace("aaa", "aac"))  # same size
        keys.append(cache.key(**small))
        path.write_text(text)
    moved = small["path"].with_name("another_name.cif")
    os.rename(small["path"], moved)
    assert cache.key(**{**small, "path": moved}) == keys[0]  # content, not a name
    assert len(set(keys)) == len(keys)
    with pytest.raises(FileNotFoundError):
        cache.key(**small)


def test_version_and_schema_count(small, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache")
    keys = {cache.key(**small)}
    monkeypatch.setattr(cache_module, "VERSION", 10**6)
    cache_module._made.cache_clear()
    keys.add(cache.key(**small))
    monkeypatch.setattr(cache_module, "RESTYPES", ("ALA",))
    cache_module._made.cache_clear()
    keys.add(cache.key(**small))
    monkeypatch.undo()
    cache_module._made.cache_clear()
    assert len(keys) == 3


def test_digests_are_remembered_only_of_settled_files(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    cache.key(**small)
    assert not cache._digests  # written just now
    for path in (small["path"], small["msas"]["A"], small["templates"]["A"][0]):
        os.utime(path, (time.time() - 100,) * 2)
    first = cache.key(**small)
    assert len(cache._digests) == 3
    small["msas"]["A"].write_text(small["msas"]["A"].read_text() + ">s\n" + "-" * 45 + "\n")
    assert cache.key(**small) != first


def test_nothing_broken_is_kept(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    small["msas"]["A"].write_text(">q\nAAAA\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="expected the query of"):
            cache.get(**small)
    assert files(cache) == []
    assert (cache.stats.hits, cache.stats.misses) == (0, 0)


def damage_byte(manifest, data):
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def damage_end(manifest, data):
    data.write_bytes(data.read_bytes()[:-100])


def damage_data(manifest, data):
    data.unlink()


def damage_text(manifest, data):
    manifest.write_text(manifest.read_text()[:-10])


def damage_shape(manifest, data):
    content = json.loads(manifest.read_text())
    content["arrays"]["coords"]["shape"].reverse()
    manifest.write_text(json.dumps(content))


def damage_name(manifest, data):
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"key": "another"}))


@pytest.mark.parametrize("damage", [damage_byte, damage_end, damage_data, damage_text, damage_shape, damage_name])
def test_damage(damage, small, tmp_path):
    cache, strict = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache", strict=True)
    built = cache.get(**small)
    key = cache.key(**small)
    assert cache.verify() == []
    damage(*files(cache))
    assert cache.verify() == [key]
    with pytest.raises(CacheCorruptionError, match=key):
        strict.get(**small)
    with pytest.warns(UserWarning, match="is damaged: .*; it is built anew"):
        again = cache.get(**small)
    assert_same(again, built)
    assert cache.stats.misses == 2
    assert cache.verify() == []
    assert_same(strict.get(**small), built)


def test_a_record_without_manifest_is_none(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache", strict=True)
    cache.get(**small)
    files(cache)[0].unlink()  # a writer that died between the two
    cache.get(**small)
    assert cache.stats.misses == 2


def test_pruning(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    given = [{**small, "options": {"max_msa_rows": rows}} for rows in (1, 2, 3)]
    keys = [cache.key(**one) for one in given]
    for age, one in zip((300, 200, 100), given):
        cache.get(**one)
        os.utime(cache._files(cache.key(**one))[0], (time.time() - age,) * 2)
    cache.get(**given[0])  # the oldest is used again
    stale = cache.folder / keys[0][:2] / "left.tmp"
    stale.write_bytes(bytes(10))
    os.utime(stale, (0, 0))
    total = sum(path.stat().st_size for path in files(cache)) - 10
    one = sum(path.stat().st_size for path in cache._files(keys[1]))
    assert cache.prune(total) == 10
    assert cache.prune(total - 1) == one
    assert cache._keys() == sorted([keys[0], keys[2]])
    assert cache.prune(0) == total - one
    assert files(cache) == []
    with pytest.raises(ValueError, match="max_bytes: expected at least 0, got -1"):
        cache.prune(-1)


def test_writers_at_once(small, tmp_path):
    """Many caches over one folder, one of them writing again and again: every read is whole, nothing is left."""
    caches = [FeatureCache(tmp_path / "cache", strict=True) for _ in range(6)]
    results = [None] * len(caches)

    def work(index):
        for _ in range(4):
            results[index] = caches[index].get(**small)
            if index == 0:
                caches[index]._write(caches[index].key(**small), results[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same(result, results[0])
    assert len(files(caches[0])) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="folder: cannot write to"):
        FeatureCache(tmp_path / "file" / "cache")

    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(cache_module.Path, "touch", refuse)
    with pytest.raises(PermissionError, match="folder: cannot write to"):
        FeatureCache(tmp_path / "cache")


def test_precompute(small, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    broken = tmp_path / "broken.cif"
    broken.write_text("words")
    results = cache.precompute([small, small["path"], broken], workers=1)
    assert [result.item for result in results] == [small["path"], small["path"], broken]
    assert [result.value for result in results] == [cache.key(**small), cache.key(small["path"]), None]
    assert "MMCIFError" in results[2].error
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)
    assert_same(cache.get(**small), fresh(small))
    assert cache.stats.hits == 1


def test_cached_and_uncached_batches_are_equal(small, tmp_path):
    config, cache = AF3Config.tiny(), FeatureCache(tmp_path / "cache")
    cache.get(**small)

    def batches(read):
        for step in range(3):
            key = jax.random.fold_in(jax.random.key(0), step)
            yield make_batch([crop(read(), key, max_tokens=32)], config, key)

    with Prefetch(batches(lambda: cache.get(**small))) as ahead:
        for cached, plain in zip(ahead, batches(lambda: fresh(small)), strict=True):
            assert_same(cached, plain)
    assert cache.stats.hits == 3


def test_prefetch_keeps_order_and_errors():
    def source():
        yield 1
        yield 2
        raise KeyError("third")

    with Prefetch(source()) as ahead:
        assert next(ahead) == 1
        assert next(ahead) == 2
        with pytest.raises(KeyError, match="third"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)
    assert list(Prefetch(range(5), depth=1)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        Prefetch([], depth=0)


def test_prefetch_reads_ahead_and_stops():
    made = []

    def source():
        for number in range(10**9):
            made.append(number)
            yield number

    ahead = Prefetch(source(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(made) == 5  # one taken, three ready, one in hand
    ahead.close()
    ahead.close()
    assert not ahead._thread.is_alive()
    assert len(made) <= 6
    assert list(ahead) == []
