"""Files of models, each with its reader."""

import functools
import json
import struct
from pathlib import Path

from tests.fuzz.mutations import KEYS, Format, beside, text_of
from tests.fuzz.samples import gguf_model, gguf_tokens, packed_config, safetensors_of_three


def _tensors(path):
    from jaxlab.models import load

    with load.open_tensors(path) as tensors:
        for name in tensors:
            tensors.shape(name), tensors.dtype(name), tensors[name], tensors.read(name, (slice(0, 1),))


def _decoder_gguf(path):
    from jaxlab.models.gguf import GgufDecoder, GgufFile, hf_config

    file = GgufFile(path)
    hf_config(file)
    decoder = GgufDecoder(file)
    for name in decoder:
        decoder[name]


def load_tokenizer(path):
    from jaxlab.models import load_tokenizer

    tokenizer = load_tokenizer(path if path.suffix == ".gguf" else path.parent)
    return tokenizer.decode(tokenizer.encode("ab a")), tokenizer.eos_token_id


@functools.cache
def _tokenizer_json():
    import tempfile

    from jaxlab.models import ByteTokenizer

    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save_pretrained(folder)
        return json.loads((Path(folder) / "tokenizer.json").read_text())


def _beside_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(text_of(_tokenizer_json()))


_TOKENIZER_CONFIG = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>", "special": True},
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
}


def _decoder_config(path):
    from jaxlab.models.decoder import DecoderConfig

    return DecoderConfig.from_hf(path).layer_runs()


def _golden(name):
    from tests.models.checkpoints import golden

    return golden(name)["config"]


def _pretrained(path):
    from jaxlab.models import load_pretrained

    return load_pretrained(path.parent)


def _beside_weights(folder):
    (folder / "model.safetensors").write_bytes(safetensors_of_three())


def _index(path):
    from jaxlab.models import load

    return list(load.open_tensors(path.parent))


def _beside_shard(folder):
    (folder / "shard.safetensors").write_bytes(safetensors_of_three())


def _packed(path):
    from jaxlab.puzzlemoe.storage import _read_config

    return _read_config(path.parent)


def _scheduler(path):
    from jaxlab.instantedit.checkpoint import _check_scheduler

    return _check_scheduler(path.parent)


def _prompt_tokenizer(path):
    from jaxlab.instantedit.tokens import PromptTokenizer

    return PromptTokenizer.from_folder(path.parent).ids("a")


MERGES = b"#version: 0.2\na b\n"
_SCHEDULER = {"beta_start": 0.00085, "prediction_type": "epsilon"}
_VOCAB = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "a</w>": 4, "ab": 5}


def _tokenizer_of(model, **parts):
    """`tokenizer.json` of a model, with what may stand around it."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **empty, "model": model, **parts}


def _unigram():
    from base64 import b64encode

    charsmap = b64encode(struct.pack("<I", 1024) + bytes(1024) + b"\0").decode()
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return _tokenizer_of(
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "byte_fallback": False},
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [metaspace, {"type": "FixedLength", "length": 5}]},
        decoder={"type": "Sequence", "decoders": [metaspace, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    )


def _wordpiece():
    special = {"id": "[CLS]", "ids": [0], "tokens": ["[CLS]"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    lower = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return _tokenizer_of(
        {
            **{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
            **{"max_input_chars_per_word": 100, "vocab": {"[CLS]": 0, "[UNK]": 1, "a": 2, "##b": 3}},
        },
        added_tokens=[{"id": 0, "content": "[CLS]", **flags}],
        normalizer={"type": "BertNormalizer", **lower},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={
            **{"type": "TemplateProcessing", "single": template, "pair": template},
            "special_tokens": {"[CLS]": special},
        },
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


BYTES = {
    "safetensors": Format("a.safetensors", safetensors_of_three, _tensors),
    "gguf": Format("a.gguf", lambda: gguf_model("F32"), _tensors),
    "gguf, quantised": Format("a.gguf", lambda: gguf_model("Q4_0"), _decoder_gguf),
    "gguf, tokens": Format("a.gguf", gguf_tokens, load_tokenizer),
    "scheduler": Format("scheduler_config.json", lambda: text_of(_SCHEDULER), _scheduler),
    "merges": Format(
        "merges.txt", lambda: MERGES, _prompt_tokenizer,
        beside=beside("vocab.json", text_of(_VOCAB)),
    ),
}  # fmt: skip


DOCUMENTS = {
    "safetensors index": Format(
        "model.safetensors.index.json",
        lambda: {"weight_map": dict.fromkeys("abc", "shard.safetensors")},
        _index,
        beside=_beside_shard,
    ),
    "decoder": Format("config.json", lambda: _golden("llama"), _decoder_config, KEYS),
    "decoder with experts": Format("config.json", lambda: _golden("qwen3-moe"), _decoder_config, KEYS),
    "pretrained": Format("config.json", lambda: _golden("qwen2"), _pretrained, KEYS, _beside_weights, KeyError),
    "packed experts": Format("config.json", packed_config, _packed, KEYS, _beside_weights),
    "tokenizer": Format("tokenizer.json", _tokenizer_json, load_tokenizer),
    "tokenizer, unigram": Format("tokenizer.json", _unigram, load_tokenizer),
    "tokenizer, wordpiece": Format("tokenizer.json", _wordpiece, load_tokenizer),
    "tokenizer config": Format(
        "tokenizer_config.json", lambda: _TOKENIZER_CONFIG, load_tokenizer, beside=_beside_tokenizer
    ),
    "vocabulary": Format("vocab.json", lambda: _VOCAB, _prompt_tokenizer, beside=beside("merges.txt", MERGES)),
    "scheduler": Format("scheduler_config.json", lambda: _SCHEDULER, _scheduler),
}

TRANSFORMERS = {
    "vocab.json": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3},
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 8},
    "added_tokens.json": {"<x>": 4},
    "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
}
