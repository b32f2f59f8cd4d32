"""PuzzleMoE on this CPU: merging and packing, a checkpoint streamed from folder to folder, a packed decoder at work."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.models import load
from jaxlab.puzzlemoe import dual_mask_merge, pack_pair

SYSTEM = "puzzlemoe"

# The gate of a Mixtral expert; the bars are the spec's: 0.4 G positions a second, and at most 8 streaming adds.
K, N = 4096, 14336
POSITIONS_PER_S = 0.4e9
ADDS = 8.0

# A checkpoint of Mixtral's shape, each side halved (a quarter of a Mixtral layer's bytes); bar: two layers of experts.
LAYERS, EXPERTS, D, F = 3, 8, 2048, 7168
PEAK_LAYERS = 2.0

_STREAM = """
import sys, threading, time
import jax
import numpy as np
from jaxlab.puzzlemoe import PuzzleConfig, compress_checkpoint
jax.devices()
def anonymous():  # pages of the files that are read belong to the system's cache
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)
base = anonymous()
thread = threading.Thread(target=watch); thread.start()
calib = np.random.default_rng(0).integers(0, 64, (2, 2048)).astype(np.int32) if sys.argv[3] else None
compress_checkpoint(sys.argv[1], sys.argv[2], PuzzleConfig(), calib=calib)
done.set(); thread.join()
print(peak - base)
"""


def cases(quick: bool) -> Iterator[Case]:
    """Merging beside a streaming addition; memory of streaming; size on disk; tokens of a packed decoder."""
    yield from _merging(quick)
    yield from _streaming(quick)
    yield from _decoding(quick)


def _merging(quick: bool) -> Iterator[Case]:
    """Time of `pack_pair(dual_mask_merge(...))`, compiled, beside a bfloat16 addition that moves the same bytes."""
    rows = K // 4 if quick else K
    keys = jax.random.split(jax.random.key(0), 4)
    w_i, w_j = (0.02 * jax.random.normal(key, (rows, N), jnp.bfloat16) for key in keys[:2])
    n_i, n_j = (jax.random.uniform(key, (rows,)) for key in keys[2:])

    def merge_and_pack(w_i, w_j, n_i, n_j):
        return pack_pair(dual_mask_merge(w_i, w_j, n_i, n_j), checked=False)

    ours = jax.jit(merge_and_pack).lower(w_i, w_j, n_i, n_j).compile()
    add = jax.jit(jnp.add).lower(w_i, w_j).compile()
    repeats = 5 if quick else 9
    seconds, add_s = interleaved(lambda: ours(w_i, w_j, n_i, n_j), lambda: add(w_i, w_j), repeats=repeats, warmup=2)
    shape = f"{rows} x {N}"
    rate = w_i.size / seconds
    yield Case(
        SYSTEM, f"merge and pack, {shape}", "positions/s", rate, POSITIONS_PER_S, "the bar", 1.0, higher_is_better=True
    )
    yield Case(SYSTEM, f"merge and pack, {shape}", "ms", seconds * 1e3, add_s * 1e3, "a bfloat16 addition", 1 / ADDS)
    # Merged, packed, and nothing of the weights' size beside them: one pass.
    extra = ours.memory_analysis().temp_size_in_bytes
    yield Case(SYSTEM, f"merge and pack, {shape}", "temporary bytes", extra, w_i.nbytes, "one expert's matrix", 8.0)


def _streaming(quick: bool) -> Iterator[Case]:
    """Peak memory of `compress_checkpoint` above the imports, in a process of its own, and the packed folder's size.

    Calibration computes in float32, so its unit is a layer of that.
    """
    d, f = (D // 2, F) if quick else (D, F)
    layer = EXPERTS * 3 * d * f * 2
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder) / "model", Path(folder) / "packed"
        _write_mixtral(source, d, f)
        what = f"a checkpoint of {LAYERS} layers of {EXPERTS} experts, {d} x {f}, streamed"
        for calibrated, unit, size in (("", "bfloat16", layer), ("yes", "float32", 2 * layer)):
            command = [sys.executable, "-c", _STREAM, str(source), str(packed), calibrated]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            case = f"{what}, calibrated" if calibrated else what
            peak, peer = float(done.stdout.split()[-1]) / 1e6, f"the experts of one layer in {unit}"
            yield Case(SYSTEM, case, "peak MB", peak, size / 1e6, peer, 1 / PEAK_LAYERS)
        with load.open_tensors(packed) as tensors:
            stored = sum(tensors[name].nbytes for name in tensors if ".puzzlemoe." in name)
        yield Case(SYSTEM, what, "experts' MB on disk", stored / 1e6, LAYERS * layer / 1e6, "bfloat16", 1 / 0.505)


def _write_mixtral(folder: Path, d: int, f: int) -> None:
    """Random weights under Mixtral's names, a file a layer."""
    import ml_dtypes
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    drawn = (0.02 * rng.standard_normal(2 * d * f, np.float32)).astype(ml_dtypes.bfloat16)

    def weight(*shape: int) -> np.ndarray:
        start = int(rng.integers(d * f))
        return drawn[start : start + math.prod(shape)].reshape(shape)

    shards = {"model-head.safetensors": {"model.embed_tokens.weight": weight(64, d), "lm_head.weight": weight(64, d)}}
    shards["model-head.safetensors"]["model.norm.weight"] = np.ones(d, ml_dtypes.bfloat16)
    kv = d // 4
    for at in range(LAYERS):
        name = f"model.layers.{at}."
        tensors = {
            f"{name}self_attn.{part}_proj.weight": weight(rows, columns)
            for part, rows, columns in (("q", d, d), ("k", kv, d), ("v", kv, d), ("o", d, d))
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = np.ones(d, ml_dtypes.bfloat16)
        tensors[f"{name}block_sparse_moe.gate.weight"] = weight(EXPERTS, d)
        for expert in range(EXPERTS):
            for part, shape in (("w1", (f, d)), ("w3", (f, d)), ("w2", (d, f))):
                tensors[f"{name}block_sparse_moe.experts.{expert}.{part}.weight"] = weight(*shape)
        shards[f"model-{at}.safetensors"] = tensors
        save_file(tensors, folder / f"model-{at}.safetensors")
    save_file(shards["model-head.safetensors"], folder / "model-head.safetensors")
    index = {"weight_map": {tensor: file for file, tensors in shards.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _decoding(quick: bool) -> Iterator[Case]:
    """Tokens of a decoder from packed words, beside the same decoder with its decoded weights in bfloat16."""
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, init_params
    from jaxlab.puzzlemoe import PuzzleConfig, compress_moe, unpack_moe

    config = DecoderConfig(
        vocab_size=1024,
        hidden_size=512 if quick else 1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        moe=MoESpec(EXPERTS, 2, 1024 if quick else 3584, renormalise=True),
        model_type="mixtral",
        param_dtype="bfloat16",
    )
    model = Decoder(config)
    params = init_params(model, jax.random.key(0))
    packed = compress_moe(model, params, None, PuzzleConfig(norm="magnitude"))[:2]
    decoded = unpack_moe(*packed)
    new = 16 if quick else 32
    sampling = SamplingParams(max_tokens=new, temperature=0.0)
    for batch in (1, 8):
        prompts = [[1 + row, 2, 3, 4, 5, 6, 7, 8] for row in range(batch)]
        ours, peer = interleaved(
            lambda prompts=prompts: generate(*packed, prompts, sampling).tokens,
            lambda prompts=prompts: generate(*decoded, prompts, sampling).tokens,
            repeats=5,
        )
        yield Case(
            SYSTEM,
            f"decoding, batch {batch}, 2 layers of {EXPERTS} experts, {config.hidden_size} wide",
            "tokens/s",
            batch * new / ours,
            batch * new / peer,
            "the decoded weights in bfloat16",
            higher_is_better=True,
        )
