"""GGUF files (llama.cpp's format): header, tensors dequantised to float32, and Hugging Face's view of both.

`GgufFile` is the file as it is. `GgufDecoder` shows the same tensors under Hugging Face's names and in Hugging Face's
layout, so that one key table serves both formats; `hf_config` is the `config.json` that the header stands for.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.core.untrusted import understood
from jaxlab.models.load import Select, Tensors

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST, _MOST_DIMENSIONS = 8, 8  # ggml has four dimensions
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int


class GgufFile(Tensors):
    """A GGUF file's metadata and tensors, under the file's own names, outermost dimension first.

    Args:
        path: the file.

    Attributes:
        metadata: key -> value, arrays as lists.

    Raises:
        ValueError: not a GGUF file, or a damaged one.
        NotImplementedError: a version, or on reading a quantisation, that is not known.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, Any] = {}
        self._entries = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is a damaged GGUF file: its header does not parse ({error})") from error

    def _read_header(self) -> None:
        header = _Cursor(self._map, 4)
        version, tensors, pairs = header.scalar("I"), header.scalar("Q"), header.scalar("Q")
        if version not in (2, 3):
            raise NotImplementedError(f"{self.where}: GGUF version {version} is not supported, expected 2 or 3")
        for _ in range(pairs):
            key = header.string()
            self.metadata[key] = header.value(header.scalar("I"))
        infos = []
        for _ in range(tensors):
            name, rank = header.string(), header.scalar("I")
            if not 1 <= rank <= _MOST_DIMENSIONS:
                expected = f"1 to {_MOST_DIMENSIONS} dimensions"
                raise ValueError(f"{self.where}: tensor {name!r}: expected {expected}, got {rank}")
            dims = [header.scalar("Q") for _ in range(rank)]
            infos.append((name, tuple(reversed(dims)), header.scalar("I"), header.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.where}: general.alignment must be a positive integer, got {alignment!r}")
        start = -(-header.at // alignment) * alignment
        for name, shape, kind, offset in infos:
            kind, row_bytes = _kind(kind, shape)
            self._entries[name] = _Stored(shape, kind, start + offset, row_bytes)
            end = start + offset + row_bytes * math.prod(shape[:-1])
            if row_bytes and end > len(self._map):
                raise ValueError(f"{self.where} is truncated: tensor {name!r} ends at {end}, file at {len(self._map)}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost dimension first."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """float32, or what the file has where it is not quantised."""
        return np.dtype(_PLAIN.get(self._entries[name].kind, np.float32))

    def kind(self, name: str) -> str:
        """How a tensor is stored: "F32", "Q4_1", ..."""
        return self._entries[name].kind

    def read(self, name: str, select: Select = ()) -> np.ndarray:
        """A tensor dequantised; a selection of the outermost dimension is made before, the others after."""
        tensor = self._entries[name]
        if not tensor.row_bytes:
            raise NotImplementedError(f"{self.where}: tensor {name!r} has type {tensor.kind}, which is not supported")
        *outer, width = tensor.shape
        raw = np.frombuffer(self._map, np.uint8, tensor.row_bytes * math.prod(outer), tensor.offset)
        raw = raw.reshape(*outer, tensor.row_bytes)
        first = select[:1] if len(tensor.shape) > 1 else ()
        raw = raw[first]
        values = _dequantise(raw.reshape(-1, tensor.row_bytes), tensor.kind).reshape(*raw.shape[:-1], width)
        return values[(slice(None),) * len(first) + tuple(select[len(first) :])]

    def close(self) -> None:
        """The map is freed with the last array that looks into it."""


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise struct.error(f"a string of {size} bytes passes the end of the file")
        self.at += size
        return raw.decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            if depth == _DEEPEST:
                raise struct.error(f"arrays nested more than {_DEEPEST} deep")
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                code = f"<{count}{_SCALARS[inner]}"
                values = struct.unpack_from(code, self.data, self.at)
                self.at += struct.calcsize(code)
                return list(values)
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])


def _kind(code: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """Name of a tensor type and the bytes of one row; 0 bytes where nothing here can read it."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return f"number {code}", 0
    if shape[-1] % block:
        raise ValueError(f"a row of {shape[-1]} values is not a multiple of {kind.name}'s block of {block}")
    return kind.name, shape[-1] // block * size


def _dequantise(rows: np.ndarray, kind: str) -> np.ndarray:
    """`[rows, bytes]` to `[rows, values]`. The common types at memory speed, the others by the gguf package."""
    if kind in _PLAIN:
        return rows.view(_PLAIN[kind])
    if kind in ("Q4_0", "Q4_1"):
        head = 2 if kind == "Q4_0" else 4
        blocks = rows.reshape(-1, head + 16)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        nibbles = blocks[:, head:]
        out = np.empty((len(blocks), 2, 16), np.float32)
        if kind == "Q4_1":
            np.multiply(nibbles & 15, scale, out=out[:, 0])
            np.multiply(nibbles >> 4, scale, out=out[:, 1])
            out += blocks[:, 2:4].copy().view(np.float16).astype(np.float32)[:, :, None]
        else:
            np.multiply((nibbles & 15).view(np.int8) - np.int8(8), scale, out=out[:, 0])
            np.multiply((nibbles >> 4).view(np.int8) - np.int8(8), scale, out=out[:, 1])
        return out.reshape(len(rows), -1)
    if kind == "Q8_0":
        blocks = rows.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return (blocks[:, 2:].view(np.int8) * scale).reshape(len(rows), -1)
    import gguf

    try:
        return gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise NotImplementedError(f"GGUF type {kind} is not supported: {error}") from error


# Architecture -> Hugging Face family without and with experts. `make parity` compares them with transformers' reading,
# except Mixtral, which transformers does not read.
_FAMILIES = {
    "llama": ("llama", "mixtral"),
    "qwen2": ("qwen2", None),
    "qwen3": ("qwen3", None),
    "qwen2moe": (None, "qwen2_moe"),
    "qwen3moe": (None, "qwen3_moe"),
}


@understood("GGUF metadata")
def hf_config(file: GgufFile) -> dict[str, Any]:
    """The Hugging Face `config.json` that the header of a GGUF file stands for.

    Raises:
        NotImplementedError: an architecture, or a rotary scaling, that is not known.
        ValueError: a key that the architecture needs is absent.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in _FAMILIES:
        raise NotImplementedError(f"{file.where}: architecture {arch!r}: known are {', '.join(_FAMILIES)}")

    def key(name: str, *default: Any) -> Any:
        value = file.metadata.get(f"{arch}.{name}", *default)
        if value is None and not default:
            raise ValueError(f"{file.where}: metadata key {arch}.{name} is absent")
        if isinstance(value, list):
            raise NotImplementedError(f"{file.where}: {arch}.{name} differs from layer to layer: {value}")
        return value

    heads = key("attention.head_count")
    experts = key("expert_count", 0)
    family = _FAMILIES[arch][bool(experts)]
    if family is None:
        raise NotImplementedError(f"{file.where}: architecture {arch!r} with {experts} experts is not supported")
    hf = {
        "model_type": family,
        "vocab_size": file.shape("token_embd.weight")[0] if "token_embd.weight" in file else key("vocab_size"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": key("attention.key_length", None) or key("embedding_length") // heads,
        "max_position_embeddings": key("context_length"),
        # The file keeps a float32; the shortest decimal that rounds to it is what was written.
        "rms_norm_eps": float(str(np.float32(key("attention.layer_norm_rms_epsilon")))),
        "rope_theta": key("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, key),
        "tie_word_embeddings": "output.weight" not in file,
        "sliding_window": None,
    }
    if experts:
        hf |= {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": key("expert_used_count")}
        hf["moe_intermediate_size"] = key("expert_feed_forward_length", hf["intermediate_size"])
        hf["norm_topk_prob"] = arch == "qwen3moe"
        hf["shared_expert_intermediate_size"] = key("expert_shared_feed_forward_length", 0)
    return hf


def _rope_scaling(file: GgufFile, key: Callable[..., Any]) -> dict[str, Any] | None:
    kind = key("rope.scaling.type", "none")
    if "rope_freqs.weight" in file:
        return _llama3_scaling(file, key)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise NotImplementedError(f"{file.where}: rope scaling {kind!r} is not supported")
    scaling = {"rope_type": kind, "factor": key("rope.scaling.factor")}
    original = key("rope.scaling.original_context_length", None)
    return scaling | ({"original_max_position_embeddings": original} if kind == "yarn" and original else {})


def _llama3_scaling(file: GgufFile, key: Callable[..., Any]) -> dict[str, Any]:
    """Llama 3.1 and later keep no parameters, only each frequency's divisor: find the published ones they come from."""
    divisors = file.read("rope_freqs.weight")
    exponent = np.arange(len(divisors)) / len(divisors)
    wavelength = 2 * np.pi * key("rope.freq_base", 10000.0) ** exponent
    for factor in (8.0, 32.0):
        smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise NotImplementedError(f"{file.where}: rope_freqs.weight is not Llama 3's with factor 8 or 32")


class _View(NamedTuple):
    """A Hugging Face tensor inside a GGUF file."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    heads: int = 0


class GgufDecoder(Tensors):
    """A decoder's GGUF file under Hugging Face's names and layout: experts apart, llama's q and k unpermuted.

    Args:
        file: the file; its architecture must be one that `hf_config` knows.
    """

    def __init__(self, file: GgufFile):
        self.where, self._file = file.where, file
        config = hf_config(file)
        self._entries = {}
        for name in file:
            self._add(name, config)

    def _add(self, name: str, config: dict[str, Any]) -> None:
        shape = self._file.shape(name)
        whole = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name == "rope_freqs.weight":
            return  # became the configuration's rope scaling
        if name in whole or not block:
            self._entries[whole.get(name, name)] = _View(name, shape)
            return
        layer, leaf, kind = block.groups()
        mixtral = config["model_type"] == "mixtral"
        moe = "block_sparse_moe" if mixtral else "mlp"
        experts = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}
        if leaf in experts:
            names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {}
            projection = names.get(experts[leaf], f"{experts[leaf]}_proj")
            for expert in range(shape[0]):
                stored = f"model.layers.{layer}.{moe}.experts.{expert}.{projection}.{kind}"
                self._entries[stored] = _View(name, shape[1:], expert)
            return
        names = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            "ffn_gate_inp": f"{moe}.gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        }
        # llama.cpp rotates neighbouring pairs in this architecture, and its q and k rows are reordered for that.
        permuted = self._file.metadata["general.architecture"] == "llama"
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        if leaf == "ffn_gate_inp_shexp" and len(shape) == 1:
            shape = (1, *shape)
        stored = f"model.layers.{layer}.{names[leaf]}.{kind}" if leaf in names else name
        self._entries[stored] = _View(name, shape, None, heads.get(leaf, 0) if permuted else 0)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face's layout."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` gives."""
        return self._file.dtype(self._entries[name].name)

    def read(self, name: str, select: Select = ()) -> np.ndarray:
        """A tensor dequantised, in Hugging Face's layout."""
        view = self._entries[name]
        expert = () if view.expert is None else (slice(view.expert, view.expert + 1),)
        values = self._file.read(view.name, expert)
        if view.heads:
            pairs = values.reshape(view.heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2)
        return values.reshape(view.shape)[select]

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()
