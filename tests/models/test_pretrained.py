import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.parity import PEERS
from jaxlab.core.mesh import make_mesh
from jaxlab.models import ByteTokenizer, load, load_pretrained, load_tokenizer, save_pretrained
from jaxlab.models.decoder import DecoderConfig, default_mlp
from jaxlab.models.decoder.weights import decoder_table
from tests.models.checkpoints import golden, write


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stored(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", sorted(PEERS))
def test_saving_what_was_loaded_gives_the_same_names_and_numbers(tmp_path, name):
    source = write(tmp_path / "in", name)
    model, params = load_pretrained(source)
    save_pretrained(tmp_path / "out", model, params)
    before, after = stored(source), stored(tmp_path / "out")
    assert set(before) - {"lm_head.weight"} == set(after) - {"lm_head.weight"}
    same({key: before[key] for key in after}, after)
    again, params_again = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    same(params, params_again)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.latest
def test_shards_with_an_index_load_as_one_file_does(tmp_path):
    model, params = load_pretrained(write(tmp_path / "in", "qwen3-moe"))
    save_pretrained(tmp_path / "out", model, params, max_shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    same(load_pretrained(tmp_path / "out")[1], params)


def test_fused_experts_load_as_single_ones_do(tmp_path):
    def fuse(weights):
        for layer in range(2):
            prefix = f"model.layers.{layer}.block_sparse_moe"
            stack = {
                kind: np.stack([weights.pop(f"{prefix}.experts.{expert}.{kind}.weight") for expert in range(4)])
                for kind in ("w1", "w2", "w3")
            }
            weights[f"model.layers.{layer}.mlp.gate.weight"] = weights.pop(f"{prefix}.gate.weight")
            weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([stack["w1"], stack["w3"]], 1)
            weights[f"model.layers.{layer}.mlp.experts.down_proj"] = stack["w2"]

    same(
        load_pretrained(write(tmp_path / "fused", "mixtral", fuse))[1],
        load_pretrained(write(tmp_path / "single", "mixtral"))[1],
    )


@pytest.mark.latest
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 4}, {"data": 2, "expert": 2, "tensor": 2}])
def test_a_mesh_gets_its_shards_and_nothing_more(tmp_path, axes):
    source = write(tmp_path / "in", "mixtral")
    whole = load_pretrained(source)[1]
    mesh = make_mesh(axes)
    model, params = load_pretrained(source, mesh=mesh)
    same(whole, params)
    gate = params["blocks_0"]["mlp"]["gate"]
    shards = {shard.data.shape for shard in gate.addressable_shards}
    assert shards == ({(2, 4, 8, 4)} if "fsdp" in axes else {(2, 2, 16, 8)})
    # Two key heads do not divide over four devices: that leaf is whole on each, split over fsdp alone.
    assert params["blocks_0"]["attn"]["k"]["kernel"].sharding.mesh == mesh
    save_pretrained(tmp_path / "out", model, params)
    same(stored(source), stored(tmp_path / "out"))


def test_experts_of_other_hosts_are_never_read(tmp_path):
    source = write(tmp_path / "in", "mixtral")
    with load.open_tensors(source) as tensors:
        leaf = next(leaf for leaf in decoder_table(DecoderConfig.from_hf(source)) if leaf.path == "blocks_0/mlp/up")
        read = []

        class Spy(load.Tensors):
            def read(self, name, select=()):
                read.append(name)
                return tensors.read(name, select)

        class Half(jax.sharding.SingleDeviceSharding):
            """Stands for a host that holds the first two experts."""

            def addressable_devices_indices_map(self, shape):
                return {jax.devices()[0]: (slice(None), slice(0, 2))}

        with pytest.raises(ValueError, match="shape"):  # one device cannot hold half an array; reading came before
            load.fill(Spy(), leaf, "float32", Half(jax.devices()[0]))
        assert {name.split(".experts.")[1][0] for name in read} == {"0", "1"}
        one = load.read_part(tensors, leaf, 1, 3)
        np.testing.assert_array_equal(one, tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"].T)
        with pytest.raises(IndexError, match="blocks_0/mlp/up"):
            load.read_part(tensors, leaf, 1, 9)


def test_dtype_and_overrides(tmp_path):
    source = write(tmp_path / "in", dtype=jnp.bfloat16)
    model, params = load_pretrained(source, dtype="bfloat16", remat="block", scan=False)
    assert (model.config.dtype, model.config.param_dtype, model.config.remat) == ("bfloat16", "bfloat16", "block")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    save_pretrained(tmp_path / "out", model, params)
    same(stored(source), stored(tmp_path / "out"))
    save_pretrained(tmp_path / "wide", model, params, dtype="float32")
    assert {value.dtype for value in stored(tmp_path / "wide").values()} == {np.dtype("float32")}
    assert load_pretrained(source, param_dtype="float16")[0].config.dtype == "float32"
    with pytest.raises(ValueError, match=r"'remt'.*'remat'"):
        load_pretrained(source, remt="block")


def test_an_mlp_with_the_same_parameters_takes_the_place_of_the_default(tmp_path):
    source = write(tmp_path / "in", "qwen2-moe")

    def mlp(config, sparse):
        return default_mlp(config, sparse)

    model, params = load_pretrained(source, mlp=mlp)
    assert model.mlp is mlp
    same(params, load_pretrained(source)[1])

    def narrow(config, sparse):
        return default_mlp(dataclasses.replace(config, intermediate_size=8), sparse)

    with pytest.raises(ValueError, match=r"parameters of this mlp.*blocks_0/mlp/down/kernel"):
        load_pretrained(source, mlp=narrow)


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    def change(weights):
        del weights["model.norm.weight"]
        weights["model.layers.1.mlp.gate_projection.weight"] = weights.pop("model.layers.1.mlp.gate_proj.weight")

    with pytest.raises(KeyError) as error:
        load_pretrained(write(tmp_path, change=change))
    message = str(error.value)
    assert "missing weights ['model.layers.1.mlp.gate_proj.weight', 'model.norm.weight']" in message
    assert "unexpected weights ['model.layers.1.mlp.gate_projection.weight']" in message


def test_misshaped_weights_are_listed(tmp_path):
    def change(weights):
        weights["model.norm.weight"] = np.ones(15, np.float32)
        weights["lm_head.weight"] = weights["lm_head.weight"].T.copy()

    with pytest.raises(ValueError, match=r"lm_head.weight expected \(40, 16\), got \(16, 40\); model.norm.weight exp"):
        load_pretrained(write(tmp_path, change=change))


def test_buffers_of_old_files_and_a_tied_head_are_no_surprise(tmp_path):
    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    assert "head" not in load_pretrained(write(tmp_path, "smollm2", change))[1]


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_truncated_file(tmp_path, size):
    file = write(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size] if size >= 0 else content[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_pretrained(tmp_path)


def test_damaged_index(tmp_path):
    model, params = load_pretrained(write(tmp_path / "in"))
    save_pretrained(tmp_path / "out", model, params, max_shard_bytes=9_000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))

    def reload(change, error, match):
        changed = json.loads(json.dumps(index))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(error, match=match):
            load_pretrained(tmp_path / "out")

    name = next(name for name, file in index["weight_map"].items() if file == last)
    reload(lambda i: i["weight_map"].update({name: "gone.safetensors"}), FileNotFoundError, "gone.safetensors")
    reload(lambda i: i["weight_map"].update({name: first}), ValueError, "does not hold what the index")
    reload(lambda i: i["weight_map"].update({name: "../in/model.safetensors"}), ValueError, "outside its folder")
    reload(lambda i: i.pop("weight_map"), ValueError, "is not an index")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not an index"):
        load_pretrained(tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither .*model\.safetensors nor"):
        load_pretrained(tmp_path / "out")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": np.ones(2, np.float32)}, str(tmp_path / f"{name}.safetensors"))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(ValueError, match="'x' is in both"):
        load.SafetensorsTensors(files, tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_config(tmp_path, content):
    (write(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(tmp_path)


def test_unknown_family(tmp_path):
    config = golden("llama")["config"] | {"model_type": "gpt2"}
    (write(tmp_path) / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="'gpt2': known families are llama, mistral"):
        load_pretrained(tmp_path)


def test_absent_sources_name_the_places_searched(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLAB_MODELS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"org/name.*JAXLAB_MODELS is not set"):
        load_pretrained("org/name")
    monkeypatch.setenv("JAXLAB_MODELS", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained("org/name")
    assert all(str(tmp_path / root / "org/name") in str(error.value) for root in "ab")
    write(tmp_path / "b" / "org" / "name")
    assert load_pretrained("org/name")[0].config.vocab_size == 40
    with pytest.raises(FileNotFoundError, match="no distribution 'no-such-model' is installed"):
        load_pretrained("package:no-such-model")
    with pytest.raises(FileNotFoundError, match="expected one model among its files"):
        load_pretrained("package:pytest")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json, and 0 \.gguf files"):
        load_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"expected a folder or a \.gguf file"):
        load_pretrained(tmp_path / "b" / "org" / "name" / "model.safetensors")


def test_formats_of_higher_floors_come_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"jaxlab_format": "packed"}))
    with pytest.raises(NotImplementedError, match="jaxlab_format 'packed': known formats are"):
        load_pretrained(tmp_path)
    calls = []

    def loader(folder, **options):
        calls.append((folder, options))
        return "model", "params"

    point = types.SimpleNamespace(name="packed", load=lambda: loader)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "jaxlab.loaders" else [])
    assert load_pretrained(tmp_path, dtype="bfloat16", remat="block") == ("model", "params")
    (folder, options) = calls[0]
    assert folder == tmp_path
    assert options.keys() == {"dtype", "mesh", "rules", "mlp", "remat"}


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    model, params = load_pretrained(write(tmp_path / "in"))
    save_pretrained(tmp_path / "out", model, params)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "out", model, jax.tree.map(jnp.zeros_like, params))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_killed_save_leaves_no_half_written_folder(tmp_path):
    source = write(tmp_path / "in")
    program = f"""
import os, signal, safetensors.numpy
from jaxlab.models import load_pretrained, save_pretrained
model, params = load_pretrained({str(source)!r})
write = safetensors.numpy.save_file
def write_then_die(tensors, path, metadata):
    write(tensors, path, metadata)
    if path.endswith("2.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.numpy.save_file = write_then_die
save_pretrained({str(tmp_path / "out")!r}, model, params, max_shard_bytes=9000)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    model, params = load_pretrained(source)
    save_pretrained(tmp_path / "out", model, params)  # what the killed one left is cleared away
    same(load_pretrained(tmp_path / "out")[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_only_model_folders_are_replaced(tmp_path):
    model, params = load_pretrained(write(tmp_path / "in"))
    out = tmp_path / "out"
    save_pretrained(out, model, params, max_shard_bytes=9_000)
    save_pretrained(out, model, params)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_pretrained(out, model, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(tmp_path / "file", model, params)


def test_foreign_parameters_are_not_saved(tmp_path):
    model, params = load_pretrained(write(tmp_path / "in"))
    with pytest.raises(KeyError, match=r"missing \['head/kernel'\]"):
        save_pretrained(tmp_path / "out", model, {key: value for key, value in params.items() if key != "head"})
    wrong = params | {"final_norm": {"scale": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"final_norm/scale expected \(16,\), got \(3,\)"):
        save_pretrained(tmp_path / "out", model, wrong)
    with pytest.raises(TypeError, match="tokenizer: expected one with save_pretrained"):
        save_pretrained(tmp_path / "out", model, params, tokenizer=object())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_tokenizer_travels_along(tmp_path):
    model, params = load_pretrained(write(tmp_path / "in"))
    save_pretrained(tmp_path / "out", model, params, tokenizer=ByteTokenizer())
    assert isinstance(load_tokenizer(tmp_path / "out"), ByteTokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 257
    same(load_pretrained(tmp_path / "out")[1], params)
    save_pretrained(tmp_path / "out", model, params)
    shutil.rmtree(tmp_path / "out")
