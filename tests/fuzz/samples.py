"""Small valid files of formats that several tests change."""

import functools
import io
import json
import struct
from pathlib import Path

import numpy as np


def png(width, height, seed=0):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(252, 256, (height, width, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def picture(kind):
    """A photograph's file, turned by its EXIF data where it may hold them; a GIF has two frames."""
    from PIL import Image

    first, second = (Image.open(io.BytesIO(png(8, 8, seed))).convert("RGB") for seed in (0, 1))
    buffer = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    options = {"gif": {"save_all": True, "append_images": [second]}, "jpeg": {"exif": turned}, "webp": {"exif": turned}}
    first.save(buffer, kind, **options[kind])
    return buffer.getvalue()


COLMAP_CAMERAS = struct.pack("<Q", 1) + struct.pack("<iiQQ4d", 1, 1, 64, 48, 50.0, 50.0, 32.0, 24.0)
COLMAP_IMAGES = (
    struct.pack("<Q", 1) + struct.pack("<i7di", 1, 1, 0, 0, 0, 0.0, 0.0, 1.0, 1) + b"a.png\0" + struct.pack("<Q", 0)
)
TRANSFORMS = {
    "camera_angle_x": 0.7,
    "w": 8,
    "h": 8,
    "k1": 0.1,
    "frames": [
        {"file_path": "a.png", "transform_matrix": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1.0, 4], [0, 0, 0, 1]]},
        {"file_path": "./a.png", "fl_x": 5.0, "cx": 4, "transform_matrix": np.eye(4).tolist()},
    ],
}


def safetensors_of_three():
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    return save({"a": rng.random((3, 4), np.float32), "b": np.arange(5), "c": np.float16([[1]])})


@functools.cache
def gguf_model(kind):
    import tempfile

    from benchmarks.gguf_writer import write_gguf
    from tests.models.checkpoints import golden

    made = golden("llama")
    few = {name: value[:64] if value.ndim == 1 else value[:8] for name, value in list(made["weights"].items())[:4]}
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "x.gguf", "llama", made["config"], few, kind)
        return (Path(folder) / "x.gguf").read_bytes()


@functools.cache
def gguf_tokens():
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(str(Path(folder) / "x.gguf"), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "x"])
        writer.add_token_types([3, 3, 1, 1, 1, 4])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return (Path(folder) / "x.gguf").read_bytes()


@functools.cache
def packed_config():
    import tempfile

    from jaxlab.puzzlemoe.packed_moe import PackedPolicy
    from jaxlab.puzzlemoe.storage import write_config
    from tests.puzzlemoe.decoders import CONFIG

    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), CONFIG.to_hf(), CONFIG, PackedPolicy(2), "safetensors")
        return json.loads((Path(folder) / "config.json").read_text())
