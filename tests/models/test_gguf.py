import gguf
import jax
import numpy as np
import pytest

from benchmarks.gguf_writer import write_gguf
from jaxlab.models import load, load_pretrained
from jaxlab.models.gguf import GgufFile
from tests.models.checkpoints import golden, write


def rope_theta_of(config):
    return config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama", "llama"), ("smollm2", "llama"), ("mixtral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"),
     ("qwen3-moe", "qwen3moe")],
)  # fmt: skip
def test_a_gguf_file_holds_the_same_model_as_its_folder(tmp_path, name, arch):
    made = golden(name)
    write_gguf(tmp_path / "tiny.gguf", arch, made["config"], made["weights"])
    model, params = load_pretrained(tmp_path / "tiny.gguf")
    expected, expected_params = load_pretrained(write(tmp_path / "folder", name))
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    # A folder with nothing but that file is it.
    (tmp_path / "alone").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "alone" / "tiny.gguf")
    assert load_pretrained(tmp_path / "alone", dtype="bfloat16")[0].config.dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K"])
def test_dequantisation_is_the_reference_packages(tmp_path, kind):
    stored = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored]
    values = np.random.default_rng(0).normal(size=(2, 3, 256)).astype(np.float32)
    if kind == "Q6_K":  # the package reads it and does not write it
        raw = np.random.default_rng(0).integers(0, 60, (2, 3, 256 // block * size)).astype(np.uint8)
    else:
        raw = gguf.quantize(values, stored)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("x", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with load.open_tensors(tmp_path / "x.gguf") as tensors:
        assert list(tensors) == ["x"]
        assert len(tensors) == 1
        assert tensors.shape("x") == (2, 3, 256)
        expected = gguf.dequantize(raw, stored).reshape(2, 3, 256)
        np.testing.assert_array_equal(tensors["x"], expected)
        np.testing.assert_array_equal(tensors.read("x", (slice(1, 2), slice(0, 2))), expected[1:2, 0:2])
        assert tensors["x"].dtype == tensors.dtype("x")
        with pytest.raises(KeyError, match="has no tensor 'y'"):
            tensors["y"]


def test_header_values_are_those_that_the_reference_package_reads(tmp_path):
    made = golden("llama")
    write_gguf(tmp_path / "tiny.gguf", "llama", made["config"], made["weights"], kind="F16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    file = GgufFile(tmp_path / "tiny.gguf")
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert {name: file.metadata[name] for name in names} == {name: reader.fields[name].contents() for name in names}
    assert set(file) == {tensor.name for tensor in reader.tensors}
    assert file.kind("blk.0.attn_q.weight") == "F16"


def rewrite(path, change):
    """A llama file whose header or tensors `change(writer)` extends."""
    made = golden("llama")
    original = gguf.GGUFWriter.write_header_to_file

    def extended(self, *args, **kwargs):
        change(self)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", extended)
        write_gguf(path, "llama", made["config"], made["weights"])
    return path


def test_rotary_scalings(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    rope = load_pretrained(rewrite(tmp_path / "linear.gguf", linear))[0].config.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    rope = load_pretrained(rewrite(tmp_path / "yarn.gguf", yarn))[0].config.rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 2.0, 32)

    # Llama 3.1's divisors for this head size and base, from the formula of its reference code.
    theta, dim = rope_theta_of(golden("llama")["config"]), 4
    frequency = theta ** -(np.arange(0, dim, 2) / dim)
    wavelength = 2 * np.pi / frequency
    smooth = (8192 / wavelength - 1) / 3
    scaled = np.where(
        wavelength < 8192 / 4, frequency,
        np.where(wavelength > 8192, frequency / 32, (1 - smooth) * frequency / 32 + smooth * frequency),
    )  # fmt: skip
    divisors = (frequency / scaled).astype(np.float32)
    made = rewrite(tmp_path / "llama3.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    # At this small head no frequency is slow enough to tell 8 from 32; the numbers are the same with either.
    assert load_pretrained(made)[0].config.rope.rope_type == "llama3"
    other = rewrite(tmp_path / "o.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", divisors * 3))
    with pytest.raises(NotImplementedError, match="rope_freqs"):
        load_pretrained(other)

    def longrope(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with pytest.raises(NotImplementedError, match="rope scaling 'longrope'"):
        load_pretrained(rewrite(tmp_path / "long.gguf", longrope))


def test_unknown_architecture_and_tensor_type(tmp_path):
    made = golden("llama")
    write_gguf(tmp_path / "a.gguf", "gpt2", made["config"], made["weights"])
    with pytest.raises(NotImplementedError, match="architecture 'gpt2': known are llama"):
        load_pretrained(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", "llama", made["config"], made["weights"])
    content = bytearray((tmp_path / "b.gguf").read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    content[at] = 200
    (tmp_path / "b.gguf").write_bytes(content)
    with pytest.raises(NotImplementedError, match=r"'blk.0.attn_q.weight' has type number 200"):
        load_pretrained(tmp_path / "b.gguf")


def test_damaged_files(tmp_path):
    made = golden("llama")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", made["config"], made["weights"])
    content = path.read_bytes()
    for size, message in ((len(content) - 9, "is truncated: tensor"), (300, "does not parse"), (20, "does not parse")):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=message):
            load_pretrained(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + content[8:])
    with pytest.raises(NotImplementedError, match="GGUF version 9"):
        load_pretrained(path)
    for start in (b"", b"GGML" + content[4:]):
        path.write_bytes(start)
        with pytest.raises(ValueError, match="is not a GGUF file"):
            load_pretrained(path)
    del made["weights"]["model.layers.1.mlp.up_proj.weight"]
    write_gguf(path, "llama", made["config"], made["weights"])
    with pytest.raises(KeyError, match=r"missing weights \['model.layers.1.mlp.up_proj.weight'\]"):
        load_pretrained(path)
    unexpected = rewrite(path, lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)))
    with pytest.raises(KeyError, match=r"unexpected weights \['blk.0.attn_sinks.weight'\]"):
        load_pretrained(unexpected)


def test_impossible_metadata(tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(ValueError, match=r"general\.alignment must be a positive integer, got 0"):
        load_pretrained(rewrite(path, lambda writer: writer.add_uint32("general.alignment", 0)))
    per_layer = rewrite(path, lambda writer: writer.add_array("llama.expert_count", [1, 2]))
    with pytest.raises(NotImplementedError, match=r"llama\.expert_count differs from layer to layer"):
        load_pretrained(per_layer)
