"""What a decoder is: sizes, rotary positions, experts.

One frozen description covers Llama, SmolLM2, Mistral, Qwen2/2.5, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and
DeepSeek-MoE. Field names are those of Hugging Face's `config.json`; `families.py` reads and writes that file.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlab.core.untrusted import understood
from jaxlab.models.sources import read_config

_DTYPES = ("float32", "bfloat16", "float16", "float64")
Number = float | int
"""What a float field takes; it is kept as a float."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _set(self, name: str, value) -> None:
    object.__setattr__(self, name, value)


def _require(ok: bool, name: str, rule: str, got) -> None:
    if not ok:
        raise ValueError(f"{name} must be {rule}, got {got!r}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al., arXiv:2104.09864) and their long-context scalings.

    Attributes:
        rope_theta: base wavelength.
        rope_type: "default"; "linear" (positions divided by `factor`); "llama3" (Llama 3.1's frequency bands);
            "yarn" (Peng et al., arXiv:2309.00071).
        factor: how much longer the context becomes.
        original_max_position_embeddings: context length before scaling; None = the model's.
        low_freq_factor: llama3, wavelengths over original / low are divided by `factor`.
        high_freq_factor: llama3, wavelengths under original / high stay as they are.
        beta_fast: yarn, rotations over the original context above which a frequency stays as it is.
        beta_slow: yarn, rotations below which it is divided by `factor`.
        attention_factor: yarn, multiplies cos and sin; None = 0.1 ln(factor) + 1, or the ratio of the two `mscale`s.
        mscale: yarn, DeepSeek's numerator of that ratio.
        mscale_all_dim: yarn, its denominator.
        truncate: yarn, rounds the band's edges to whole dimensions.
        mrope_section: M-RoPE (Qwen2-VL, arXiv:2409.12191): frequencies for time, height and width; they sum to
            head_dim / 2. None = all three position streams are one.
    """

    rope_theta: Number = 10000.0
    rope_type: str = "default"
    factor: Number = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: Number = 1.0
    high_freq_factor: Number = 4.0
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = True
    mrope_section: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _set(self, name, float(getattr(self, name)))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _set(self, name, float(getattr(self, name)))
        if self.mrope_section is not None:
            _set(self, "mrope_section", tuple(self.mrope_section))
        _require(self.rope_theta > 0, "rope.rope_theta", "positive", self.rope_theta)
        if self.rope_type not in ROPE_TYPES:
            raise NotImplementedError(f"rope.rope_type {self.rope_type!r}: known types are {', '.join(ROPE_TYPES)}")
        _require(self.factor >= 1, "rope.factor", "at least 1", self.factor)


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """Experts of the sparse layers.

    Attributes:
        num_experts: E.
        top_k: experts each token visits.
        ffn_size: width of one expert.
        shared_ffn_size: width of the expert that every token visits; 0 = none.
        shared_gate: the shared expert's output is scaled by sigmoid(x @ w) (Qwen2-MoE).
        renormalise: the k weights are divided by their sum.
        scoring: "softmax" or "sigmoid" of the router's logits.
        scale: multiplies the k weights.
        sparse_layers: indices of the layers with experts; None = every layer.
        activation: "swiglu" (three matrices), or two matrices with "silu" or "gelu" between (X-MoE's own models); the
            shared expert always has three.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    shared_ffn_size: int = 0
    shared_gate: bool = False
    renormalise: bool = False
    scoring: str = "softmax"
    scale: Number = 1.0
    sparse_layers: tuple[int, ...] | None = None
    activation: str = "swiglu"

    def __post_init__(self):
        _set(self, "scale", float(self.scale))
        if self.sparse_layers is not None:
            _set(self, "sparse_layers", tuple(sorted(self.sparse_layers)))
        most = _MOST["num_experts"]
        _require(1 <= self.num_experts <= most, "moe.num_experts", f"1 to {most}", self.num_experts)
        _require(1 <= self.top_k <= self.num_experts, "moe.top_k", f"in 1..{self.num_experts}", self.top_k)
        _require(self.ffn_size >= 1, "moe.ffn_size", "at least 1", self.ffn_size)
        _require(self.shared_ffn_size >= 0, "moe.shared_ffn_size", "at least 0", self.shared_ffn_size)
        _require(self.scoring in ("softmax", "sigmoid"), "moe.scoring", "'softmax' or 'sigmoid'", self.scoring)
        _require(
            self.activation in ("swiglu", "silu", "gelu"),
            "moe.activation",
            "'swiglu', 'silu' or 'gelu'",
            self.activation,
        )
        if self.shared_gate and not self.shared_ffn_size:
            raise ValueError("moe.shared_gate needs a shared expert: shared_ffn_size is 0")


_MOST = {"num_hidden_layers": 10_000, "num_experts": 1 << 16}
_MOST_OF_A_SIZE = 1 << 31
"""A config's numbers are refused beyond these before anything is made of them."""


class LayerRun(NamedTuple):
    """Layers start..stop-1, alike in MLP and window, stored stacked as `blocks_i`."""

    start: int
    stop: int
    sparse: bool
    window: int | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model, under Hugging Face's field names.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F, the width of the dense MLPs.
        num_hidden_layers: L.
        num_attention_heads: H.
        num_key_value_heads: Hkv, a divisor of H.
        head_dim: Dh; None = D / H (filled in, so readers always see an int).
        max_position_embeddings: longest context.
        rms_norm_eps: epsilon of every RMSNorm.
        rope: rotary positions.
        tie_word_embeddings: the head is the embedding.
        qkv_bias: biases on the q, k and v projections (Qwen2).
        qk_norm: RMSNorm of q and k: None, "head" (each head, Qwen3) or "full" (all heads together, OLMoE).
        windows: one entry a layer, the number of positions a query sees, itself included; None = all before it.
        moe: experts, or None for a dense model.
        model_type: Hugging Face family, for `to_hf`.
        dtype: of the computation.
        param_dtype: of the parameters.
        remat: "none", or "block" to recompute each block in the backward pass.
        scan: run equal layers as one scanned layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: Number = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: str | None = None
    windows: tuple[int | None, ...] | None = None
    moe: MoESpec | None = None
    model_type: str = "llama"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            most = _MOST.get(name, _MOST_OF_A_SIZE)
            _require(1 <= getattr(self, name) <= most, name, f"1 to {most}", getattr(self, name))
        _require(
            self.num_key_value_heads >= 1 and self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads={self.num_attention_heads}",
            self.num_key_value_heads,
        )
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                "hidden_size",
                f"a multiple of num_attention_heads={self.num_attention_heads} when head_dim is not given",
                self.hidden_size,
            )
            _set(self, "head_dim", self.hidden_size // self.num_attention_heads)
        head_dim, longest = self.head_dim or 0, self.max_position_embeddings
        _require(head_dim >= 2 and head_dim % 2 == 0, "head_dim", "even and at least 2", self.head_dim)
        _require(longest >= 1, "max_position_embeddings", "at least 1", longest)
        _set(self, "rms_norm_eps", float(self.rms_norm_eps))
        if self.rope.rope_type in ("llama3", "yarn") and self.rope.original_max_position_embeddings is None:
            original = dataclasses.replace(self.rope, original_max_position_embeddings=self.max_position_embeddings)
            _set(self, "rope", original)
        if self.rope.mrope_section is not None:
            _require(
                sum(self.rope.mrope_section) * 2 == head_dim,
                "rope.mrope_section",
                f"three counts that sum to head_dim / 2 = {head_dim // 2}",
                self.rope.mrope_section,
            )
        _require(self.qk_norm in (None, "head", "full"), "qk_norm", "None, 'head' or 'full'", self.qk_norm)
        _require(self.remat in ("none", "block"), "remat", "'none' or 'block'", self.remat)
        _require(self.dtype in _DTYPES, "dtype", f"one of {_DTYPES}", self.dtype)
        _require(self.param_dtype in _DTYPES, "param_dtype", f"one of {_DTYPES}", self.param_dtype)
        if self.windows is not None:
            _set(self, "windows", tuple(self.windows))
            _require(
                len(self.windows) == self.num_hidden_layers and all(w is None or w >= 1 for w in self.windows),
                "windows",
                f"one positive width or None for each of the {self.num_hidden_layers} layers",
                self.windows,
            )
            if not any(self.windows):
                _set(self, "windows", None)
        if self.moe is not None and self.moe.sparse_layers is not None:
            layers = self.moe.sparse_layers
            _require(
                len(set(layers)) == len(layers) and all(0 <= i < self.num_hidden_layers for i in layers),
                "moe.sparse_layers",
                f"distinct layers in 0..{self.num_hidden_layers - 1}",
                layers,
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts."""
        return self.moe is not None and (self.moe.sparse_layers is None or layer in self.moe.sparse_layers)

    def layer_runs(self) -> tuple[LayerRun, ...]:
        """Maximal runs of equal layers, in order: run i is `blocks_i` of the parameter tree."""
        runs: list[LayerRun] = []
        for i in range(self.num_hidden_layers):
            kind = (self.is_sparse(i), self.windows[i] if self.windows is not None else None)
            if runs and (runs[-1].sparse, runs[-1].window) == kind:
                runs[-1] = runs[-1]._replace(stop=i + 1)
            else:
                runs.append(LayerRun(i, i + 1, *kind))
        return tuple(runs)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> "DecoderConfig":
        """Reads a Hugging Face `config.json`.

        Args:
            source: its content, its path, or the folder that holds it.

        Returns:
            The description; dtype, param_dtype, remat and scan are the defaults (a file's `torch_dtype` says how
            its weights are stored, not how to compute).

        Raises:
            NotImplementedError: a family or a feature that the decoder does not have.
            KeyError: a size is missing.
            FileNotFoundError: no such file.
            ValueError: it is not a JSON object, or its sizes do not fit.
        """
        from jaxlab.models.decoder import families

        content = read_config(source)
        with understood("config.json"):
            return families.read(content)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model.

        Raises:
            ValueError: `model_type`'s family cannot say what this configuration says; the message names the fields
                and the families that can.
            NotImplementedError: unknown `model_type`.
        """
        from jaxlab.models.decoder import families

        return families.write(self)
