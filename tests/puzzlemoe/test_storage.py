import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlab.core import make_mesh
from jaxlab.core.errors import CheckpointError
from jaxlab.models import load_pretrained, save_pretrained
from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, init_params
from jaxlab.puzzlemoe import (
    PuzzleConfig,
    collect_expert_stats,
    compress_checkpoint,
    compress_moe,
    load_hf_moe,
    load_packed,
    save_packed,
    unpack_moe,
)
from tests.models.checkpoints import golden, write
from tests.puzzlemoe.decoders import TOKENS, compressed, logits, original, same


def bytes_of_experts(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sum(leaf.nbytes for path, leaf in leaves if "experts" in str(path) and "_of" not in str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model"
    save_packed(path, *compressed(0.25))
    return path


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_round_trip(tmp_path, format):
    model, params, report = compressed(0.25)
    save_packed(tmp_path / "out", model, params, report, format=format)
    again, loaded = load_packed(tmp_path / "out")
    assert again == model
    same(params, loaded)
    assert json.loads((tmp_path / "out" / "compression_report.json").read_text()) == report.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save_packed(tmp_path / "out", model, params)  # a packed model may be replaced
    assert not (tmp_path / "out" / "compression_report.json").exists()


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_sizes_on_disk_and_in_memory(tmp_path, ratio):
    model, params, _ = compressed(ratio)
    save_packed(tmp_path / "out", model, params)
    before = 2 * 2 * 3 * 8 * 16 * 24
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # The addresses of experts are no weights; beside experts of real sizes they are nothing.
    on_disk = sum(array.nbytes for name, array in stored.items() if ".puzzlemoe." in name and "_of" not in name)
    assert on_disk <= (1.005 - ratio) * before
    assert bytes_of_experts(load_packed(tmp_path / "out")[1]) <= (1.005 - ratio) * before
    assert bytes_of_experts(load_pretrained(tmp_path / "out")[1]) <= (1.005 - ratio) * before


def test_a_packed_folder_opens_by_path(folder):
    model, params = load_pretrained(folder, max_position_embeddings=512)
    assert model.config.max_position_embeddings == 512
    same(params, compressed(0.25).params)
    half = load_pretrained(folder, dtype="bfloat16")[1]
    assert half["embed"]["embedding"].dtype == jnp.bfloat16
    same(half["blocks_1"]["mlp"]["experts"], params["blocks_1"]["mlp"]["experts"])


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_mesh_gets_its_shards(tmp_path, format):
    model, params, _ = compressed()
    save_packed(tmp_path / "out", model, params, format=format)
    mesh = make_mesh({"expert": 4, "tensor": 2})
    model, sharded = load_packed(tmp_path / "out", mesh=mesh)
    experts = sharded["blocks_1"]["mlp"]["experts"]
    assert experts.gate.addressable_shards[0].data.shape == (2, 1, 16, 12)
    assert experts.down.addressable_shards[0].data.shape == (2, 1, 12, 16)
    same(params, sharded)
    if format == "safetensors":
        with jax.set_mesh(mesh):
            ours = logits(model, sharded, TOKENS[0])
        np.testing.assert_allclose(ours, logits(model, params, TOKENS[0]), rtol=1e-4, atol=1e-4)


def test_a_killed_save_leaves_no_folder(tmp_path):
    code = (
        "import os, signal, sys\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from jaxlab.puzzlemoe.storage import Shards, new_folder\n"
        "with new_folder(sys.argv[1]) as partial:\n"
        "    shards = Shards(partial)\n"
        "    shards.add('a', np.zeros(3))\n"
        "    shards.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


def test_loading_and_saving_refuse(folder, tmp_path, unchecked):
    model, params, _ = compressed(0.25)
    with pytest.raises(ValueError, match="format must be one of safetensors, orbax"):
        save_packed(tmp_path / "out", model, params, format="pickle")
    with pytest.raises(ValueError, match="packed experts"):
        save_packed(tmp_path / "out", *original())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="other"):
        save_packed(tmp_path / "other", model, params)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_packed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown configuration fields"):
        load_packed(folder, depth=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]

    broken = tmp_path / "broken"
    save_packed(broken, model, params)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    words = tensors.pop("model.layers.1.puzzlemoe.gate")
    save_file(tensors, file)
    with pytest.raises(KeyError, match=r"model\.layers\.1\.puzzlemoe\.gate"):
        load_packed(broken)
    save_file(tensors | {"model.layers.1.puzzlemoe.gate": words.astype(np.int32)}, file)
    with pytest.raises(ValueError, match="must be uint16, got int32"):
        load_packed(broken)
    save_file(tensors | {"model.layers.1.puzzlemoe.gate": words[:1]}, file)
    with pytest.raises(ValueError, match="wrong shapes"):
        load_packed(broken)
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**content, "puzzlemoe": {"version": 9}}))
    with pytest.raises(ValueError, match="version 9"):
        load_packed(broken)
    save_packed(broken, model, params, format="orbax")
    next((broken / "checkpoint").rglob("manifest.json")).unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load_packed(broken)


@pytest.mark.parametrize(
    ("name", "calibrated"), [("mixtral", True), ("qwen2-moe", False), ("deepseek", True), ("olmoe", False)]
)
def test_a_folder_streams_to_the_words_of_memory(tmp_path, name, calibrated):
    source = write(tmp_path / "in", name)
    (source / "tokenizer_config.json").write_text("{}")
    calib = golden(name)["tokens"] if calibrated else None
    report = compress_checkpoint(source, tmp_path / "out", PuzzleConfig(seed=3), calib=calib)
    model, params = load_hf_moe(source)
    stats = collect_expert_stats(model, params, [calib]) if calibrated else None
    expected_model, expected, expected_report = compress_moe(model, params, stats, PuzzleConfig(seed=3))
    opened, loaded = load_packed(tmp_path / "out")
    assert opened == expected_model
    same(expected, loaded)
    assert report.to_dict() == expected_report.to_dict()
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    save_pretrained(tmp_path / "plain", *unpack_moe(opened, loaded))  # and back to Hugging Face's names
    same(load_pretrained(tmp_path / "plain")[1], unpack_moe(opened, loaded)[1])


def test_fused_experts_stream_too(tmp_path):
    def fuse(weights):
        for layer in range(2):
            prefix = f"model.layers.{layer}.block_sparse_moe"
            w1, w2, w3 = (
                np.stack([weights.pop(f"{prefix}.experts.{e}.{kind}.weight") for e in range(4)])
                for kind in ("w1", "w2", "w3")
            )
            weights[f"model.layers.{layer}.mlp.gate.weight"] = weights.pop(f"{prefix}.gate.weight")
            weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], 1)
            weights[f"model.layers.{layer}.mlp.experts.down_proj"] = w2

    for name, change in (("fused", fuse), ("single", None)):
        source = write(tmp_path / f"in-{name}", "mixtral", change)
        compress_checkpoint(source, tmp_path / name, PuzzleConfig())
    same(load_packed(tmp_path / "fused")[1], load_packed(tmp_path / "single")[1])


def test_streaming_refuses_and_leaves_nothing(tmp_path, unchecked):
    out = tmp_path / "out"

    def refused(error, match, source, **settings):
        with pytest.raises(error, match=match):
            compress_checkpoint(source, out, PuzzleConfig(), **settings)
        assert not [path for path in tmp_path.iterdir() if path.name in ("out", ".out.partial")]

    good = write(tmp_path / "good", "mixtral")
    refused(FileNotFoundError, "nowhere", tmp_path / "nowhere")
    refused(ValueError, "no MoE layers found", write(tmp_path / "dense", "llama"))
    with pytest.raises(ValueError, match="no MoE layers found"):
        load_hf_moe(tmp_path / "dense")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    refused(KeyError, lost, write(tmp_path / "lost", "mixtral", lambda weights: weights.pop(lost)))

    def poison(weights):
        weights[lost][0, 0] = np.inf

    refused(ValueError, r"layer 1: up.*finite.*\{2: 1\}", write(tmp_path / "inf", "mixtral", poison))
    refused(ValueError, "token ids", good, calib=np.full((1, 3), 40))
    refused(ValueError, "experts 0..3", good, pairs=np.array([[0, 4]]))
    compress_checkpoint(good, tmp_path / "packed", PuzzleConfig())
    refused(ValueError, "packed already", tmp_path / "packed")
    with pytest.raises(FileExistsError, match="good"):
        compress_checkpoint(good, good, PuzzleConfig())
    assert (good / "model.safetensors").exists()


def test_a_decoder_without_a_hugging_face_form_is_saved_too(tmp_path):
    config = DecoderConfig(40, 16, 24, 1, 2, 1, moe=MoESpec(4, 2, 8, scoring="sigmoid", scale=2.0))
    model = Decoder(config)
    model, params, _ = compress_moe(model, init_params(model, jax.random.key(0)), None, PuzzleConfig())
    save_packed(tmp_path / "out", model, params)
    assert load_packed(tmp_path / "out")[0] == model
