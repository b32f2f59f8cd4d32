"""What fuzzing has found, each as small as it gets; unmended, each raised another error, took all memory, or hung."""

import gzip
import io
import json
import struct

import numpy as np
import pytest

from tests.fuzz.mutations import bounded, npy, text_of, zipped
from tests.fuzz.samples import (
    COLMAP_CAMERAS,
    COLMAP_IMAGES,
    TRANSFORMS,
    gguf_model,
    gguf_tokens,
    packed_config,
    picture,
    png,
)

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(call, message, errors=(ValueError,)):
    """Within bounds of memory and time."""

    def told():
        with pytest.raises(errors, match=message):
            call()

    bounded(told, ())


def test_gguf_arrays_in_arrays(tmp_path):
    from jaxlab.models.gguf import GgufFile

    nested = struct.pack("<IQ", 9, 1) * 100_000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    (tmp_path / "a.gguf").write_bytes(head + nested)
    refused(lambda: GgufFile(tmp_path / "a.gguf"), "nested more than 8 deep")


@pytest.mark.parametrize("rank", [0, 9, 100_000])
def test_gguf_dimensions(tmp_path, rank):
    from jaxlab.models.gguf import GgufFile

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", rank)
    (tmp_path / "a.gguf").write_bytes(head + struct.pack("<Q", 1 << 62) * rank + struct.pack("<IQ", 0, 0))
    refused(lambda: GgufFile(tmp_path / "a.gguf"), f"expected 1 to 8 dimensions, got {rank}")


def test_gguf_metadata_of_other_types(tmp_path):
    from jaxlab.models.gguf import GgufFile, hf_config

    (tmp_path / "a.gguf").write_bytes(gguf_model("F32"))
    file = GgufFile(tmp_path / "a.gguf")
    for name, value in (("attention.head_count", "many"), ("attention.head_count", 0), ("rope.freq_base", "x")):
        file.metadata = GgufFile(tmp_path / "a.gguf").metadata | {
            f"llama.{name}": value,
            "llama.attention.key_length": 0,
        }
        if name != "rope.freq_base":
            refused(lambda: hf_config(file), "GGUF metadata is not understood")


def test_gguf_tokens_of_other_types(tmp_path):
    from jaxlab.models import load_tokenizer

    content = gguf_tokens().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.merged")
    (tmp_path / "a.gguf").write_bytes(content)
    refused(lambda: load_tokenizer(tmp_path / "a.gguf"), "the tokenizer in its metadata is damaged")


def test_safetensors_of_unknown_dtypes(tmp_path):
    from jaxlab.models import load

    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with load.open_tensors(tmp_path / "a.safetensors") as tensors:
        refused(lambda: tensors.dtype("a"), "dtype F8_E8M0, which is not read", NotImplementedError)


LLAMA = {
    **{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 8},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be 1 to 10000|num_hidden_layers.*1 to 10000"),
        ({"hidden_size": "x"}, "is not understood"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rope_scaling": 3}, "is not understood"),
    ],
)
def test_sizes_of_a_decoder(tmp_path, change, message):
    from jaxlab.models.decoder import DecoderConfig

    DecoderConfig.from_hf(LLAMA)
    (tmp_path / "config.json").write_bytes(text_of(LLAMA | change))
    refused(lambda: DecoderConfig.from_hf(tmp_path).layer_runs(), message)


def test_documents_that_are_no_objects(tmp_path):
    """`null` where an object was expected, and JSON that is nested as deep as Python's stack."""
    from jaxlab.core import Report, jsonl
    from jaxlab.instantedit.checkpoint import _check_scheduler
    from jaxlab.megafold.data.jobs import read_job
    from jaxlab.models import load, load_tokenizer
    from jaxlab.models.clip import load_clip
    from jaxlab.models.vit import load_vit

    (tmp_path / "tokenizer.json").write_text("{}")
    readers = {
        "config.json": [load_clip, load_vit],
        "tokenizer_config.json": [load_tokenizer],
        "scheduler_config.json": [_check_scheduler],
        "model.safetensors.index.json": [load.open_tensors],
        "report.json": [Report.load],
    }
    for content in (b"null", b"[]", b"[" * 100_000):
        for name, each in readers.items():
            (tmp_path / name).write_bytes(content)
            for read in each:
                refused(lambda read=read: read(tmp_path), "JSON|expected an object|not an index|expected a report")
    for path, read in ((tmp_path / "job.json", read_job), (tmp_path / "a.jsonl", jsonl.read)):
        path.write_bytes(b"[" * 100_000 + b"\n")
        refused(lambda read=read, path=path: read(path), "JSON|recursion")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("decoder", {"type": "Strip", "content": "a", "start": 9, "stop": 9}),
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["b", 0.0]]}),
        ("post_processor", {"single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}),
    ],
)
def test_tokenizers_that_panic(tmp_path, part, value):
    """Rust's panics are no Exceptions, its other errors bare ones; some come with the first text."""
    from jaxlab.models import load_tokenizer

    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    if part == "post_processor":
        value = value | {"type": "TemplateProcessing", "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_bytes(text_of({"version": "1.0", "model": model} | {part: value}))

    def use():
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("a"))

    refused(use, r"tokenizer\.json.*(PanicException|unk_id)")


def test_special_tokens_that_are_no_text(tmp_path):
    from jaxlab.models import ByteTokenizer, load_tokenizer

    ByteTokenizer().save_pretrained(tmp_path)
    for config, message in (
        ({"eos_token": 3}, "eos_token: expected text"),
        ({"chat_template": {"a": 1}}, "chat_template: expected text"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "chat_template: expected text"),
    ):
        (tmp_path / "tokenizer_config.json").write_bytes(text_of(config))
        refused(lambda: load_tokenizer(tmp_path), message)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% if %}", "{{ a.b.c }}", "{{ messages[0].x.y }}", "{{ ''.__class__.mro() }}"]
)
def test_chat_templates_that_fail(tmp_path, template):
    from jaxlab.models import ByteTokenizer, load_tokenizer

    ByteTokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(text_of({"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    refused(lambda: tokenizer.apply_chat_template([{"role": "user", "content": "x"}]), "chat template")


def test_packed_models_with_more_pairs_than_experts(tmp_path):
    from jaxlab.puzzlemoe.storage import _read_config

    content = packed_config()
    for pairs in (10**30, -1, "x", 5, None):
        (tmp_path / "config.json").write_bytes(
            text_of(content | {"puzzlemoe": content["puzzlemoe"] | {"num_pairs": pairs}})
        )
        refused(lambda: _read_config(tmp_path), "does not describe a packed model")


def test_mmcif_that_is_packed_and_damaged():
    pytest.importorskip("gemmi")
    from jaxlab.megafold.data.mmcif import MMCIFError, parse_mmcif

    packed = gzip.compress(b"data_x\n" * 100, mtime=0)
    refused(lambda: parse_mmcif(packed[:15] + b"\xff\xff" + packed[17:]), "damaged gzip|cut off", MMCIFError)


def test_a_record_whose_mask_repeats_without_end():
    from jaxlab.megafold.data.record import _unpack
    from jaxlab.megafold.features import FEATURES

    arrays = {name: np.zeros((1, 1), np.int8) for name in FEATURES}
    arrays |= {"mask_rows": np.zeros((1, 1), bool), "mask_repeats": np.array([1 << 50])}
    refused(lambda: _unpack(arrays), "rows of the alignment's mask, expected 1")


@pytest.mark.parametrize(
    "trajectory",
    [b"\x93NUMPY\1\0\x10\0(((((((((((((((((", npy(np.zeros(3)), npy(np.array("x"))],
    ids=["header", "shape", "text"],
)
def test_inversions(tmp_path, trajectory):
    from jaxlab.instantedit import Inversion

    members = {"edges": npy(np.zeros((2, 2), bool)), "num_steps": npy(np.int64(2)), "mode": npy(np.array("exact"))}
    members |= {"control_scale": npy(np.float64(1)), "trajectory": trajectory}
    content = zipped({f"{name}.npy": value for name, value in members.items()})
    (tmp_path / "a.npz").write_bytes(content)
    refused(lambda: Inversion.load(tmp_path / "a.npz"), "trajectory")
    (tmp_path / "a.npz").write_bytes(b"PK\3\4" + content[4:100])
    refused(lambda: Inversion.load(tmp_path / "a.npz"), "npz")


def test_images_that_are_none(tmp_path):
    pytest.importorskip("PIL")
    from jaxlab.vlm_scaling import images

    refused(lambda: images.pixels(b"\x89PNG\r\n"), "image: expected a PNG, JPEG, WebP or GIF image")
    with pytest.raises(FileNotFoundError):
        images.pixels(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "PSD"])
def test_images_of_formats_that_nobody_promised(tmp_path, kind):
    """Pillow reads them all."""
    image = pytest.importorskip("PIL.Image")
    from jaxlab.flexgaussian import SceneFormatError, photos
    from jaxlab.instantedit.image_io import read_image
    from jaxlab.vlm_scaling import images

    content = io.BytesIO()
    if kind == "PSD":
        content.write(struct.pack(">4sH6xHIIHHIIIH", b"8BPS", 1, 3, 8, 8, 8, 3, 0, 0, 0, 0) + bytes(192))
    else:
        image.new("RGB", (8, 8)).save(content, kind)
    image.open(content).load()
    (tmp_path / "a.png").write_bytes(content.getvalue())
    for read in (read_image, images.pixels):
        refused(lambda read=read: read(tmp_path / "a.png"), r"a\.png: expected a PNG, JPEG, WebP or GIF image")
    refused(lambda: photos.read_image(tmp_path / "a.png", 4, 4), r"a\.png: not an image.*PNG", SceneFormatError)


def test_exif_data_that_are_none(tmp_path):
    pytest.importorskip("PIL")
    from jaxlab.instantedit.image_io import prepare_image, read_image

    content = picture("webp")
    assert content.count(b"MM\0*") == 1
    (tmp_path / "a.webp").write_bytes(content.replace(b"MM\0*", b"XX\0*"))
    image = read_image(tmp_path / "a.webp")
    refused(lambda: prepare_image(image), "image: its EXIF data are damaged")


def test_a_chunk_of_an_image_that_claims_4_gib(tmp_path):
    pytest.importorskip("PIL")
    from jaxlab.flexgaussian import photos
    from jaxlab.instantedit.image_io import read_image
    from jaxlab.vlm_scaling import images

    content = png(8, 8)
    (tmp_path / "a.png").write_bytes(content[:33] + b"\xff" + content[34:])
    for read in (read_image, images.pixels, lambda path: photos.read_image(path, 4, 4)):
        bounded(lambda read=read: read(tmp_path / "a.png"), (ValueError,))


def test_yaml_brackets(tmp_path):
    from jaxlab import recipes

    (tmp_path / "a.yaml").write_text("a: " + "[" * 3000)
    refused(lambda: recipes.system_of(tmp_path / "a.yaml"), "nested more than 64 deep")
    (tmp_path / "a.yaml").write_text("system: [x]")
    refused(lambda: recipes.system_of(tmp_path / "a.yaml"), "unknown system")


def test_lines_of_other_types(tmp_path):
    from jaxlab.eaglet import RolloutCache
    from jaxlab.vlm_scaling.adapters import jsonl_samples_in

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "resps": 3}\n')
    refused(lambda: jsonl_samples_in(path), "is not understood")
    names = ("task_id", "executor", "seed", "plan", "reward", "steps", "done", "actions", "observations")
    path.write_bytes(text_of({key: [] for key in names} | {"task_id": [1]}) + b"\n")
    refused(lambda: RolloutCache(path), "to hold rollouts")


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": 3}},
        {"message": 3},
        {"text": "x", "index": "0"},
        {"text": "x", "finish_reason": []},
        {"text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": ["y"]}},
    ],
)
def test_answers_of_other_types(choice):
    from jaxlab.inference.endpoint import EndpointError, read_completion, read_pieces

    refused(lambda: read_completion({"choices": [choice]}, "http://x"), "expected an answer", EndpointError)
    refused(
        lambda: list(read_pieces(json.dumps({"choices": [choice]}), EndpointError)), "expected a piece", EndpointError
    )
    refused(lambda: read_completion({"choices": [{"text": "x"}], "usage": 3}, "http://x"), "expected", EndpointError)


def test_a_colmap_image_with_more_points_than_there_are_bytes(tmp_path):
    from jaxlab.flexgaussian import SceneFormatError, cameras_from_colmap

    (tmp_path / "cameras.bin").write_bytes(COLMAP_CAMERAS)
    two = struct.pack("<Q", 2) + COLMAP_IMAGES[8:-8] + struct.pack("<Q", (1 << 64) - 1)
    (tmp_path / "images.bin").write_bytes(two)
    refused(lambda: cameras_from_colmap(tmp_path), "damaged COLMAP model", SceneFormatError)


@pytest.mark.parametrize("bent", [float("nan"), float("inf"), "x", [], 1e30])
def test_lenses_that_cannot_be(tmp_path, bent):
    pytest.importorskip("PIL")
    from jaxlab.flexgaussian import SceneFormatError
    from jaxlab.flexgaussian.photos import load_photographs

    (tmp_path / "a.png").write_bytes(png(8, 8))
    (tmp_path / "transforms.json").write_bytes(text_of(TRANSFORMS | {"k1": bent}))
    refused(
        lambda: load_photographs(tmp_path / "transforms.json", 4, 3), "expected numbers as its lens", SceneFormatError
    )
    strange = {"k1": 9e5, "fl_x": 1e300, "fl_y": 1e300, "cx": -1e308}
    (tmp_path / "transforms.json").write_bytes(text_of(TRANSFORMS | strange))
    bounded(lambda: load_photographs(tmp_path / "transforms.json", 4, 3), (ValueError,))


@pytest.mark.parametrize("native", [False, True])
def test_bounds_hold(native):
    """What the other tests rely on."""
    with pytest.raises(AssertionError, match="MiB for a small file"):
        bounded(lambda: np.ones(500 << 20, np.uint8), (), native=native)
    assert bounded(lambda: np.ones(1 << 20, np.uint8).size, (), native=native) == 1 << 20
    assert bounded(lambda: int("x"), (ValueError,), native=native) is None
