import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlab.core import Checkpointer, CheckpointError, make_mesh


@flax.struct.dataclass
class State:
    step: int
    params: dict
    opt_state: tuple
    rng: jax.Array


def _state(seed=0):
    params = {
        "blocks": [{"w": jax.random.normal(jax.random.key(seed), (4, 6)), "b": jnp.zeros(6, jnp.bfloat16)}],
        "a.b": 1.5,
    }
    return State(3, params, optax.adam(1e-3).init({"w": jnp.ones(3)}), jax.random.key(seed))


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that tests copy before they damage it."""
    folder = tmp_path_factory.mktemp("saved")
    Checkpointer(folder).save(7, _state(), {"position": 3})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.latest
def test_a_training_state_comes_back(saved):
    state = _state()
    got, extra = Checkpointer(saved).restore(_state(seed=1))
    _assert_equal(got, state)
    assert extra == Checkpointer(saved).extra() == {"position": 3}
    assert jax.random.key_impl(got.rng) == jax.random.key_impl(state.rng)
    # `like` may be abstract; a Python number then comes back as the array that it is there.
    got, _ = Checkpointer(saved).restore(jax.eval_shape(lambda: _state()))
    np.testing.assert_array_equal(got.params["blocks"][0]["w"], state.params["blocks"][0]["w"])
    assert (int(got.step), float(got.params["a.b"])) == (3, 1.5)


def test_odd_leaves(tmp_path):
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    state = {
        **{"int": 2**80, "float": 0.1, "bool": True, "text": "é", "none": None, "empty": {}},
        **{"numpy": np.arange(3), "scalar": np.float32(2), "zero size": jnp.zeros((0, 3)), "int8": jnp.int8([1, 2])},
        **{"keys": keys, "no keys": keys[:0], "raw key": jax.random.PRNGKey(1)},
    }
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, state)
    got, extra = checkpointer.restore(state)
    _assert_equal(got, state)
    assert extra is None
    checkpointer.save(1, {})
    assert checkpointer.restore({}) == ({}, None)
    checkpointer.save(2, jnp.ones(2))
    np.testing.assert_array_equal(checkpointer.restore(jnp.zeros(2))[0], np.ones(2))


def test_shardings_and_devices_are_those_of_like(tmp_path):
    mesh = make_mesh({"data": 8})
    spread = NamedSharding(mesh, PartitionSpec("data"))
    weights = jnp.arange(16.0).reshape(8, 2)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(
        0,
        {"w": jax.device_put(weights, spread), "host": jax.device_put(weights, spread.with_memory_kind("pinned_host"))},
    )
    like = {
        "w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[5])),
        "host": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=spread.with_memory_kind("pinned_host")),
    }
    got, _ = checkpointer.restore(like)
    assert got["w"].devices() == {jax.devices()[5]}
    assert got["host"].sharding.memory_kind == "pinned_host"
    # What was free to move stays free: a restored step counter must not pin a jitted step to one device.
    free, _ = checkpointer.restore({"w": weights, "host": jax.ShapeDtypeStruct((8, 2), jnp.float32)})
    assert not free["w"].committed
    assert not free["host"].committed
    np.testing.assert_array_equal(jax.jit(jnp.add)(free["w"], jax.device_put(weights, spread)), 2 * weights)


def test_keeps_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path / "deep" / "folder", keep=2)
    assert checkpointer.latest() is None
    for step in (10, 9, 100):
        checkpointer.save(step, {"n": step})
    assert checkpointer.steps() == (10, 100)
    assert checkpointer.latest() == 100
    assert checkpointer.restore({"n": 0}) == ({"n": 100}, None)
    assert checkpointer.restore({"n": 0}, step=10)[0] == {"n": 10}
    checkpointer.save(100, {"n": -1})  # again
    assert checkpointer.restore({"n": 0})[0] == {"n": -1}
    everything = Checkpointer(tmp_path / "all", keep=None)
    for step in range(5):
        everything.save(step, {"n": step})
    assert everything.steps() == (0, 1, 2, 3, 4)


def test_nothing_to_restore(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpointer(tmp_path).extra()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpointer(tmp_path / "absent").restore({})
    (tmp_path / "12").mkdir()
    (tmp_path / ".saving-13").mkdir()
    (tmp_path / "14").write_text("a file")
    assert Checkpointer(tmp_path).latest() is None
    with pytest.raises(FileNotFoundError, match=r"step 3 .*steps there: 7"):
        Checkpointer(saved).restore(_state(), step=3)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "flip"])
@pytest.mark.parametrize("which", ["manifest.json", "data", "_METADATA", "manifest.ocdbt"])
def test_damage_is_found(copy, which, damage):
    files = [path for path in (copy / "7").rglob("*") if path.is_file()]
    if which == "data":
        files = [path for path in files if path.parent.name == "d"]
    else:
        files = [path for path in files if path.name == which]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    elif damage == "flip":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
    else:
        victim.write_bytes(content[: len(content) // 2 if damage == "truncate" else 0])
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(copy).restore(_state())
    assert f"checkpoint {copy}, step 7: " in str(caught.value)
    assert victim.name in str(caught.value)


def test_every_missing_file_is_found(saved, tmp_path):
    for number, file in enumerate(path for path in (saved / "7").rglob("*") if path.is_file()):
        shutil.copytree(saved, tmp_path / str(number))
        (tmp_path / str(number) / file.relative_to(saved)).unlink()
        with pytest.raises(CheckpointError, match=file.name):
            Checkpointer(tmp_path / str(number)).restore(_state())


def test_foreign_folders(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        orbax.save(tmp_path / "4", args=ocp.args.PyTreeSave({"w": np.ones(2)}))
    with pytest.raises(CheckpointError, match=r"step 4: manifest\.json is missing"):
        Checkpointer(tmp_path).restore({"w": np.ones(2)})
    for text in ("[]", '{"format": "jaxlab.checkpoint/99"}', "not JSON"):
        (tmp_path / "4" / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"step 4: manifest\.json"):
            Checkpointer(tmp_path).restore({"w": np.ones(2)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.replace(params={**s.params, "new": 1}), ["'params/new' is wanted but not saved"]),
        (
            lambda s: s.replace(params={"a.b": 1.5}),
            ["'params/blocks/0/b', 'params/blocks/0/w' is saved but not wanted"],
        ),
        (lambda s: s.replace(rng=jnp.zeros(2, jnp.uint32)), ["'rng' was saved as key<fry>[]", "uint32[2]"]),
        (lambda s: s.replace(rng=jax.random.key(0, impl="rbg")), ["'rng' was saved as key<fry>[]", "key<rbg>[]"]),
        (lambda s: s.replace(step=jnp.float32(1)), ["'step' was saved as Python int", "float32[]"]),
        (lambda s: s.replace(step="x"), ["'step' was saved as int", "str"]),
        (lambda s: s.replace(params={**s.params, "a.b": jnp.ones(2)}), ["'params/a.b'", "Python float", "float32[2]"]),
        (
            lambda s: jax.tree.map(lambda x: x[:3] if getattr(x, "shape", 0) == (4, 6) else x, s),
            ["'params/blocks/0/w' was saved as float32[4, 6], expected float32[3, 6]"],
        ),
        (
            lambda s: jax.tree.map(lambda x: x.astype(jnp.float16) if getattr(x, "shape", 0) == (4, 6) else x, s),
            ["'params/blocks/0/w' was saved as float32[4, 6], expected float16[4, 6]"],
        ),
    ],
)
def test_what_does_not_fit_is_named(saved, change, words):
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(saved).restore(change(_state()))
    for word in [f"checkpoint {saved}, step 7", *words]:
        assert word in str(caught.value)


def test_what_cannot_be_saved(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    for state, extra, error, words in [
        ({"f": len}, None, TypeError, "leaf 'f' is builtin"),
        ({"o": np.array([None])}, None, TypeError, "leaf 'o'"),
        ({}, {"x": object()}, TypeError, "extra"),
        ({"a/b": 1, "a": {"b": 2}}, None, ValueError, "same path"),
    ]:
        with pytest.raises(error, match=words):
            checkpointer.save(0, state, extra)
    for step in (-1, True):
        with pytest.raises(ValueError, match="step"):
            checkpointer.save(step, {})
    with pytest.raises(ValueError, match="keep"):
        Checkpointer(tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []


class _Stop(Exception):
    pass


class _Point(NamedTuple):
    owner: object
    name: str


@pytest.mark.parametrize("call", [_Point(os, "rename"), _Point(shutil, "rmtree"), _Point(os, "fsync")])
def test_a_save_that_fails_changes_nothing(copy, call, monkeypatch):
    """Whatever fails on the way (a full disk, a signal), the old step is whole and the next save works."""
    checkpointer = Checkpointer(copy, keep=1)

    def fail(*_, **__):
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(call.owner, call.name, fail)
        with pytest.raises(_Stop):
            checkpointer.save(8, _state(2))
    visible = checkpointer.latest()  # the new step, if what failed is the removal of the old one after it
    assert visible in ((7, 8) if call.name == "rmtree" else (7,))
    _assert_equal(checkpointer.restore(_state())[0], _state(0 if visible == 7 else 2))
    checkpointer.save(9, _state(3))
    assert checkpointer.steps() == (9,)
    assert [path.name for path in copy.iterdir()] == ["9"]
    _assert_equal(checkpointer.restore(_state())[0], _state(3))


_SAVER = """
import sys
import numpy as np
from jaxlab.core import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
start = -1 if checkpointer.latest() is None else checkpointer.latest()
for step in range(start + 1, 10**6):
    checkpointer.save(step, {"w": np.full((64, 1024), step, np.float32), "step": step}, {"step": step})
    print(step, flush=True)
"""


def test_kill_at_a_random_moment(tmp_path):
    """Real kills: each saver is killed twice, started again on the same folder in between."""
    like = {"w": np.zeros((64, 1024), np.float32), "step": 0}
    folders = [tmp_path / str(number) for number in range(2)]
    for turn in range(2):
        savers = [
            subprocess.Popen([sys.executable, "-c", _SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
            for folder in folders
        ]
        for folder, saver in zip(folders, savers):
            for _ in range(2):
                confirmed = int(saver.stdout.readline())
            time.sleep(random.Random(turn).uniform(0.0, 0.1))
            os.kill(saver.pid, signal.SIGKILL)
            confirmed = int((saver.stdout.read().split() or [confirmed])[-1])
            saver.wait()
            checkpointer = Checkpointer(folder)
            latest = checkpointer.latest()
            assert latest in (confirmed, confirmed + 1)  # the rename may have come before the confirmation
            for step in checkpointer.steps():
                state, extra = checkpointer.restore(like, step)
                assert state["step"] == extra["step"] == step
                np.testing.assert_array_equal(state["w"], np.full((64, 1024), step))
